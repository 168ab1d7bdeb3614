"""OpenVINO on the CPU, in float32 arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeflow.bundle import inside
from edgeflow.errors import RuntimeFailure
from edgeflow.fusions import KINDS, Operations
from edgeflow.quantization.recipe import rounds_activations
from edgeflow.runtimes import checks
from edgeflow.runtimes.pieces import LARGEST
from edgeflow.spec import GraphSpec
from edgeflow.telemetry import no_telemetry

with no_telemetry():
    import openvino as ov

    from edgeflow.runtimes.openvino_pieces import Pieces
    from edgeflow.runtimes.openvino_winograd import Room, use_winograd

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle


#: What holds or hands over values and computes nothing.
_PASSIVE = ("Constant", "Const", "Parameter", "Input", "Result", "Output")


class OpenVinoRuntime:
    """Runs an OpenVINO bundle; an fp16 bundle's weights are halves, its arithmetic is float32 all the same.

    Nothing is reported over the network: see edgeflow.telemetry.
    """

    name: ClassVar[str] = "openvino"

    def __init__(self, graphs: Mapping[str, GraphSpec], compiled: Mapping[str, ov.CompiledModel]):
        self._graphs = dict(graphs)
        self._requests = {name: model.create_infer_request() for name, model in compiled.items()}

    @classmethod
    def load(cls, bundle: Bundle) -> OpenVinoRuntime:
        """Compile every graph of the bundle. Raises RuntimeFailure for a graph that OpenVINO refuses."""
        checks.expect_bundle(cls.name, bundle)
        core = ov.Core()
        graphs = {graph.name: graph for graph in bundle.manifest.graphs}
        return cls(graphs, {name: _compile(core, bundle, graph) for name, graph in graphs.items()})

    @classmethod
    def load_one(cls, bundle: Bundle, graph: str) -> OpenVinoPieces:
        """One graph for the least memory, compiled a piece at a time whenever it runs.

        Raises RuntimeFailure as ``load`` does; for a graph that OpenVINO refuses, when it runs.
        """
        checks.expect_bundle(cls.name, bundle)
        return OpenVinoPieces(bundle, bundle.graph(graph))

    @classmethod
    def operations(cls, bundle: Bundle, graph: str) -> Operations:
        """What the compiled program runs; fused are those that stand for two stored operations or more, and
        convolutions in Winograd's form."""
        checks.expect_bundle(cls.name, bundle)
        core, spec = ov.Core(), bundle.graph(graph)
        model = core.read_model(str(inside(bundle.root, spec.file)))
        stored = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
        run: Counter[str] = Counter()
        fused: Counter[str] = Counter({"Winograd": _rewrite(model, bundle, Room())})
        whole: Counter[str] = Counter()  # stored operation → how many of what runs it is part of
        for node in _compile(core, bundle, spec).get_runtime_model().get_ordered_ops():
            facts = node.get_rt_info()
            kind, names = (str(facts[key].astype(str)) for key in ("layerType", "originalLayersNames"))
            run[kind] += kind not in _PASSIVE
            known = [name for name in names.split(",") if stored.get(name, "Constant") not in _PASSIVE]
            fused[kind] += len(known) > 1
            whole.update(known)
        ones = Counter(stored[name] for name, parts in whole.items() if parts == 1)
        kinds = {kind: sum(ones[name] for name in names) for kind, names in KINDS.items()}
        count = sum(kind not in _PASSIVE for kind in stored.values())
        return Operations(count, run.total(), kinds, {name: n for name, n in fused.most_common() if n})

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see ``edgeflow.spec.GraphSpec`` for the names and shapes."""
        spec = checks.pick_graph(self._graphs, graph)
        request = self._requests[graph]
        feeds = checks.feed(spec, inputs)
        try:
            request.infer(feeds, share_inputs=True)
            # A copy: the request's own buffers are overwritten by its next run.
            results = {t.key: np.array(request.get_tensor(t.key).data) for t in spec.outputs}
        except RuntimeError as error:
            raise RuntimeFailure(f"runtime openvino: graph {graph}: run failed: {_reason(error)}") from error
        return checks.collect(self.name, spec, results)


class OpenVinoPieces:
    """One graph in pieces (edgeflow.runtimes.openvino_pieces); no weights are held between two runs."""

    name: ClassVar[str] = OpenVinoRuntime.name

    def __init__(self, bundle: Bundle, graph: GraphSpec, largest: int = LARGEST):
        core, config, path = ov.Core(), _config(bundle), inside(bundle.root, graph.file)
        self._graph = graph
        try:
            self.pieces = Pieces(path, lambda model: core.compile_model(model, "CPU", config), largest)
        except RuntimeError as error:
            raise _unreadable(path, error) from error
        checks.expect_keys(self.name, graph, self.pieces.inputs, self.pieces.outputs)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see ``edgeflow.spec.GraphSpec`` for the names and shapes."""
        spec = checks.pick_graph({self._graph.name: self._graph}, graph)
        feeds = checks.feed(spec, inputs)
        try:
            results = self.pieces.run(feeds)
        except RuntimeError as error:
            raise RuntimeFailure(f"runtime openvino: graph {graph}: run failed: {_reason(error)}") from error
        return checks.collect(self.name, spec, results)


def _config(bundle: Bundle) -> dict[str, Any]:
    """The CPU's properties for every graph of a bundle."""
    config = {
        # Some CPUs run bfloat16 by default, which parity would report as an export's fault.
        "INFERENCE_PRECISION_HINT": "f32",
        # Quantized weights would have activations rounded to int8 as well; 0 keeps them float32.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": checks.num_threads(),
    }
    if rounds_activations(bundle.manifest.recipe):
        # Integer kernels add products in 16 bits on CPUs without VNNI, which overflow; in float nothing does.
        config["LP_TRANSFORMS_MODE"] = "NO"
    return config


def _compile(
    core: ov.Core,
    bundle: Bundle,
    graph: GraphSpec,
    more: Mapping[str, Any] | None = None,
    *,
    as_stored: bool = False,
) -> ov.CompiledModel:
    """``more`` has the last word on the properties, and ``as_stored`` leaves convolutions as they are
    (edgeflow.training.session_options measures others)."""
    path = inside(bundle.root, graph.file)
    try:
        stored, room = core.read_model(str(path)), Room()
        if not as_stored:
            _rewrite(stored, bundle, room)
        model = core.compile_model(stored, "CPU", {**_config(bundle), **(more or {})})
        room.leave()
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    inputs, outputs = (
        [name for port in ports for name in port.get_names()] for ports in (model.inputs, model.outputs)
    )
    checks.expect_keys(OpenVinoRuntime.name, graph, inputs, outputs)
    return model


def _rewrite(model: ov.Model, bundle: Bundle, room: Room) -> int:
    """Winograd's convolutions, how many: in fp16 bundles, as an fp32 one is for values near to PyTorch's."""
    return use_winograd(model, room) if bundle.manifest.precision == "fp16" else 0


def _unreadable(path: Path, error: RuntimeError) -> RuntimeFailure:
    return RuntimeFailure(f"runtime openvino: {path}: could not be loaded: {_reason(error)}")


def _reason(error: RuntimeError) -> str:
    """OpenVINO's messages begin with the place in its source; the reason is the last line that is not one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (said[-1] if said else checks.one_line(error)).rstrip(".")
