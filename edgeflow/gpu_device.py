"""The NVIDIA GPU of this machine: what it is, what it can, and which attention kernel is fastest on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from edgeflow.errors import DeviceMissing, RuntimeFailure

#: Ampere: the first with bfloat16 in its matrix units and asynchronous copies.
OLDEST = (8, 0)
#: Ada and Hopper: the first with float8 in their matrix units.
FP8 = (8, 9)
_LAST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
#: Orders in which attention kernels are tried, by the name of the first.
ATTENTION = {
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_LAST),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_LAST),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}


@dataclass(frozen=True)
class Chip:
    """One GPU and the torch that drives it."""

    name: str
    capability: tuple[int, int]
    torch: str  # the release, without the build's suffix
    cuda: str
    cudnn: str

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FP8

    def versions(self) -> dict[str, str]:
        """What compiled code depends on, as a bundle records it."""
        return {
            "device": "cuda",
            "compute capability": "{}.{}".format(*self.capability),
            "torch": self.torch,
            "cuda": self.cuda,
        }


def torch_release() -> str:
    """torch's version without the build's suffix: 2.13.0 of 2.13.0+cu130."""
    return torch.__version__.partition("+")[0]


def require_chip() -> Chip:
    """The current CUDA device. Raises DeviceMissing without one, RuntimeFailure for one before Ampere."""
    if not torch.cuda.is_available():
        why = "built without CUDA" if torch.version.cuda is None else "no driver or no device answers"
        raise DeviceMissing(
            f"cuda: expected an NVIDIA GPU that torch {torch.__version__} can use, got none ({why}); "
            "draw on the CPU with the runtimes torch, onnx or openvino"
        )
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    check_capability(name, capability)
    cudnn = str(torch.backends.cudnn.version())
    return Chip(name, capability, torch_release(), str(torch.version.cuda), cudnn)


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """Raises RuntimeFailure for a chip that is older than ``OLDEST``."""
    if capability < OLDEST:
        raise RuntimeFailure(
            f"cuda: {name}: expected compute capability {OLDEST[0]}.{OLDEST[1]} (Ampere) or later, "
            f"got {capability[0]}.{capability[1]}"
        )


@dataclass(frozen=True)
class AttentionShape:
    """One call: (batch, heads, queries, width), the number of keys, whether it has a mask or is causal."""

    query: tuple[int, ...]
    keys: int
    masked: bool
    causal: bool = False


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[AttentionShape] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = kwargs or {}
            masked = given.get("attn_mask") is not None or len(args) > 3
            causal = given.get("is_causal", False)
            self.shapes.append(AttentionShape(tuple(args[0].shape), args[1].shape[-2], masked, causal))
        return func(*args, **(kwargs or {}))


def attention_shapes(module: nn.Module, inputs: Sequence[Tensor]) -> list[AttentionShape]:
    """Every attention of one forward pass, in order."""
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        module(*inputs)
    return recorder.shapes


def choose_attention(
    shapes: Sequence[AttentionShape], dtype: torch.dtype, time_ms: Callable[..., float] | None = None
) -> tuple[str, dict[str, float]]:
    """The order of ``ATTENTION`` that is fastest over ``shapes`` on this GPU, and each one's milliseconds.

    A kernel that does not take a shape leaves it to the next in the order. ``time_ms(order, shape, dtype)``
    replaces the clock.
    """
    clock = time_ms or _time_ms
    unique = {shape: shapes.count(shape) for shape in dict.fromkeys(shapes)}
    total = {
        name: sum(count * clock(order, shape, dtype) for shape, count in unique.items())
        for name, order in ATTENTION.items()
    }
    return min(total, key=lambda name: total[name]), total


def _time_ms(
    order: Sequence[SDPBackend], shape: AttentionShape, dtype: torch.dtype, calls: int = 10
) -> float:
    """Milliseconds of one call, from a captured graph of ``calls``, so that no launch is timed."""
    batch, heads, _, width = shape.query
    q = torch.randn(shape.query, device="cuda", dtype=dtype)
    k, v = torch.randn(2, batch, heads, shape.keys, width, device="cuda", dtype=dtype)
    mask = torch.zeros(1, 1, shape.query[2], shape.keys, device="cuda", dtype=dtype) if shape.masked else None
    attend = functools.partial(F.scaled_dot_product_attention, q, k, v, mask, is_causal=shape.causal)
    with torch.no_grad(), sdpa_kernel(list(order), set_priority=True):
        attend()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                attend()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def attention_order(name: str | None) -> Any:
    """A context in which attention tries the kernels in the order called ``name``; None is torch's own."""
    import contextlib

    return contextlib.nullcontext() if name is None else sdpa_kernel(list(ATTENTION[name]), set_priority=True)
