"""Layers whose weight is integers and scales, and the ops of quantized programs.

``edgeflow::dequantize`` turns integers and scales into a weight, ``edgeflow::look_up`` takes a weight from a
table, ``edgeflow::quantize_activation`` rounds a layer's input to its uint8 grid. Each stays one node in a
program of torch.export; every exporter lowers it to its backend's own form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import dequantize_affine

#: The op as programs name it.
OP = "edgeflow::dequantize"
#: What a layer's state dict calls its integers, scales and zero points.
INTEGERS, SCALE, ZERO_POINT = "weight_q", "weight_scale", "weight_zero_point"
#: The table that integers look up, in place of scales and zero points.
PALETTE = "weight_palette"
#: And the grid of its input, where that is rounded as well.
INPUT_SCALE, INPUT_ZERO_POINT = "input_scale", "input_zero_point"
#: The op that rounds an input, as programs name it.
INPUT_OP = "edgeflow::quantize_activation"


@torch.library.custom_op(OP, mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """(q − zero_point) · scale in float32.

    q (O, I, …) int8 holds integers of ``bits`` bits, 4 or 8; scale and zero_point (int8) have q's axes, each
    as long as q's or a whole number of times shorter, which is the block's size along it.
    """
    block = [n // s for n, s in zip(q.shape, scale.shape, strict=True)]
    limits = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return dequantize_affine(
        q, tuple(block), scale, zero_point, torch.int8, *limits, output_dtype=torch.float32
    )


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    return torch.empty(q.shape, dtype=torch.float32, device=q.device)


@torch.library.custom_op(INPUT_OP, mutates_args=())
def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x on the grid (q − zero point) · scale, q in 0 … 255, half rounded to even; both are of shape ()."""
    zero = zero_point.to(x.dtype)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


@quantize_activation.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("edgeflow::look_up", mutates_args=())
def look_up(indices: Tensor, palette: Tensor) -> Tensor:
    """palette[indices]: uint8 of any shape and a table (2^bits,) float32 → float32 of the indices' shape."""
    return palette[indices.long()]


@look_up.register_fake
def _(indices: Tensor, palette: Tensor) -> Tensor:
    return torch.empty(indices.shape, dtype=palette.dtype, device=indices.device)


class _Quantized:
    """Mixed into a layer whose parameter ``weight`` is gone: ``weight`` is computed from the integers.

    Where the layer has an input scale, its input is rounded first.
    """

    def forward(self, x: Tensor) -> Tensor:
        this: Any = self
        if this.input_scale is not None:
            x = quantize_activation(x, this.input_scale, this.input_zero_point)
        return super().forward(x)  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        this: Any = self
        if this.weight_palette is not None:
            return look_up(this.weight_q, this.weight_palette)
        return dequantize(this.weight_q, this.weight_scale, this.weight_zero_point, this.weight_bits)


class QuantizedLinear(_Quantized, nn.Linear):
    pass


class QuantizedConv2d(_Quantized, nn.Conv2d):
    pass


class QuantizedEmbedding(_Quantized, nn.Embedding):
    pass


_CLASSES: dict[type, type] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    nn.Embedding: QuantizedEmbedding,
}


def quantizable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name → layer of every convolution, linear and looked-up embedding, in the module's order.

    A position embedding is not looked up but added: graphs hold it as a constant, so it stays float. A
    grouped convolution has other input channels than its weight's axis 1 and stays float too.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in _CLASSES
        and not name.endswith("position_embedding")
        and not (isinstance(layer, nn.Conv2d) and layer.groups != 1)
    }


def replace_weight(
    layer: nn.Module,
    q: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bits: int,
    input_grid: tuple[Tensor, Tensor] | None = None,
    palette: Tensor | None = None,
) -> None:
    """Turn a layer into the one whose weight is these integers, in place; see ``dequantize`` for shapes.

    With ``palette`` the integers are indices into it, and scale and zero point are None. ``input_grid`` is
    the scale () and zero point () that its input is rounded with.
    """
    if tuple(q.shape) != tuple(layer.weight.shape):  # type: ignore[arg-type]
        raise ValueError(f"expected integers of shape {tuple(layer.weight.shape)}, got {tuple(q.shape)}")  # type: ignore[arg-type]
    del layer.weight
    layer.register_buffer(INTEGERS, q)
    layer.register_buffer(SCALE, scale)
    layer.register_buffer(ZERO_POINT, zero_point)
    layer.register_buffer(PALETTE, palette)
    layer.register_buffer(INPUT_SCALE, None if input_grid is None else input_grid[0])
    layer.register_buffer(INPUT_ZERO_POINT, None if input_grid is None else input_grid[1])
    layer.weight_bits = bits  # type: ignore[assignment]
    layer.__class__ = _CLASSES[type(layer)]
