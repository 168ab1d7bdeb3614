"""Nearest-neighbour upsampling by two and the 3×3 convolution behind it, as one step at the low resolution.

Each pixel was drawn four times, so of a 3×3 window there are only 2×2 different ones: which, depends on
whether the output's row and column are even or odd. The four cases ("phases") are four 2×2 convolutions of
the picture before upsampling, whose weights are sums of the 3×3 ones; their outputs are interleaved. 4/9 of
the multiplications, and the upsampled picture is never made. The same up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.sharing import placed_children, sharing_copy

#: [phase][tap of 2][tap of 3]: which rows (or columns) of the 3×3 kernel fall on the same source row.
_TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


class PhaseConv(nn.Module):
    """(N, C, h, w) → (N, O, 2h, 2w), as conv(interpolate(x, scale_factor=2, mode="nearest"))."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        weight = phase_kernels(conv.weight)
        self.weights = nn.ParameterList(
            nn.Parameter(weight[p, q].contiguous(), requires_grad=False) for p in (0, 1) for q in (0, 1)
        )
        self.bias = conv.bias

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        expect_twice(output_size)
        phases = []
        for weight, (p, q) in zip(self.weights, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            phases.append(F.conv2d(F.pad(x, (1 - q, q, 1 - p, p)), weight, self.bias))
        stacked = torch.stack(phases, 2)
        return F.pixel_shuffle(stacked.flatten(1, 2), 2)


def phase_kernels(weight: Tensor) -> Tensor:
    """A 3×3 kernel (O, C, 3, 3) as the 2×2 kernels (2, 2, O, C, 2, 2) of the four phases: even and odd rows,
    then columns. Sums are in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.tensor(_TAPS, dtype=dtype, device=weight.device)
    return torch.einsum("ptk,qsl,oikl->pqoits", taps, taps, weight.detach().to(dtype)).to(weight.dtype)


def expect_twice(output_size: Any) -> None:
    """What stands in an Upsample2D's place doubles the picture: raises ValueError for a size of its own."""
    if output_size is not None:
        raise ValueError("upsampling: expected twice the size, got another")


def merge_upsampling(module: nn.Module) -> Any:
    """A copy that shares the module's tensors, its upsamplings by two merged with the float 3×3
    convolutions behind them; quantized ones, and any of another form, stay as they are."""
    twin = sharing_copy(module)
    replace_upsamplers(twin, PhaseConv)
    return twin


def replace_upsamplers(module: nn.Module, make: Callable[[Any], nn.Module]) -> int:
    """Put ``make(conv)`` in the place of each of diffusers' Upsample2D that is nearest-neighbour by two and a
    float 3×3 convolution and nothing else; how many there were."""
    found = [
        (parent, name, child)
        for parent, name, child in placed_children(module)
        if type(child).__name__ == "Upsample2D" and _plain(child) and is_plain_3x3(child.conv)
    ]
    for parent, name, child in found:
        setattr(parent, name, make(child.conv))
    return len(found)


def is_plain_3x3(layer: Any) -> bool:
    """Whether it is a float 3×3 convolution of stride 1 that keeps the picture's size with zeros."""
    return type(layer) is nn.Conv2d and (
        (layer.kernel_size, layer.padding, layer.stride, layer.dilation, layer.groups, layer.padding_mode)
        == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    )


def _plain(upsampler: Any) -> bool:
    """Whether it is nearest-neighbour by two with a convolution behind it, and nothing else."""
    return bool(
        upsampler.use_conv
        and not upsampler.use_conv_transpose
        and getattr(upsampler, "interpolate", True)
        and getattr(upsampler, "norm", None) is None
    )
