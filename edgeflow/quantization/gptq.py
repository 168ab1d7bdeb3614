"""Integers for one layer that keep its output, not its weight: GPTQ, then coordinate descent.

A layer is a matrix W (O, K) and its inputs are columns: x, as the float model has it, and y, as the model has
it whose earlier layers are quantized already. With C = E[x yᵀ] and H = E[y yᵀ] (about their means where the
layer has a bias, which takes up the rest), what is minimized over integers q and scales s is

    E ‖W x − Ŵ y‖²,  Ŵ = s · (q − zero point),

in two steps:

1. the best weights without any grid, T = W + W (C − H)(H + λ)⁻¹: what earlier layers lost, this one corrects
   as far as its inputs allow (as in GPTAQ, Li et al. 2025);
2. GPTQ (Frantar et al. 2022) from T, the columns of largest variance first, with each group's scale chosen
   before by a search over clipped ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeflow.quantization.schemes import MIN_SCALE, Scheme

#: λ as a fraction of H's mean diagonal.
DAMPING = 0.05
#: Fractions of a group's range that the search for its scale tries.
CLIPS = tuple(1 - 0.025 * i for i in range(21))
_BLOCK = 128


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs, K columns; ``cross`` (K, K) is E[x yᵀ], ``own`` E[y yᵀ]."""

    cross: Tensor
    own: Tensor


@dataclass(frozen=True)
class Solution:
    """A weight on its grid: integers (O, I, …) int8, scale float32, zero point int8 or None."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None


def solve(weight: Tensor, how: Scheme, moments: Moments, damping: float = DAMPING) -> Solution:
    """Integers and scales of a weight (O, I, …) float32; the moments' columns are in the order (I, …).

    The scales are numbers that float16 holds exactly, as schemes.quantize gives them.
    """
    grid = _Grid(weight, how)
    w, own = weight.flatten(1).double(), moments.own.double()
    dead = own.diagonal() == 0
    own = own + torch.diag(dead.double())
    damped = own + torch.diag(torch.full_like(w[0], damping * float(own.diagonal().mean())))
    factor = torch.linalg.cholesky(damped)
    drift = w @ (moments.cross.double() - moments.own.double())
    target = (w + torch.cholesky_solve(drift.T, factor).T).float()
    grid.choose_scales(target, damped.diagonal().float())
    grid.gptq(target, damped)
    return grid.solution(tuple(weight.shape))


class _Grid:
    """The integers q (O, K), scales and zero points (O, G) of one weight; ``group`` (K,) is a column's."""

    def __init__(self, weight: Tensor, how: Scheme):
        shape = tuple(weight.shape)
        self.how, self.scale_shape = how, how.scale_shape(shape)
        count = weight[0].numel() // _prod(how.block(shape))
        index = torch.arange(count).reshape(1, *self.scale_shape[1:])
        for axis in range(1, len(shape)):
            index = index.repeat_interleave(shape[axis] // self.scale_shape[axis], axis)
        self.group, self.count = index.flatten(), count
        self.columns = torch.argsort(self.group, stable=True)  # group by group, each of one size
        self.q = torch.zeros(shape[0], weight[0].numel())
        self.scale = torch.ones(shape[0], count)
        self.zero = torch.zeros(shape[0], count)

    def _rounded(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (torch.round(values / scale) + zero).clamp(self.how.quant_min, self.how.quant_max)

    def choose_scales(self, target: Tensor, importance: Tensor) -> None:
        """Each group's scale and zero point of least squared error, weighted by the columns' variance."""
        rows = target[:, self.columns].reshape(len(target), self.count, -1)
        weights = importance[self.columns].reshape(1, self.count, -1)
        low, high = rows.amin(-1).clamp_max(0), rows.amax(-1).clamp_min(0)
        best = torch.full_like(self.scale, torch.inf)
        for clip in CLIPS:
            scale, zero = self._range(low * clip, high * clip)
            q = self._rounded(rows, scale[..., None], zero[..., None])
            error = ((q - zero[..., None]) * scale[..., None] - rows).square().mul(weights).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            self.scale = torch.where(better, scale, self.scale)
            self.zero = torch.where(better, zero, self.zero)

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        how, steps = self.how, self.how.quant_max - self.how.quant_min
        if not how.zero_point:
            return _half(torch.maximum(-low, high) / (steps / 2)), torch.zeros_like(low)
        scale = _half((high - low) / steps)
        zero = how.quant_min - torch.round(low / scale)
        return scale, zero.clamp(how.quant_min, how.quant_max)

    def gptq(self, target: Tensor, hessian: Tensor) -> None:
        """Columns in order of falling variance; each one's error is spread over those still to come."""
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
        upper = torch.linalg.cholesky(inverse, upper=True).float()
        group = self.group[order]
        # A column of the weight is a row here, so that each step reads and writes memory in one piece.
        work, scale, zero = (
            x.T.contiguous() for x in (target[:, order], self.scale[:, group], self.zero[:, group])
        )
        q = torch.zeros_like(work)
        for start in range(0, len(work), _BLOCK):
            stop = min(start + _BLOCK, len(work))
            errors = torch.zeros_like(work[start:stop])
            for j in range(start, stop):
                q[j] = self._rounded(work[j], scale[j], zero[j])
                errors[j - start] = (work[j] - (q[j] - zero[j]) * scale[j]) / upper[j, j]
                work[j:stop] -= upper[j, j:stop, None] * errors[j - start]
            work[stop:] -= upper[start:stop, stop:].T @ errors
        self.q[:, order] = q.T

    def solution(self, shape: tuple[int, ...]) -> Solution:
        zero = self.zero.reshape(self.scale_shape).to(torch.int8) if self.how.zero_point else None
        return Solution(self.q.to(torch.int8).reshape(shape), self.scale.reshape(self.scale_shape), zero)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp_min(MIN_SCALE).half().float()


def _prod(values: tuple[int, ...]) -> int:
    count = 1
    for value in values:
        count *= value
    return count
