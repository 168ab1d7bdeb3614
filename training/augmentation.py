"""Differentiable augmentation: so that a discriminator cannot learn a few thousand pictures by heart.

Colour, translation and cutout after DiffAugment (Zhao et al. 2020, arXiv 2006.10738). One draw can be applied
to several batches, so that a drawn picture and the one it is held against are changed alike. Nothing waits
for the host and no shape depends on what was drawn: a draw can stand inside a captured CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("colour", "translation", "cutout")
UNIFORMS = 7  # U(0, 1) numbers that a picture's draw takes

_BRIGHTNESS = 0.25  # added, at most, either way; pictures are in [-1, 1]
_SATURATION = 0.5  # 1 ± this, multiplied
_CONTRAST = 0.25  # 1 ± this, multiplied
_SHIFT = 0.125  # of the side, at most, either way
_HOLE = 0.4  # side of the square that is cut out, of the side


@dataclass(frozen=True)
class Augmentation:
    """One draw: ``uniform`` (N, UNIFORMS) is U(0, 1), ``kinds`` says which of :data:`KINDS` are applied."""

    uniform: Tensor
    kinds: tuple[str, ...]

    def first(self, count: int) -> Augmentation:
        """The same draw for the first ``count`` pictures."""
        return Augmentation(self.uniform[:count], self.kinds)

    def apply(self, pictures: Tensor) -> Tensor:
        """Float pictures (N, 3, S, S) changed, in memory format channels_last; differentiable."""
        u, x = self.uniform, pictures
        if "colour" in self.kinds:
            x = _recolour(x, 2 * u[:, :3] - 1)
        if "translation" in self.kinds:
            x = _translate(x, u[:, 3:5])
        if "cutout" in self.kinds:
            x = _cut_out(x, u[:, 5:7])
        return x.contiguous(memory_format=torch.channels_last)


def _recolour(x: Tensor, signed: Tensor) -> Tensor:
    brightness, saturation, contrast = signed.view(-1, 3, 1, 1, 1).unbind(1)
    x = x + _BRIGHTNESS * brightness
    grey = x.mean(1, keepdim=True)
    x = grey + (1 + _SATURATION * saturation) * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (1 + _CONTRAST * contrast) * (x - mean)


def _translate(x: Tensor, uniform: Tensor) -> Tensor:
    """Shift by whole pixels; what comes in from outside repeats the border.

    Each axis is multiplied by a 0/1 matrix: unlike a gather its gradient is a product too, not atomic adds.
    """
    side = x.shape[-1]
    reach = int(_SHIFT * side)
    place = torch.arange(side, device=x.device)
    shift = (uniform * (2 * reach + 1)).floor() - reach
    source = (place + shift.unsqueeze(2)).clamp(0, side - 1)  # (N, 2, S)
    rows, columns = (source.unsqueeze(3) == place).to(x.dtype).unsqueeze(2).unbind(1)  # (N, 1, S, S) each
    return rows @ x @ columns.transpose(2, 3)


def _cut_out(x: Tensor, uniform: Tensor) -> Tensor:
    """A square, partly outside perhaps, becomes grey."""
    side = x.shape[-1]
    hole = int(_HOLE * side)
    place = torch.arange(side, device=x.device)
    start = ((uniform * (side + hole)).floor() - hole).unsqueeze(2)
    rows, columns = ((place >= start) & (place < start + hole)).unbind(1)  # (N, S) each
    inside = rows.unsqueeze(2) & columns.unsqueeze(1)
    return x.masked_fill(inside.unsqueeze(1), 0.0)
