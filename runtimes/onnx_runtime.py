"""ONNX Runtime: CPU, or CUDA where onnxruntime-gpu finds a GPU."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgeflow.bundle import inside
from edgeflow.errors import DeviceMissing, RuntimeFailure
from edgeflow.fusions import Operations, composite, kinds_of
from edgeflow.quantization.recipe import rounds_activations
from edgeflow.runtimes import checks
from edgeflow.runtimes.onnx_file import node_types, read_graph
from edgeflow.runtimes.onnx_pieces import Pieces, float32_bytes
from edgeflow.runtimes.pieces import LARGEST
from edgeflow.spec import PIPELINE, GraphSpec

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle, Manifest

log = logging.getLogger(__name__)
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
#: What CUDA is told for a graph of float32, whose factors TF32 would round to 10 bits: parity would measure
#: that, not the export. Without TF32 ONNX Runtime asks cuDNN for convolutions without tensor cores, and where
#: its heuristics offer none, takes one with them and says nothing; the search DEFAULT always offers one.
_FLOAT32 = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
#: And for every other: to leave TF32 out would take tensor cores from float16's convolutions too, for ten
#: times the time (docs/cuda.md); what stays float32 in such a graph does so for its range, not its digits.
_HALF = {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC"}
#: Convolutions over channels-last memory: a tenth faster where their weights are stored as they are. ONNX
#: Runtime does not turn weights that it computes first, from integers, and then refuses them as misshapen.
_NHWC = {"prefer_nhwc": "1"}
#: What a session needs besides to be captured as one CUDA graph: inputs and outputs at fixed addresses (IO
#: binding) and one stream.
_CAPTURE = {"enable_cuda_graph": "1", "do_copy_in_default_stream": "1"}
_ERRORS_ONLY = 3
#: A graph of integer weights up to so many bytes is opened with float ones, which take four to eight times as
#: much memory: ONNX Runtime's CPU has no convolution of integers and floats, so it would make floats of the
#: same weights for every picture again.
FOLDED_BYTES = 128 * 2**20
#: Types that optimizing a graph makes of several stored operations.
_FUSED = ("nchwc:Conv", "FusedConv", "FusedMatMul", "FusedGemm", "nchwc:Upsample")


class OnnxRuntime:
    """Runs an ONNX bundle. ``providers`` says what each session in fact runs on, by graph; ``device`` is
    "cuda" where one of them runs on it."""

    name: ClassVar[str] = "onnx"

    def __init__(
        self,
        graphs: Mapping[str, GraphSpec],
        sessions: Mapping[str, ort.InferenceSession],
        bound_to: str | None = None,
    ):
        """``bound_to``: the device whose memory inputs and outputs are bound in, or None for no binding."""
        self._graphs = dict(graphs)
        self._bound = {
            name: _Bound(session, graphs[name], bound_to) for name, session in sessions.items() if bound_to
        }
        self._sessions = dict(sessions)
        self.providers = {name: tuple(session.get_providers()) for name, session in sessions.items()}
        self.device = "cuda" if any(used[0] == CUDA for used in self.providers.values()) else "cpu"

    @classmethod
    def load(
        cls, bundle: Bundle, providers: Sequence[str] | None = None, *, capture: bool = False
    ) -> OnnxRuntime:
        """Open every graph of the bundle from its path (weights may lie in a file beside it).

        ``providers`` are ONNX Runtime's names, best first; by default CUDA when this onnxruntime has it, then
        CPU. ``capture`` binds inputs and outputs on the GPU and replays each graph as one CUDA graph.
        Raises RuntimeFailure for a bundle of another backend, a graph that ONNX Runtime refuses, or a
        provider that was asked for by name and is not in use.
        """
        checks.expect_bundle("onnx", bundle)
        wanted = list(providers) if providers else _default_providers()
        graphs = {graph.name: graph for graph in bundle.manifest.graphs}
        sessions = {name: _session(bundle, graph, wanted, capture=capture) for name, graph in graphs.items()}
        runtime = cls(graphs, sessions, "cuda" if capture else None)
        runtime._expect_providers(wanted, explicit=bool(providers))
        return runtime

    @classmethod
    def load_one(cls, bundle: Bundle, graph: str) -> OnnxRuntime | OnnxPieces:
        """One graph, on the CPU, for the least memory: a large one in pieces whenever it runs.

        Raises RuntimeFailure as ``load`` does; for a piece that ONNX Runtime refuses, when it runs.
        """
        checks.expect_bundle("onnx", bundle)
        spec = bundle.graph(graph)
        path = inside(bundle.root, spec.file)
        try:
            is_large = float32_bytes(read_graph(path)) > LARGEST
        except ValueError as error:
            raise _unreadable(path, error) from error
        if is_large:
            return OnnxPieces(bundle, spec)
        return cls({graph: spec}, {graph: _session(bundle, spec, [CPU], capture=False, frugal=True)})

    @classmethod
    def operations(cls, bundle: Bundle, graph: str) -> Operations:
        """What a session on the CPU makes of one graph; raises what ``load`` raises."""
        checks.expect_bundle("onnx", bundle)
        spec = bundle.graph(graph)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            _session(bundle, spec, [CPU], capture=False, written=path)
            stored, run = _types(inside(bundle.root, spec.file)), _types(path)
        # What ONNX Runtime has made is not in the standard; Reorder changes a layout and stands for nothing.
        made = {name: n for name, n in run.most_common() if name not in stored and name in _FUSED}
        return Operations(stored.total(), run.total(), kinds_of(run), composite(run) | made)

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
            bound = self._bound.get(graph)
            arrays = self._sessions[graph].run(keys, feeds) if bound is None else bound.run(feeds)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise _failed(graph, error) from error
        return checks.collect(self.name, spec, dict(zip(keys, arrays, strict=True)))


class OnnxCuda(OnnxRuntime):
    """The same on CUDA alone, each graph captured: a session that cannot be is an error."""

    name: ClassVar[str] = "onnx-cuda"

    @classmethod
    def load(
        cls, bundle: Bundle, providers: Sequence[str] | None = None, *, capture: bool = True
    ) -> OnnxRuntime:
        """Raises DeviceMissing where this onnxruntime has no CUDA, RuntimeFailure as OnnxRuntime's."""
        if CUDA not in _default_providers():
            raise DeviceMissing(
                f"runtime {cls.name}: expected {CUDA}, this onnxruntime has "
                f"{', '.join(ort.get_available_providers())}; install it with: pip install 'edgeflow[cuda]'"
            )
        return super().load(bundle, (CUDA,), capture=capture)


