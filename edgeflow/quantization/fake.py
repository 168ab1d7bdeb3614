"""Fake quantization: a float weight that trains, seen through its own integers.

``edgeflow::fake_quantize`` rounds a weight and dequantizes it again with the very primitives that
``edgeflow quantize`` rounds with, so the weight a network is trained with is the one that is stored. To the
compiler it is one opaque op: the arithmetic is eager float32 whatever surrounds it (autocast, fusion, a CUDA
graph). Backwards it is the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): the gradient
passes where the weight is inside the integers' range; a learned scale has the gradient of LSQ (Esser et al.
2020, arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.quantization.layers import dequantize
from edgeflow.quantization.schemes import MIN_SCALE, SCHEMES, Scheme, quantize

#: A learned scale is ``start · exp(GAIN · shift)``: the optimizer moves ``shift`` by its learning rate, and a
#: scale must move by per cents while a weight moves by fractions of its step.
GAIN = 10.0
#: Fractions of the scale that covers a block's largest weight, tried for the smallest squared error.
_SHRINK = tuple(1.0 - 0.025 * i for i in range(21))

Integers = tuple[Tensor, Tensor, Tensor | None]


def round_with(weight: Tensor, scale: Tensor, zero_point: Tensor | None, how: Scheme) -> Tensor:
    """Round to nearest with scales (and zero points, int8) that are given: weight (O, I, …) → int8."""
    from torchao.quantization.quant_primitives import quantize_affine

    zero = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    block = how.block(tuple(weight.shape))
    return quantize_affine(weight, block, scale, zero, torch.int8, how.quant_min, how.quant_max)


def fitted(weight: Tensor, how: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of least squared error a block, of those that shrink the covering scale.

    weight (O, I, …) float32 → scale float32 (a number that float16 holds), zero point int8 or None.
    """
    _, cover, zero = quantize(weight, how)
    best, least = cover, torch.full_like(cover, torch.inf)
    for factor in _SHRINK:
        scale = _stored(cover * factor)
        error = dequantize(round_with(weight, scale, zero, how), scale, zero, how.bits) - weight
        squared = _over_blocks(error.square(), scale)
        best, least = torch.where(squared < least, scale, best), torch.minimum(squared, least)
    return best, zero


def to_integers(
    weight: Tensor, scheme: str, start: Tensor | None, shift: Tensor | None, zero: Tensor | None
) -> Integers:
    """What a weight is stored as: q int8, scale float32, zero point int8 or None.

    Without ``start`` scale and zero point come from the weight itself, as ``schemes.quantize`` finds them;
    with it the scale is ``start · exp(GAIN · shift)``, a block's each, and ``zero`` stays.
    """
    how = SCHEMES[scheme]
    if start is None or shift is None:
        return quantize(weight.detach().contiguous(), how)
    scale = _stored(start * torch.exp(GAIN * shift))
    return round_with(weight, scale, zero, how), scale, zero


@torch.library.custom_op("edgeflow::fake_quantize", mutates_args=())
def fake_quantize(
    weight: Tensor, scheme: str, start: Tensor | None, shift: Tensor | None, zero: Tensor | None
) -> Tensor:
    """The weight that runs once ``to_integers`` is stored; float32 in the weight's shape and strides."""
    q, scale, zero = to_integers(weight, scheme, start, shift, zero)
    return torch.empty_like(weight).copy_(dequantize(q, scale, zero, SCHEMES[scheme].bits))


@fake_quantize.register_fake
def _(weight: Tensor, scheme: str, start: Any, shift: Any, zero: Any) -> Tensor:
    return torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.scheme, start, shift, zero = inputs
    ctx.save_for_backward(weight, start, shift, zero)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, start, shift, zero = ctx.saved_tensors
    if start is None:  # the scale covers every weight: none is out of range by more than half a step
        return grad, None, None, None, None
    by_weight, by_shift = fake_quantize_backward(grad, weight, ctx.scheme, start, shift, zero)
    return by_weight, None, None, by_shift, None


