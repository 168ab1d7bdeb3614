"""ONNX Runtime: CPU, or CUDA where onnxruntime-gpu finds a GPU."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import onnxruntime as ort
from numpy.typing import NDArray

from edgeflow.bundle import inside
from edgeflow.errors import RuntimeFailure
from edgeflow.quantization.recipe import rounds_activations
from edgeflow.runtimes import checks
from edgeflow.spec import GraphSpec

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle

log = logging.getLogger(__name__)
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
#: TF32 would round a float32 graph's factors to 10 bits, and parity would measure that, not the export.
_OPTIONS = {CUDA: {"use_tf32": "0"}}
_ERRORS_ONLY = 3


class OnnxRuntime:
    """Runs an ONNX bundle. ``providers`` says what each session in fact runs on, by graph."""

    name: ClassVar[str] = "onnx"

    def __init__(self, graphs: Mapping[str, GraphSpec], sessions: Mapping[str, ort.InferenceSession]):
        self._graphs = dict(graphs)
        self._sessions = dict(sessions)
        self.providers = {name: tuple(session.get_providers()) for name, session in sessions.items()}

    @classmethod
    def load(cls, bundle: Bundle, providers: Sequence[str] | None = None) -> OnnxRuntime:
        """Open every graph of the bundle from its path (weights may lie in a file beside it).

        ``providers`` are ONNX Runtime's names, best first; by default CUDA when this onnxruntime has it, then
        CPU. Raises RuntimeFailure for a bundle of another backend, a graph that ONNX Runtime refuses, or a
        provider that was asked for by name and is not in use.
        """
        checks.expect_bundle(cls.name, bundle)
        wanted = list(providers) if providers else _default_providers()
        graphs = {graph.name: graph for graph in bundle.manifest.graphs}
        sessions = {name: _session(bundle, graph, wanted) for name, graph in graphs.items()}
        runtime = cls(graphs, sessions)
        runtime._expect_providers(wanted, explicit=bool(providers))
        return runtime

    @classmethod
    def load_one(cls, bundle: Bundle, graph: str) -> OnnxRuntime:
        """Open one graph, on the CPU, for the least memory; raises what ``load`` raises.

        Weights in a file beside the graph stay mapped from it, and none is laid out anew or cast beforehand.
        """
        checks.expect_bundle(cls.name, bundle)
        spec = bundle.graph(graph)
        return cls({graph: spec}, {graph: _session(bundle, spec, [CPU], frugal=True)})

    def _expect_providers(self, wanted: Sequence[str], explicit: bool) -> None:
        """ONNX Runtime goes on without a provider that fails to start; here that is said, or refused."""
        for name, used in self.providers.items():
            absent = [p for p in wanted if p not in used]
            if absent and explicit:
                raise RuntimeFailure(
                    f"runtime onnx: graph {name}: expected {absent[0]}, got {', '.join(used)}"
                )
            if absent:
                log.warning(
                    "runtime onnx: graph %s: %s did not start; using %s", name, absent[0], ", ".join(used)
                )

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see ``edgeflow.spec.GraphSpec`` for the names and shapes."""
        spec = checks.pick_graph(self._graphs, graph)
        keys = [t.key for t in spec.outputs]
        feeds = checks.feed(spec, inputs)
        try:
            arrays = self._sessions[graph].run(keys, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise RuntimeFailure(
                f"runtime onnx: graph {graph}: run failed: {checks.one_line(error)}"
            ) from error
        return checks.collect(self.name, spec, dict(zip(keys, arrays, strict=True)))


def _default_providers() -> list[str]:
    available = ort.get_available_providers()
    if CUDA in available:
        # Finds CUDA and cuDNN where pip put them. It prints what it misses; stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    return [p for p in (CUDA, CPU) if p in available]


def _session(
    bundle: Bundle, graph: GraphSpec, providers: Sequence[str], *, frugal: bool = False
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = checks.num_threads()
    options.inter_op_num_threads = 1  # the graphs are chains; running branches side by side gains nothing
    options.log_severity_level = _ERRORS_ONLY
    # By default a quantized weight's product rounds its activations to int8 as well; 1 keeps them float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if rounds_activations(bundle.manifest.recipe):
        # Integer kernels add products in 16 bits on CPUs without VNNI, which overflow; in float nothing does.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    disabled = []
    if frugal:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        disabled = ["ConstantFolding"]  # it would turn every float16 or integer weight into float32 at once
    path = inside(bundle.root, graph.file)
    try:
        session = ort.InferenceSession(
            str(path),
            options,
            providers=[(p, _OPTIONS.get(p, {})) for p in providers],
            disabled_optimizers=disabled,
        )
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise RuntimeFailure(
            f"runtime onnx: {path}: could not be loaded: {checks.one_line(error)}"
        ) from error
    session.disable_fallback()  # a failing run is an error, not a silent retry on another provider
    inputs, outputs = session.get_inputs(), session.get_outputs()
    checks.expect_keys(OnnxRuntime.name, graph, (t.name for t in inputs), (t.name for t in outputs))
    return session