class OnnxPieces:
    """One graph in pieces (edgeflow.runtimes.onnx_pieces); no weights are held between two runs."""

    name: ClassVar[str] = OnnxRuntime.name

    def __init__(self, bundle: Bundle, graph: GraphSpec, largest: int = LARGEST):
        """Raises RuntimeFailure for a file that is not ONNX's, or whose graph cannot be cut."""
        self._graph, path = graph, inside(bundle.root, graph.file)
        options = _options(bundle, path, [CPU], frugal=True)
        # A model that comes as bytes has no folder beside which its weights would be looked for.
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(path.parent.resolve()))
        try:
            stored = read_graph(path)
            self.pieces = Pieces(path, stored, lambda model: _open(model, options), largest)
        except ValueError as error:
            raise _unreadable(path, error) from error
        checks.expect_keys(self.name, graph, stored.inputs, stored.outputs)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see ``edgeflow.spec.GraphSpec`` for the names and shapes."""
        spec = checks.pick_graph({self._graph.name: self._graph}, graph)
        feeds = checks.feed(spec, inputs)
        try:
            results = self.pieces.run(feeds)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise _failed(graph, error) from error
        return checks.collect(self.name, spec, results)


class _Bound:
    """A session whose inputs and outputs keep their places in a device's memory."""

    def __init__(self, session: ort.InferenceSession, graph: GraphSpec, device: str):
        self._session, self._binding = session, session.io_binding()
        make = ort.OrtValue.ortvalue_from_shape_and_type
        self._inputs = {t.key: make(list(t.shape), np.dtype(t.dtype), device, 0) for t in graph.inputs}
        self._outputs = {t.key: make(list(t.shape), np.dtype(t.dtype), device, 0) for t in graph.outputs}
        for key, value in self._inputs.items():
            self._binding.bind_ortvalue_input(key, value)
        for key, value in self._outputs.items():
            self._binding.bind_ortvalue_output(key, value)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Arrays by key → outputs in the graph's order; copies, which no later run overwrites."""
        for key, array in feeds.items():
            self._inputs[key].update_inplace(array)
        self._session.run_with_iobinding(self._binding)
        return [value.numpy().copy() for value in self._outputs.values()]


