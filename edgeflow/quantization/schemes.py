"""How one weight becomes integers and scales. The table is torch-free; the arithmetic is torchao's.

A scheme cuts a weight into blocks that share a scale (and a zero point): weight ≈ (q − zero_point) · scale.
Blocks lie along axis 1, a weight's input channels, and never across output channels::

    scheme   integers        block of (O, I)   of (O, I, kh, kw)   scale of (O, I, kh, kw)
    w8       int8 ±127       (1, I)            (1, I, kh, kw)      (O, 1, 1, 1)
    w8g32    int8 ±127       (1, 32)           (1, 32, 1, 1)       (O, I/32, kh, kw)
    w4g32    int4 −8…7       (1, 32)           (1, 32, 1, 1)       (O, I/32, kh, kw)

``w4g32z`` is ``w4g32`` with an int4 zero point for each block. ``w8a8`` is ``w8`` with the layer's input in
uint8: one scale and one zero point for the whole tensor, found on calibration pictures. ``w6`` and ``w4`` are
look-up tables, one a weight (see PALETTES). Scales are float32 numbers that float16 holds exactly, so that
bundles of both precisions carry the same scales; integers are rounded with that very scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeflow.errors import UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

#: In a recipe: the layer keeps its floating-point weight.
FLOAT = "float"
#: The smallest scale: float16's smallest normal number, below which some devices read zero.
MIN_SCALE = 2.0**-14


@dataclass(frozen=True)
class Scheme:
    """One way to store a weight. ``group`` is None where an output channel is one block."""

    name: str
    bits: int
    quant_min: int
    quant_max: int
    group: int | None
    zero_point: bool
    activations: bool = False  # the layer's input is rounded to uint8

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape (O, I, …) is cut into whole blocks."""
        return self.group is None or shape[1] % self.group == 0

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's size along each axis of a weight of this shape."""
        return (1, *shape[1:]) if self.group is None else (1, self.group, *(1 for _ in shape[2:]))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The scale's shape: as many axes as the weight, one entry a block."""
        return tuple(n // b for n, b in zip(shape, self.block(shape), strict=True))


SCHEMES = {
    s.name: s
    for s in (
        Scheme("w8", 8, -127, 127, None, False),
        Scheme("w8g32", 8, -127, 127, 32, False),
        Scheme("w4g32", 4, -8, 7, 32, False),
        Scheme("w4g32z", 4, -8, 7, 32, True),
        Scheme("w8a8", 8, -127, 127, None, False, activations=True),
    )
}


#: Look-up tables, which Core ML alone has: scheme → bits of an index; one table of 2^bits a weight.
PALETTES = {"w6": 6, "w4": 4}
_PALETTE_STEPS = 60
_BINS = 4096  # of the values' density


def palettize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """k-means of a weight's values: indices uint8 of its shape, table (2^bits,) float32, rising.

    Lloyd's algorithm, which no chance enters, from points as dense as the cube root of the values' density,
    which is best for many points (Panter & Dite 1951); quantiles would leave the tails too few. ``weight`` ≈
    table[indices]. Table values are numbers that float16 holds exactly.
    """
    import torch

    values = weight.detach().double().flatten().sort().values
    count, low, high = 1 << bits, values[0], values[-1]
    density = torch.histc(values, _BINS, low.item(), high.item()).pow(1 / 3).cumsum(0)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * density[-1]
    table = low + (torch.searchsorted(density, places) + 0.5) / _BINS * (high - low)
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), values.cumsum(0)))
    for _ in range(_PALETTE_STEPS):
        cuts = torch.searchsorted(values, (table[1:] + table[:-1]) / 2)
        ends = torch.cat((torch.tensor([0]), cuts, torch.tensor([len(values)])))
        sizes = ends.diff()
        table = torch.where(sizes > 0, sums[ends].diff() / sizes.clamp_min(1), table)
    table = table.half().float().sort().values
    indices = torch.searchsorted((table[1:] + table[:-1]) / 2, weight.detach().float().contiguous())
    return indices.to(torch.uint8), table


def scheme(name: str) -> Scheme:
    """The scheme called ``name``. Raises UnknownNameError."""
    if name not in SCHEMES:
        raise UnknownNameError("scheme", name, (*SCHEMES, FLOAT))
    return SCHEMES[name]


def quantize(weight: Tensor, how: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round to nearest: weight (O, I, …) float32 → integers (O, I, …) int8, scale float32, zero point int8.

    The zero point is None for a symmetric scheme, else of the scale's shape. Raises ValueError for a shape
    that does not divide into blocks.
    """
    import torch
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    shape = tuple(weight.shape)
    if not how.divides(shape):
        raise ValueError(f"weight of shape {shape}: axis 1 does not divide into groups of {how.group}")
    block, limits = how.block(shape), (how.quant_min, how.quant_max)
    mapping = MappingType.ASYMMETRIC if how.zero_point else MappingType.SYMMETRIC
    scale, zero = choose_qparams_affine(weight, mapping, block, torch.int8, *limits, keepdim=True)
    scale = scale.clamp_min(MIN_SCALE).half().float().reshape(how.scale_shape(shape))
    zero = zero.reshape(scale.shape).to(torch.int8)  # all zeros for a symmetric scheme
    q = quantize_affine(weight, block, scale, zero, torch.int8, *limits)
    return q, scale, zero if how.zero_point else None


#: Fractions of an activation's range that the search for its scale tries.
_CLIPS = tuple(1 - 0.03 * i for i in range(25))
#: Values that the search's error is taken over, at most.
_VALUES = 1 << 17


def activation_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scale () float32 and zero point () uint8 of least squared error for a layer's input, of any shape.

    The grid is (q − zero point) · scale with q in 0 … 255; zero is on it, as padding needs. The scale is a
    number that float16 holds exactly.
    """
    import torch

    flat = values.detach().reshape(-1).float()
    low, high = flat.min().clamp_max(0), flat.max().clamp_min(0)
    sample = flat[:: -(-len(flat) // _VALUES)]
    best: tuple[float, Tensor, Tensor] | None = None
    for clip in _CLIPS:
        scale = ((high - low) * clip / 255).clamp_min(MIN_SCALE).half().float()
        zero = (-torch.round(low * clip / scale)).clamp(0, 255)
        rounded = ((torch.round(sample / scale) + zero).clamp(0, 255) - zero) * scale
        error = float((rounded - sample).square().sum())
        if best is None or error < best[0]:
            best = (error, scale, zero.to(torch.uint8))
    assert best is not None
    return best[1], best[2]
