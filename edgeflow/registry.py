"""The two seams and who stands behind them: name → "module:Class", resolved on first use.

An *exporter* lowers a program into a folder; a *runtime* loads a bundle and maps named arrays to named
arrays. Packages outside add theirs through the entry-point groups ``edgeflow.exporters`` and
``edgeflow.runtimes``; a built-in name cannot be taken over.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edgeflow.errors import BackendMissing, EdgeflowError, UnknownNameError
from edgeflow.spec import GraphSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeflow.bundle import Bundle
    from edgeflow.exporters.program import Program

EXPORTERS = {
    "onnx": "edgeflow.exporters.to_onnx:OnnxExporter",
    "openvino": "edgeflow.exporters.to_openvino:OpenVinoExporter",
    "coreml": "edgeflow.exporters.to_coreml:CoreMLExporter",
    "cuda": "edgeflow.exporters.to_cuda:CudaExporter",
}
RUNTIMES = {
    "torch": "edgeflow.runtimes.torch_reference:TorchReference",
    "onnx": "edgeflow.runtimes.onnx_runtime:OnnxRuntime",
    "onnx-cuda": "edgeflow.runtimes.onnx_runtime:OnnxCuda",
    "openvino": "edgeflow.runtimes.openvino_runtime:OpenVinoRuntime",
    "coreml": "edgeflow.runtimes.coreml_runtime:CoreMLRuntime",
    "cuda": "edgeflow.runtimes.cuda_reference:CudaReference",
    "cuda-bf16": "edgeflow.runtimes.cuda_reference:CudaBfloat16",
}
#: The package whose absence means "this backend is not installed", and the extra that brings it.
REQUIRES = {
    "torch": ("torch", "export"),
    "onnx": ("onnxruntime", "onnx"),
    "onnx-cuda": ("onnxruntime", "cuda"),
    "openvino": ("openvino", "openvino"),
    "coreml": ("coremltools", "coreml"),
    "cuda": ("torch", "cuda"),
    "cuda-bf16": ("torch", "cuda"),
}


class Exporter(Protocol):
    """Lowers one program into a folder.

    One whose clients need more than graphs has ``check(layout)``, which raises BackendMissing before any work
    starts, and ``finish(folder, layout)``, which adds it to a bundle that has its graphs and tokenizer.
    """

    backend: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]

    def lower(self, program: Program, folder: Path, *, precision: str, layout: str) -> GraphSpec:
        """Write the artifact under ``folder`` and say what was written (file relative to ``folder``).

        ``layout`` is "pipeline" or "components"; the latter takes the ecosystem's own file and tensor names.
        Equal inputs give equal bytes. Raises ExportError naming what the backend cannot take.
        """


class Runtime(Protocol):
    """Loads a bundle once and runs its graphs many times.

    One that computes on a GPU has an attribute ``device`` of "cuda".
    """

    name: ClassVar[str]

    @classmethod
    def load(cls, bundle: Bundle) -> Runtime:
        """Load every graph of the bundle. Raises RuntimeFailure when the backend refuses an artifact."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays (edgeflow's names, cast to the artifact's dtypes) to named arrays.

        Raises ValueError for an unknown graph, a missing or an unknown input, or a wrong shape.
        """


def exporter(name: str, **settings: Any) -> Exporter:
    """The exporter called ``name``, made with its own settings (edgeflow.apple has Core ML's).

    Raises UnknownNameError, or BackendMissing with the pip line.
    """
    return _resolve("exporter", name, EXPORTERS, "export")(**settings)


def runtime(name: str) -> type[Runtime]:
    """The runtime class called ``name``. Raises UnknownNameError, or BackendMissing with the pip line."""
    return _resolve("runtime", name, RUNTIMES, REQUIRES.get(name, ("", name))[1])


def preload(name: str) -> None:
    """Import the runtime called ``name``, if it can be: ``runtime`` says later why it could not."""
    with contextlib.suppress(EdgeflowError):
        runtime(name)


def sampler() -> Any:
    """The class that draws many-step models, on torch. Raises BackendMissing with the pip line."""
    return _resolve("sampler", "torch", {"torch": "edgeflow.runtimes.torch_sampler:TorchSampler"}, "export")


def _resolve(kind: str, name: str, builtin: dict[str, str], extra: str) -> Any:
    known = builtin
    if (
        name not in builtin
    ):  # looking through every installed package takes time that a built-in need not spend
        from importlib.metadata import entry_points

        known = {**{e.name: e.value for e in entry_points(group=f"edgeflow.{kind}s")}, **builtin}
    if name not in known:
        raise UnknownNameError(kind, name, known)
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("edgeflow"):
            raise
        raise BackendMissing(error.name, extra) from error
