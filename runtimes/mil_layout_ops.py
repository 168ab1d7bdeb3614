"""What the operations of a MIL program mean that only place values: reshape, slice, gather, pad, cast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeflow.runtimes.mil_ops import flag, ints, operation

#: ``cast``'s names of types. Unsigned 16 bits sit in the next wider signed type, which torch can add.
CAST_TYPES = {
    "bool": torch.bool,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.int32,
}


@operation("identity", moves=True)
def identity(x: Tensor) -> Tensor:
    return x


@operation("cast", moves=True)
def cast(x: Tensor, dtype: str) -> Tensor:
    if dtype not in CAST_TYPES:
        raise ValueError(f"dtype {dtype!r}; known: {', '.join(CAST_TYPES)}")
    return x.to(CAST_TYPES[dtype])


@operation("reshape", moves=True)
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """-1 takes what is left; 0 keeps the size of the same place."""
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(ints(shape))])


@operation("transpose", moves=True)
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


@operation("expand_dims", moves=True)
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    """Axes count in the result."""
    rank = x.dim() + len(ints(axes))
    for axis in sorted(a % rank for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


@operation("squeeze", moves=True)
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Axes of another size than 1 are left alone."""
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


@operation("concat", moves=True)
def concat(values: Sequence[Tensor], axis: Tensor | int, interleave: Tensor | bool = False) -> Tensor:
    """Interleaved: the first slice of each value, then the second of each, and so on."""
    if not flag(interleave):
        return torch.cat(list(values), int(axis))
    dim = int(axis) % values[0].dim()
    return torch.stack(list(values), dim + 1).flatten(dim, dim + 1)


@operation("stack", moves=True)
def stack(values: Sequence[Tensor], axis: Tensor | int) -> Tensor:
    return torch.stack(list(values), int(axis))


@operation("split", moves=True)
def split(
    x: Tensor, axis: Tensor | int, num_splits: Tensor | int | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    dim = int(axis)
    if split_sizes is not None:
        return torch.split(x, ints(split_sizes), dim)
    if num_splits is None:
        raise ValueError("neither num_splits nor split_sizes is given")
    return torch.split(x, x.shape[dim] // int(num_splits), dim)


@operation("tile", moves=True)
def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


@operation("slice_by_index", moves=True)
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """``x[begin:end:stride]`` in each dimension, as NumPy does it.

    A mask's 1 drops that dimension's begin or end; squeeze_mask's 1 takes ``x[begin]``, a dimension less.
    """
    rank = x.dim()
    starts, ends = ints(begin), ints(end)
    steps = [1] * rank if stride is None else ints(stride)
    no_begin, no_end, squeezed = (
        [0] * rank if mask is None else ints(mask) for mask in (begin_mask, end_mask, squeeze_mask)
    )
    for i in range(rank):
        if squeezed[i]:
            start = 0 if no_begin[i] else starts[i]
            x = x.narrow(i, start % x.shape[i], 1)
            continue
        wanted = slice(None if no_begin[i] else starts[i], None if no_end[i] else ends[i], steps[i])
        x = _take(x, i, range(x.shape[i])[wanted])
    return x.squeeze(tuple(i for i in range(rank) if squeezed[i]))


def _take(x: Tensor, dim: int, places: range) -> Tensor:
    """The given places of one dimension; torch's own slices know no negative steps."""
    if places == range(x.shape[dim]):
        return x
    if places.step < 0:
        return _take(x, dim, places[::-1]).flip(dim)
    index = [slice(None)] * x.dim()
    index[dim] = slice(places.start, places.stop, places.step)
    return x[tuple(index)]


@operation("slice_by_size", moves=True)
def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """``size`` elements from ``begin`` on in each dimension; -1 takes the rest."""
    for i, (start, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        start %= x.shape[i]
        x = x.narrow(i, start, x.shape[i] - start if length == -1 else length)
    return x


@operation("gather", moves=True)
def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,  # every index is validated here
) -> Tensor:
    """Slices of ``x`` at ``indices`` along ``axis``; the first ``batch_dims`` dimensions run side by side."""
    dim, batch = int(axis) % x.dim(), int(batch_dims)
    if batch:
        lead = x.shape[:batch]
        pairs = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
        taken = torch.stack([gather(one, places, dim - batch) for one, places in pairs])
        return taken.reshape(*lead, *taken.shape[1:])
    flat = _wrapped(indices.reshape(-1), x.shape[dim])
    return x.index_select(dim, flat).reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])


@operation("gather_along_axis", moves=True)
def gather_along_axis(
    x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Tensor | bool = False
) -> Tensor:
    dim = int(axis)
    return torch.gather(x, dim, _wrapped(indices, x.shape[dim]))


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Negative indices count from the end."""
    places = indices.long()
    return torch.where(places < 0, places + size, places)


@operation("pad", moves=True)
def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    """Before and after each of the last dimensions, outermost first (torch takes the innermost first)."""
    amounts = ints(pad)
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    while mode != "constant" and len(pairs) > 1 and pairs[0] == (0, 0):
        pairs = pairs[1:]  # torch reflects only the last dimensions
    flat = [amount for pair in reversed(pairs) for amount in pair]
    if mode == "constant":
        return F.pad(x, flat, value=float(constant_val))
    return F.pad(x, flat, mode=mode)


@operation("upsample_nearest_neighbor", moves=True)
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Tensor | float = 1, scale_factor_width: Tensor | float = 1
) -> Tensor:
    """The last two dimensions, each ``floor(size × factor)``."""
    factors = [float(scale_factor_height), float(scale_factor_width)]
    sizes = [int(n * f) for n, f in zip(x.shape[-2:], factors, strict=True)]
    places = [_nearest(n, 1 / f, m) for n, f, m in zip(x.shape[-2:], factors, sizes, strict=True)]
    return x.index_select(-2, places[0]).index_select(-1, places[1])


@operation("resize_nearest_neighbor", moves=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: Tensor, target_size_width: Tensor) -> Tensor:
    """The last two dimensions, each to its target size."""
    targets = [int(target_size_height), int(target_size_width)]
    places = [_nearest(n, n / m, m) for n, m in zip(x.shape[-2:], targets, strict=True)]
    return x.index_select(-2, places[0]).index_select(-1, places[1])


def _nearest(size: int, spacing: float, target: int) -> Tensor:
    return (torch.arange(target, dtype=torch.float64) * spacing).long().clamp(max=size - 1)


@operation("pixel_shuffle", moves=True)
def pixel_shuffle(x: Tensor, upscale_factor: Tensor | int) -> Tensor:
    """(N, C·r², H, W) → (N, C, H·r, W·r); of the r² channels of one, the last index moves along W."""
    return F.pixel_shuffle(x, int(upscale_factor))


@operation("band_part", moves=True)
def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    """Zero outside a band of the last two dimensions; a negative bound is none."""
    x = x if int(upper) < 0 else x.tril(int(upper))
    return x if int(lower) < 0 else x.triu(-int(lower))


@operation("fill", moves=True)
def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return torch.as_tensor(value).expand(ints(shape))


@operation("shape", moves=True)
def shape_of(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operation("range_1d")
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=end.dtype)
