"""Convolutions rewritten for a GPU (rewrites of edgeflow.gpu_rewrites)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.sharing import constant, placed_children
from edgeflow.upsampling import expect_twice, phase_kernels, replace_upsamplers

#: Up to so many output pixels of a batch, a matrix product reads the weights faster than a convolution does:
#: 16 × 16 of one picture on an H200 (docs/cuda.md).
FEW_PIXELS = 256


def fuse_upsampling(module: nn.Module) -> int:
    """The rewrite ``upsample``, over diffusers' Upsample2D.

    Not over the nn.Upsample of diffusers' tiny decoder: compiled ahead of time, that drew another picture on
    the GPU, for a reason not found (docs/cuda.md).
    """
    return replace_upsamplers(module, SubpixelConv)


def convolve_by_product(module: nn.Module) -> int:
    """The rewrite ``product``, over a UNet's 3×3 convolutions: a decoder's have more pixels."""
    unets = [unet for unet in module.modules() if type(unet).__name__ == "UNet2DConditionModel"]
    found = [placed for unet in unets for placed in placed_children(unet) if _is_3x3(placed[2])]
    for parent, name, child in found:
        setattr(parent, name, ProductConv(child))
    return len(found)


class SubpixelConv(nn.Module):
    """A 3×3 convolution of a picture upsampled ×2 to the nearest, from the picture itself.

    (N, C, H, W) → (N, O, 2H, 2W). Output pixel 2i + a reads the upsampled rows 2i + a − 1 … 2i + a + 1, which
    are two rows of the input: i − 1 and i for a = 0, with the taps w₀ and w₁ + w₂, and i and i + 1 for a = 1,
    with w₀ + w₁ and w₂; columns alike. All four phases are one 2×2 convolution of 4·O channels over the input
    with a border of zeros: 16 products for each input pixel in place of 36. At its row p lie the output rows
    2p − 1 (a = 1) and 2p (a = 0): the four phases in reverse order, interleaved, are the output with a border
    of one pixel too many.
    """

    def __init__(self, conv: Any):
        super().__init__()
        self.out_channels = conv.out_channels
        # Phase (a, b) at 2(1 − a) + (1 − b).
        self.weight = constant(phase_kernels(conv.weight).flip(0, 1).flatten(0, 2))
        self.bias = None if conv.bias is None else constant(conv.bias.repeat(4))

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        expect_twice(output_size)
        phases = F.conv2d(x, self.weight, self.bias, padding=1).unflatten(1, (2, 2, self.out_channels))
        return phases.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)[:, :, 1:-1, 1:-1]


class ProductConv(nn.Module):
    """A 3×3 convolution of padding 1 that is one matrix product where there are few pixels.

    (N, C, H, W) → (N, O, ⌈H/s⌉, ⌈W/s⌉). Few pixels under many channels are a product that is bound by reading
    the weights, for which a convolution's kernels are not made.
    """

    def __init__(self, conv: Any):
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        height, width = ((side - 1) // self.stride + 1 for side in x.shape[2:])
        if len(x) * height * width > FEW_PIXELS:
            return F.conv2d(x, self.weight, self.bias, padding=1, stride=self.stride)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(1, 3, self.stride).unfold(2, 3, self.stride)  # (N, H, W, C, 3, 3)
        columns = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        # A view of the weights where they lie channels-last.
        y = F.linear(columns, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


def _is_3x3(layer: Any) -> bool:
    """Whether it is a float 3×3 convolution of padding 1 and one stride, whatever the stride."""
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        == ((3, 3), (1, 1), (1, 1), 1, "zeros")
        and layer.stride[0] == layer.stride[1]
    )
