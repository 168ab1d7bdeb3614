"""Export-ready modules cast to half precision, and where a decoder has to leave float16.

float16 ends at 65504; some decoders' last stages pass it. Those stages alone compute in bfloat16, which has
float32's range: found by running the float32 decoder once (``find_tail``), not guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow.components import BytePipeline, Decoder, Pipeline

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: float16's largest number, less the room that other prompts than the probed ones are given.
SAFE = 65504 / 8


@dataclass(frozen=True)
class Tail:
    """Where a decoder leaves float16: its stages from ``start`` on compute in ``dtype``."""

    start: str | None  # the stage's name, None where float16 holds all
    largest: float  # the largest magnitude inside the decoder in float32
    dtype: torch.dtype = torch.bfloat16


def assembled(
    module: nn.Module, dtype: torch.dtype, device: torch.device | str, tail: Tail | None = None
) -> nn.Module:
    """A copy of ``module`` on ``device`` that computes in ``dtype``, channels-last; float32 in and out.

    In a pipeline the step x₁ = x₀ + v and the picture's rounding stay in float32. ``tail`` is where the
    decoder leaves ``dtype``. The original is left as it is; both share nothing.
    """
    wide = {} if tail is None else dict.fromkeys(_tail_tensors(decoder_of(module), tail), tail.dtype)
    # Scales of integers stay float32, which holds them exactly.
    wide |= {id(m.weight_scale): torch.float32 for m in module.modules() if hasattr(m, "weight_scale")}
    twin = _cast_copy(module, dtype, torch.device(device), wide)
    if tail is not None:
        _widen_tail(decoder_of(twin), tail)
    inner = twin.pipeline if isinstance(twin, BytePipeline) else twin
    if isinstance(inner, Pipeline):
        inner.unet = InDtype(inner.unet, dtype)
        inner.decoder = InDtype(inner.decoder, dtype)
        return twin
    return InDtype(twin, dtype)


class InDtype(nn.Module):
    """A module that computes in ``dtype`` in a graph of float32: its float inputs and outputs are cast."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, out: torch.dtype = torch.float32):
        super().__init__()
        self.module, self.dtype, self.out = module, dtype, out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(
            *(_cast(a, self.dtype) for a in args), **{k: _cast(v, self.dtype) for k, v in kwargs.items()}
        )
        return (
            tuple(_cast(r, self.out) for r in result)
            if isinstance(result, tuple)
            else _cast(result, self.out)
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast_copy(
    module: nn.Module, dtype: torch.dtype, device: torch.device, others: Mapping[int, torch.dtype]
) -> Any:
    """A deep copy whose tensors are made anew: Module.to would change the tensors that the original shares.

    ``others`` are the dtypes of tensors that do not get ``dtype``, by id.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        kept = others.get(id(tensor), dtype) if tensor.is_floating_point() else tensor.dtype
        moved = tensor.detach().to(device, kept, copy=True)
        if moved.dim() == 4:
            moved = moved.contiguous(memory_format=torch.channels_last)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return copy.deepcopy(module, memo)


def stages(decoder: Any) -> dict[str, nn.Module]:
    """The stages of diffusers' Decoder or DecoderTiny by name, in the order they run."""
    if hasattr(decoder, "layers"):
        return {f"layers.{name}": layer for name, layer in decoder.layers.named_children()}
    named: dict[str, nn.Module] = {"conv_in": decoder.conv_in, "mid_block": decoder.mid_block}
    named |= {f"up_blocks.{i}": block for i, block in enumerate(decoder.up_blocks)}
    return named | {"conv_norm_out": decoder.conv_norm_out, "conv_out": decoder.conv_out}


def decoder_of(module: nn.Module) -> Any:
    """The diffusers decoder inside a pipeline or a decoder component, or None where there is none."""
    return next((m.decoder for m in module.modules() if isinstance(m, Decoder)), None)


def find_tail(decoder: Any, run: Callable[[], object]) -> Tail:
    """Where float16 would overflow: the first stage with a layer whose output in float32 passes ``SAFE``.

    ``run`` calls the float32 model on real inputs.
    """
    largest = dict.fromkeys(stages(decoder), 0.0)

    def watch(stage: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                value = float(output.abs().max())
                largest[stage] = max(largest[stage], value) if value == value else float("inf")

        return hook

    hooks = [
        layer.register_forward_hook(watch(name))
        for name, stage in stages(decoder).items()
        for layer in stage.modules()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    start = next((name for name, value in largest.items() if value > SAFE), None)
    return Tail(start, max(largest.values()))


def _tail(decoder: Any, tail: Tail) -> list[tuple[str, nn.Module]]:
    """The stages from the tail's start on, by name."""
    named = list(stages(decoder).items())
    names = [name for name, _ in named]
    return [] if tail.start is None else named[names.index(tail.start) :]


def _tail_tensors(decoder: Any, tail: Tail) -> list[int]:
    return [id(t) for _, m in _tail(decoder, tail) for t in (*m.parameters(), *m.buffers())]


def _widen_tail(decoder: Any, tail: Tail) -> None:
    """Let the tail's stages, whose tensors are in its dtype, take their inputs in it, in place."""
    for name, stage in _tail(decoder, tail):
        parent, _, last = name.rpartition(".")
        owner: Any = decoder.get_submodule(parent)
        owner.register_module(last, InDtype(stage, tail.dtype, tail.dtype))