def _is_small(path: Path) -> bool:
    """Whether the graph may have its weights in float; they lie in it, or beside it in its folder."""
    return sum(file.stat().st_size for file in path.parent.iterdir()) <= FOLDED_BYTES


def _types(path: Path) -> Counter[str]:
    """Type → how many; of convolutions in blocks of channels ``nchwc:Conv``. Weights are not read."""
    nodes = node_types(path)
    return Counter(f"nchwc:{name}" if domain.endswith("nchwc") else name for domain, name in nodes)


def provider_options(provider: str, manifest: Manifest, capture: bool) -> dict[str, str]:
    """What a session over a graph of such a bundle is told about a provider."""
    if provider != CUDA:
        return {}
    options = _FLOAT32 if manifest.precision == "fp32" else _HALF
    nhwc = _NHWC if options is _HALF and manifest.recipe is None else {}
    return options | nhwc | (_CAPTURE if capture else {})


def _default_providers() -> list[str]:
    available = ort.get_available_providers()
    if CUDA in available:
        # Finds CUDA and cuDNN where pip put them. It prints what it misses; stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
        ort.set_default_logger_severity(_ERRORS_ONLY)  # CUDA logs beside its sessions, a line a convolution
    return [p for p in (CUDA, CPU) if p in available]


def _session(
    bundle: Bundle,
    graph: GraphSpec,
    providers: Sequence[str],
    *,
    capture: bool,
    frugal: bool = False,
    written: Path | None = None,
    adjust: Callable[[ort.SessionOptions], None] | None = None,
) -> ort.InferenceSession:
    """``written``: where to write the optimized graph, its weights beside it. ``adjust`` has the last word on
    the options, for measuring others (edgeflow.training.session_options)."""
    path = inside(bundle.root, graph.file)
    options = _options(bundle, path, providers, frugal=frugal)
    if written is not None:
        options.optimized_model_filepath = str(written)
        entry = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{entry}file_name", f"{written.name}.data")
        options.add_session_config_entry(f"{entry}min_size_in_bytes", "64")
    if adjust is not None:
        adjust(options)
    try:
        told = [(p, provider_options(p, bundle.manifest, capture)) for p in providers]
        session = _open(str(path), options, told)
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise _unreadable(path, error) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    checks.expect_keys(OnnxRuntime.name, graph, (t.name for t in inputs), (t.name for t in outputs))
    return session


def _options(bundle: Bundle, path: Path, providers: Sequence[str], *, frugal: bool) -> ort.SessionOptions:
    """What a session over the graph at ``path`` is told; ``frugal`` is for the least memory."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = checks.num_threads()
    options.inter_op_num_threads = 1  # the graphs are chains; running branches side by side gains nothing
    options.log_severity_level = _ERRORS_ONLY
    # By default a quantized weight's product rounds its activations to int8 as well; 1 keeps them float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if bundle.manifest.layout != PIPELINE:
        # A session's threads look for more work on the cores that the next graph's session now needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    folded = bundle.manifest.recipe is not None and tuple(providers) == (CPU,) and not frugal
    if rounds_activations(bundle.manifest.recipe) or (folded and _is_small(path)):
        # Integer kernels add products in 16 bits on CPUs without VNNI, which overflow; in float nothing does.
        # And so DequantizeLinear of a constant is folded into the float weight as the session opens.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.enable_cpu_mem_arena = not frugal  # an arena keeps all that a session has ever computed with
    return options


def _open(
    model: str | bytes,
    options: ort.SessionOptions,
    providers: Sequence[tuple[str, dict[str, str]]] = ((CPU, {}),),
) -> ort.InferenceSession:
    """``model``: a path, or a model's bytes. Raises what ONNX Runtime raises."""
    session = ort.InferenceSession(model, options, providers=list(providers))
    session.disable_fallback()  # a failing run is an error, not a silent retry on another provider
    return session


def _unreadable(path: Path, error: Exception) -> RuntimeFailure:
    return RuntimeFailure(f"runtime onnx: {path}: could not be loaded: {checks.one_line(error)}")


def _failed(graph: str, error: Exception) -> RuntimeFailure:
    return RuntimeFailure(f"runtime onnx: graph {graph}: run failed: {checks.one_line(error)}")