@torch.library.custom_op("edgeflow::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(
    grad: Tensor, weight: Tensor, scheme: str, start: Tensor, shift: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, in its shape and strides, and of the shift, where the scale is learned.

    One op to the compiler too: a network has hundreds of layers, and compiling the arithmetic of each took
    longer than training.
    """
    how, scale = SCHEMES[scheme], _stored(start * torch.exp(GAIN * shift))
    wide = _spread(scale, weight)
    steps, offset = weight / wide, 0.0 if zero is None else _spread(zero.float(), weight)
    level = torch.round(steps) + offset
    inside = (level >= how.quant_min) & (level <= how.quant_max)
    # d(q·s)/ds = q − w/s inside the range, the limit outside (LSQ, equation 3)
    by_scale = level.clamp(how.quant_min, how.quant_max) - offset - torch.where(inside, steps, 0.0)
    moved = _over_blocks(grad * by_scale, scale) * scale * GAIN
    return torch.empty_like(weight).copy_(torch.where(inside, grad, 0.0)), moved


@fake_quantize_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, scheme: str, start: Tensor, shift: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(shift)


fake_quantize.register_autograd(_straight_through, setup_context=_keep)


def _stored(scale: Tensor) -> Tensor:
    """The nearest scale that a checkpoint holds."""
    return scale.clamp_min(MIN_SCALE).half().float()


def _interleaved(shape: torch.Size, blocks: torch.Size) -> list[int]:
    """Each axis as (blocks, size of a block)."""
    return [n for size, count in zip(shape, blocks, strict=True) for n in (count, size // count)]


def _spread(blocks: Tensor, like: Tensor) -> Tensor:
    """One number a block → one a weight."""
    wide = blocks.reshape([n for count in blocks.shape for n in (count, 1)])
    return wide.expand(_interleaved(like.shape, blocks.shape)).reshape(like.shape)


def _over_blocks(values: Tensor, blocks: Tensor) -> Tensor:
    """Sums over each block, in the shape of ``blocks``."""
    cut = values.reshape(_interleaved(values.shape, blocks.shape))
    return cut.sum(dim=list(range(1, cut.dim(), 2)))


# --- layers ---------------------------------------------------------------------------------------------


class FakeQuantized:
    """Mixed into a layer that runs with ``seen_weight()`` and trains its float ``weight``.

    Its other parameters and the names in its state dict are the layer's own; a learned scale adds the
    parameter ``scale_shift`` and the buffers ``scale_start`` and ``scale_zero``.
    """

    scheme: str

    def seen_weight(self) -> Tensor:
        """The dequantized weight, differentiable."""
        this: Any = self
        return fake_quantize(this.weight, this.scheme, this.scale_start, this.scale_shift, this.scale_zero)

    @torch.no_grad()
    def integers(self) -> Integers:
        """What is to be stored for the weight as it is now."""
        this: Any = self
        return to_integers(this.weight, this.scheme, this.scale_start, this.scale_shift, this.scale_zero)


class FakeQuantizedLinear(FakeQuantized, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.seen_weight(), self.bias)


class FakeQuantizedConv2d(FakeQuantized, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.seen_weight(), self.bias)


class FakeQuantizedEmbedding(FakeQuantized, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.seen_weight(), self.padding_idx)


_CLASSES: dict[type, type] = {
    nn.Linear: FakeQuantizedLinear,
    nn.Conv2d: FakeQuantizedConv2d,
    nn.Embedding: FakeQuantizedEmbedding,
}
#: What the layers above add to a state dict.
_ADDED = ("scale_shift", "scale_start", "scale_zero")


@torch.no_grad()
def fake_quantize_layer(
    layer: nn.Module, scheme: str, *, learned: bool, start: tuple[Tensor, Tensor | None] | None = None
) -> None:
    """Turn a linear, convolution or embedding into one that runs through ``scheme``'s integers, in place.

    With ``learned`` scales are parameters, from ``start`` (scale and zero point) on, or from the fitted ones;
    otherwise they follow the weight.
    """
    this: Any = layer
    begin = shift = zero = None
    if learned:
        begin, zero = start or fitted(this.weight.detach().contiguous(), SCHEMES[scheme])
        begin, zero = (None if t is None else t.to(this.weight.device) for t in (begin, zero))
        shift = nn.Parameter(torch.zeros_like(begin))
    this.register_buffer("scale_start", begin)
    this.register_parameter("scale_shift", shift)
    this.register_buffer("scale_zero", zero)
    this.scheme = scheme
    this.__class__ = _CLASSES[type(layer)]


def float_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the module as it was before any layer was fake-quantized, with today's weights."""
    return {name: t for name, t in module.state_dict().items() if name.rpartition(".")[2] not in _ADDED}
