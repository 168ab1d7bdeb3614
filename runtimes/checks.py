"""What every runtime checks before and after its backend: names, shapes, dtypes, and whose bundle it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeflow.errors import RuntimeFailure
from edgeflow.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle


def expect_bundle(runtime: str, source: object) -> Bundle:
    """``source`` when it is a bundle made for the backend ``runtime``. Raises RuntimeFailure otherwise."""
    from edgeflow.bundle import Bundle

    if not isinstance(source, Bundle):
        raise RuntimeFailure(
            f"runtime {runtime}: expected an exported bundle, got a {type(source).__name__.lower()}; "
            f"export it with --to {runtime}, or draw from it with the runtime torch"
        )
    if source.manifest.backend != runtime:
        raise RuntimeFailure(
            f"runtime {runtime}: {source.root}: expected a bundle of the backend {runtime}, "
            f"got one of {source.manifest.backend}"
        )
    return source


def expect_keys(runtime: str, graph: GraphSpec, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Raises RuntimeFailure when an artifact's own tensor names are not the ones its manifest promises."""
    for what, promised, found in (
        ("inputs", {t.key for t in graph.inputs}, set(inputs)),
        ("outputs", {t.key for t in graph.outputs}, set(outputs)),
    ):
        if not promised <= found or (what == "inputs" and promised != found):
            raise RuntimeFailure(
                f"runtime {runtime}: graph {graph.name}: {graph.file}: expected {what} {sorted(promised)}, "
                f"got {sorted(found)}"
            )


def pick_graph(graphs: Mapping[str, GraphSpec], name: str) -> GraphSpec:
    """The graph called ``name``. Raises ValueError listing the known ones."""
    if name not in graphs:
        raise ValueError(f"graph {name!r} is not loaded; known: {', '.join(graphs)}")
    return graphs[name]


def feed(graph: GraphSpec, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """``inputs`` by edgeflow's names → contiguous arrays of the artifact's dtypes by the artifact's keys.

    Raises ValueError for a missing or unknown name, a wrong shape, or a dtype of another kind (float ids).
    """
    expected = {t.name for t in graph.inputs}
    if set(inputs) != expected:
        missing, unknown = sorted(expected - set(inputs)), sorted(set(inputs) - expected)
        raise ValueError(
            f"graph {graph.name}: expected the inputs {sorted(expected)}, missing {missing}, "
            f"unknown {unknown}"
        )
    return {t.key: _cast(graph, t, np.asarray(inputs[t.name])) for t in graph.inputs}


def _cast(graph: GraphSpec, spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    if array.shape != spec.shape:
        raise ValueError(
            f"graph {graph.name}: input {spec.name}: expected shape {spec.shape}, got {array.shape}"
        )
    dtype = np.dtype(spec.dtype)
    if spec.name == "timestep" and dtype.kind == "i" and np.array_equal(array, np.rint(array)):
        array = array.astype(dtype)  # clients of whole timesteps; 1000.0 is one
    if not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise ValueError(f"graph {graph.name}: input {spec.name}: expected {spec.dtype}, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=dtype)


def collect(runtime: str, graph: GraphSpec, results: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays by the artifact's keys → arrays by edgeflow's names, in the spec's dtypes.

    Raises RuntimeFailure for a wrong shape.
    """
    outputs = {}
    for spec in graph.outputs:
        array = np.asarray(results[spec.key])
        if array.shape != spec.shape:
            raise RuntimeFailure(
                f"runtime {runtime}: graph {graph.name}: output {spec.name}: expected shape {spec.shape}, "
                f"got {array.shape}"
            )
        outputs[spec.name] = array.astype(spec.dtype, copy=False)
    return outputs


def one_line(error: BaseException) -> str:
    """A backend's complaint as one line: the first line that says something, without its trailing stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def num_threads() -> int:
    """Physical cores this process may use, or OMP_NUM_THREADS where that is set lower.

    Two hardware threads of a core share one multiplier array, so a second thread there only adds waiting.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core(cpu) for cpu in allowed}
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(len(cores), int(limit)) if limit.isdigit() and int(limit) > 0 else len(cores)


def _core(cpu: int) -> str:
    """A name shared by the hardware threads of one core; a CPU of which nothing is known is its own core."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
