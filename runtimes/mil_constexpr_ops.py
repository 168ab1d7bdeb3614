"""What MIL's compressed constants decompress to (coremltools' iOS16 and iOS18 ``constexpr`` definitions)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from edgeflow.runtimes.mil_ops import ints, operation


@operation("constexpr_affine_dequantize")
def constexpr_affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor
) -> Tensor:
    """scale · (q − zero_point); vectors run along ``axis``."""
    shape = [1] * quantized_data.dim()
    shape[int(axis)] = -1
    scales, zeros = (t.reshape(shape) if t.dim() else t for t in (scale.float(), zero_point.float()))
    return scales * (quantized_data.float() - zeros)


@operation("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale · (q − offset); a dimension n times shorter in the scale than in the data has blocks of n."""
    values = data.float()
    if offset is not None:
        values = values - _spread(offset.float(), data.shape)
    return _spread(scale.float(), data.shape) * values


def _spread(blocks: Tensor, shape: torch.Size) -> Tensor:
    for axis, size in enumerate(shape):
        repeats, rest = divmod(size, blocks.shape[axis])
        if rest:
            raise ValueError(f"axis {axis} of size {size} does not divide into {blocks.shape[axis]} blocks")
        blocks = blocks.repeat_interleave(repeats, axis) if repeats > 1 else blocks
    return blocks


@operation("constexpr_lut_to_dense", moves=True)
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Tensor | None = None
) -> Tensor:
    """Palette entries at ``indices``.

    With ``shape`` (iOS16) one palette serves all and the indices are packed into bytes. Without it (iOS18)
    the palette has two dimensions more than the indices: palettes per group, entries, values per entry; an
    entry of several values fills as many places along ``vector_axis``.
    """
    if shape is not None:
        return lut[_unpacked(indices, int(math.log2(lut.numel())), ints(shape))]
    groups = [
        torch.arange(size).reshape([-1 if i == axis else 1 for i in range(indices.dim())])
        // (size // lut.shape[axis])
        for axis, size in enumerate(indices.shape)
    ]
    dense = lut[(*groups, indices.long())]
    if vector_axis is None:
        return dense.squeeze(-1)
    axis = int(vector_axis) % indices.dim()
    return dense.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _unpacked(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    """Indices of ``bits`` bits each, packed from the least significant bit on, across byte borders."""
    flat = np.unpackbits(packed.numpy(), bitorder="little")[: math.prod(shape) * bits]
    return torch.from_numpy(flat.reshape(-1, bits).astype(np.int64) @ (1 << np.arange(bits))).reshape(shape)


@operation("constexpr_cast", moves=True)
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    if output_dtype != "fp32":
        raise ValueError(f"output_dtype {output_dtype!r}; known: fp32")
    return source_val.float()
