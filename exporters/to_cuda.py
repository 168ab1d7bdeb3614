"""Lower a program to code for one GPU, compiled ahead of time by AOTInductor, its weights beside it.

What is compiled is the component's module rewritten for the GPU, in half precision (edgeflow.gpu_rewrites,
edgeflow.gpu_precision), with the attention kernels that were fastest where it was compiled. The code runs on
that compute capability and that version of torch alone; the runtime checks both.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeflow import aot_package, gpu_device, gpu_precision, gpu_rewrites, worker
from edgeflow.errors import DeviceMissing, ExportError
from edgeflow.exporters.layouts import DIFFUSERS, graph_spec
from edgeflow.exporters.program import Program
from edgeflow.gpu_precision import DTYPES
from edgeflow.spec import GraphSpec


class CudaExporter:
    """``<folder>/model.pt2`` and ``weights.safetensors``."""

    backend: ClassVar[str] = "cuda"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")
    tools: ClassVar[tuple[str, ...]] = ("triton", "safetensors")

    def __init__(self, device: str = "cuda"):
        """Raises DeviceMissing without a GPU or its toolkit. ``device`` cpu is for tests of the packaging."""
        self._device = device
        chip = None
        if device == "cuda":
            chip = gpu_device.require_chip()
            _require_toolkit()
        self._versions = chip.versions() if chip else {"device": device, "torch": gpu_device.torch_release()}

    def facts(self) -> dict[str, str]:
        """What the code depends on, for the manifest's versions."""
        return dict(self._versions)

    def lower(self, program: Program, folder: Path, *, precision: str, layout: str) -> GraphSpec:
        """See edgeflow.registry.Exporter. The same program gives the same function, not the same bytes."""
        spec = graph_spec(program.spec, layout, DIFFUSERS, f"/{aot_package.CODE}")
        if any(hasattr(m, "weight_q") for m in program.module.modules()):
            raise ExportError(
                f"export: cuda: {spec.name}: expected a float checkpoint; a quantized one's integers run "
                "from the checkpoint itself: edgeflow generate CHECKPOINT --runtime cuda"
            )
        inputs = [t.to(self._device) for t in program.example]
        module = self._module(program, inputs, precision)
        path = folder / spec.file
        path.parent.mkdir(parents=True)
        try:
            with torch.no_grad(), warnings.catch_warnings(), self._attention(module, inputs):
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, tuple(inputs))
                _compile(exported, path, spec)
        except Exception as error:  # a compiler raises whatever it meets
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(f"export: cuda: {spec.name}: {reason}") from error
        constants = {**exported.state_dict, **exported.constants}
        aot_package.write_weights(path.with_name(aot_package.WEIGHTS), _asked_for(path, constants, spec))
        return spec

    def _module(self, program: Program, inputs: list[Tensor], precision: str) -> nn.Module:
        """The module that is compiled, on the device; its decoder's tail is found in float32 first."""
        module, _ = gpu_rewrites.rewritten(program.module)
        tail = None
        if precision == "fp16" and gpu_precision.decoder_of(module) is not None:
            plain = gpu_precision.assembled(program.module, torch.float32, self._device)
            tail = gpu_precision.find_tail(gpu_precision.decoder_of(plain), lambda: plain(*inputs))
        return gpu_precision.assembled(module, DTYPES[precision], self._device, tail)

    def _attention(self, module: nn.Module, inputs: list[Tensor]) -> Any:
        if self._device != "cuda":
            return contextlib.nullcontext()
        shapes = gpu_device.attention_shapes(module, inputs)
        dtype = next(p.dtype for p in module.parameters())
        name = gpu_device.choose_attention(shapes, dtype)[0] if shapes else None
        return gpu_device.attention_order(name)


def _compile(exported: Any, path: Path, spec: GraphSpec) -> None:
    """The package without its constants, and the names that its tensors have in the manifest."""
    names = {
        "inputs": " ".join(t.key for t in spec.inputs),
        "outputs": " ".join(t.key for t in spec.outputs),
    }
    configs = {"aot_inductor.package_constants_in_so": False, "aot_inductor.metadata": names}
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
    path.chmod(0o644)


def _asked_for(path: Path, constants: dict[str, Any], spec: GraphSpec) -> dict[str, Tensor]:
    """The constants that the code asks for. Raises ExportError where one is not the program's, RuntimeFailure
    for code that cannot be loaded: tried in a process of its own, as it may take that process with it."""
    what = f"export: cuda: {spec.name}: loading the compiled code"
    wanted = worker.call(what, "edgeflow.aot_package:constants_of", str(path))
    missing = sorted(set(wanted) - set(constants))
    if missing:
        raise ExportError(
            f"export: cuda: {spec.name}: the code asks for {missing[0]}, which the program has not"
        )
    return {name: constants[name].detach() for name in wanted}


def _require_toolkit() -> None:
    """AOTInductor compiles C++ against CUDA's headers. Raises DeviceMissing where torch finds none."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        raise DeviceMissing(
            "export: cuda: expected the CUDA toolkit, whose headers the compiler needs, found none; "
            "install it, or set CUDA_HOME to where it is"
        )
