"""Core ML: the framework itself on macOS, the op-by-op interpreter of the saved package elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray

from edgeflow.bundle import inside
from edgeflow.fusions import Operations, composite, kinds_of
from edgeflow.runtimes import checks
from edgeflow.runtimes.mil_reader import read_package
from edgeflow.spec import GraphSpec

if importlib.util.find_spec("coremltools") is None:
    raise ModuleNotFoundError("No module named 'coremltools'", name="coremltools")
if sys.platform != "darwin":
    from edgeflow.runtimes.mil_interpreter import MilInterpreter

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle


class Engine(Protocol):
    """What executes one package: arrays by the package's names in and out."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...


class CoreMLRuntime:
    """Runs a Core ML bundle. ``engine`` says what executes it: "Core ML" or "interpreter"."""

    name: ClassVar[str] = "coreml"
    engine: ClassVar[str] = "Core ML" if sys.platform == "darwin" else "interpreter"

    def __init__(self, graphs: Mapping[str, GraphSpec], engines: Mapping[str, Engine]):
        self._graphs = dict(graphs)
        self._engines = dict(engines)

    @classmethod
    def load(cls, bundle: Bundle) -> CoreMLRuntime:
        """Open every package of the bundle.

        Raises RuntimeFailure for a package that cannot be read or, off macOS, holds an operation or parameter
        the interpreter does not know; all unknown operations are named at once.
        """
        checks.expect_bundle(cls.name, bundle)
        graphs = {graph.name: graph for graph in bundle.manifest.graphs}
        return cls(graphs, {name: _open(bundle, graph) for name, graph in graphs.items()})

    @classmethod
    def operations(cls, bundle: Bundle, graph: str) -> Operations:
        """The saved packages' operations: what a device fuses besides is its own."""
        checks.expect_bundle(cls.name, bundle)
        spec = bundle.graph(graph)
        programs = [read_package(inside(bundle.root, file)) for file in spec.chunks or (spec.file,)]
        types = Counter(o.type for p in programs for o in p.operations if not o.type.startswith("const"))
        return Operations(types.total(), types.total(), kinds_of(types), composite(types))

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see ``edgeflow.spec.GraphSpec`` for the names and shapes."""
        spec = checks.pick_graph(self._graphs, graph)
        return checks.collect(self.name, spec, self._engines[graph].run(checks.feed(spec, inputs)))


def _open(bundle: Bundle, graph: GraphSpec) -> Engine:
    if graph.chunks:
        return _Chunks(bundle, graph)
    path = inside(bundle.root, graph.file)
    if sys.platform == "darwin":
        return _Framework(path)
    interpreter = MilInterpreter.open(path)
    checks.expect_keys(CoreMLRuntime.name, graph, interpreter.inputs, interpreter.outputs)
    return interpreter


class _Chunks:
    """Packages that run one after the other; each takes, by name, from the inputs and what came before."""

    def __init__(self, bundle: Bundle, graph: GraphSpec):
        paths = [inside(bundle.root, file) for file in graph.chunks]
        self._parts: list[Any] = [
            _Framework(path) if sys.platform == "darwin" else MilInterpreter.open(path) for path in paths
        ]
        self._outputs = [t.key for t in graph.outputs]
        if sys.platform != "darwin":
            made: set[str] = set()
            for part in self._parts:
                taken = [name for name in part.inputs if name not in made]
                known = replace(graph, inputs=tuple(t for t in graph.inputs if t.key in taken), outputs=())
                checks.expect_keys(CoreMLRuntime.name, known, taken, ())
                made |= set(part.outputs)
            ends = replace(graph, inputs=())
            checks.expect_keys(CoreMLRuntime.name, ends, (), self._parts[-1].outputs)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        values = dict(inputs)
        for part in self._parts:
            values |= part.run({name: values[name] for name in part.inputs})
        return {name: values[name] for name in self._outputs}


class _Framework:
    """Apple's Core ML on every compute unit it finds: CPU, GPU and Neural Engine, as an app would run it."""

    def __init__(self, path: Path):
        import coremltools as ct

        from edgeflow.errors import RuntimeFailure

        try:
            self._model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.ALL)
        except Exception as error:  # coremltools passes Objective-C failures on under several classes
            reason = checks.one_line(error)
            raise RuntimeFailure(f"runtime coreml: {path}: could not be loaded: {reason}") from error
        self.inputs = [value.name for value in self._model.get_spec().description.input]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        from edgeflow.errors import RuntimeFailure

        try:
            return self._model.predict(dict(inputs))
        except RuntimeError as error:
            raise RuntimeFailure(f"runtime coreml: run failed: {checks.one_line(error)}") from error
