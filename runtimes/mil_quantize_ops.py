"""What MIL's quantization of activations means (coremltools' iOS17 ``quantize`` and ``dequantize``)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeflow.runtimes.mil_ops import operation

#: Element type → the integers it holds.
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


@operation("quantize")
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    """round(x / scale) + zero point, half to even, within the integers of ``output_dtype``."""
    if output_dtype not in _LIMITS:
        raise ValueError(f"output_dtype {output_dtype!r}; known: {', '.join(_LIMITS)}")
    scales, zeros = _along(scale, input, axis), _along(zero_point, input, axis)
    return (torch.round(input / scales) + zeros).clamp(*_LIMITS[output_dtype])


@operation("dequantize")
def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Tensor | None = None
) -> Tensor:
    """(q − zero point) · scale; vectors run along ``axis``."""
    return (input.float() - _along(zero_point, input, axis)) * _along(scale, input, axis)


def _along(values: Tensor | None, x: Tensor, axis: Tensor | None) -> Tensor:
    if values is None:
        return torch.zeros(())
    if not values.dim():
        return values.float()
    if axis is None:
        raise ValueError(f"expected an axis for {len(values)} scales or zero points, got none")
    shape = [1] * x.dim()
    shape[int(axis)] = -1
    return values.float().reshape(shape)
