"""Nearest-neighbour upsampling by two and the 3×3 convolution behind it, as one step at the low resolution.

Each pixel was drawn four times, so of a 3×3 window there are only 2×2 different ones: which, depends on
whether the output's row and column are even or odd. The four cases ("phases") are four 2×2 convolutions of
the picture before upsampling, whose weights are sums of the 3×3 ones; their outputs are interleaved. 4/9 of
the multiplications, and the upsampled picture is never made. The same up to the order of additions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: [phase][tap of 2][tap of 3]: which rows (or columns) of the 3×3 kernel fall on the same source row.
_TAPS = ((((1, 0, 0), (0, 1, 1))), (((1, 1, 0), (0, 0, 1))))


class PhaseConv(nn.Module):
    """(N, C, h, w) → (N, O, 2h, 2w), as conv(interpolate(x, scale_factor=2, mode="nearest"))."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        taps = torch.tensor(_TAPS, dtype=conv.weight.dtype, device=conv.weight.device)
        weight = torch.einsum("ptk,qsl,oikl->pqoits", taps, taps, conv.weight.detach())
        self.weights = nn.ParameterList(
            nn.Parameter(weight[p, q].contiguous(), requires_grad=False) for p in (0, 1) for q in (0, 1)
        )
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        phases = []
        for weight, (p, q) in zip(self.weights, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            phases.append(F.conv2d(F.pad(x, (1 - q, q, 1 - p, p)), weight, self.bias))
        stacked = torch.stack(phases, 2)
        return F.pixel_shuffle(stacked.flatten(1, 2), 2)


class _Upsampler(nn.Module):
    """Stands where a diffusers Upsample2D was."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = PhaseConv(conv)

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        return self.conv(hidden_states)


def sharing_copy(module: nn.Module) -> Any:
    """A copy of the module's structure that shares its tensors."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def merge_upsampling(module: nn.Module) -> Any:
    """A copy that shares the module's tensors, its upsamplings by two merged with the float 3×3
    convolutions behind them; quantized ones, and any of another form, stay as they are."""
    twin = sharing_copy(module)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            conv = getattr(child, "conv", None)
            if type(child).__name__ == "Upsample2D" and _plain(child) and _fits(conv):
                setattr(parent, name, _Upsampler(conv))
    return twin


def _plain(upsampler: Any) -> bool:
    """Whether it is nearest-neighbour by two with a convolution behind it, and nothing else."""
    return bool(
        upsampler.use_conv
        and not upsampler.use_conv_transpose
        and getattr(upsampler, "interpolate", True)
        and getattr(upsampler, "norm", None) is None
    )


def _fits(conv: Any) -> bool:
    return type(conv) is nn.Conv2d and (
        (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    )
