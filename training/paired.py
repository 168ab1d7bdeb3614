"""Two models on the same prompts and noise: differences of their figures, with bootstrap intervals.

Prompts are resampled, each with its real picture and both models' pictures, so that what is common to both
models (an easy or a hard prompt, the few real pictures there are) cancels in the difference.

An interval is the bootstrap's spread around the measured value: a resample repeats prompts, which biases a
Fréchet distance upwards, so the quantiles are taken about the bootstrap's own mean and laid around the value.

Weights (B, N) float64 say how many copies of each prompt a resample has, one row a resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A value and the 95 % interval around it."""

    value: float
    low: float
    high: float


def resamples(count: int, times: int, seed: int) -> Tensor:
    """``times`` resamples with replacement of ``count`` prompts, (times, count); a row sums to count."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=times)
    return torch.from_numpy(drawn.astype(np.float64))


def around(value: float, resampled: NDArray[np.float64]) -> Interval:
    """The 95 % interval of ``value``: quantiles of the resampled values less their mean, laid around it."""
    low, high = np.quantile(resampled - resampled.mean(), (0.025, 0.975))
    return Interval(value, value + float(low), value + float(high))


def percentile(
    statistic: Callable[[NDArray[np.float64]], float], values: NDArray[np.float64], weights: Tensor
) -> Interval:
    """The bootstrap's percentile interval of a statistic of one value a prompt (N,), infinities included."""
    counts = weights.numpy().astype(np.int64)
    resampled = np.array([statistic(np.repeat(values, row)) for row in counts])
    low, high = (_quantile(resampled, q) for q in (0.025, 0.975))
    return Interval(statistic(values), low, high)


def _quantile(values: NDArray[np.float64], q: float) -> float:
    """The value at rank q·(n − 1), rounded: no arithmetic between values, one of which may be infinite."""
    return float(np.sort(values)[round(q * (len(values) - 1))])


def mean_change(a: Tensor, b: Tensor, weights: Tensor) -> Interval:
    """mean(a) − mean(b) of paired values (N,), with its interval."""
    difference = (a - b).double()
    return around(float(difference.mean()), (weights @ difference / len(difference)).numpy())


class KernelDistance:
    """KID over all prompts at once: the unbiased squared MMD under (x·y/D + 1)³ (arXiv 1801.01401).

    The value is torchmetrics' with one subset of every picture. In a resample the copies of one prompt are no
    pairs of each other, which keeps it free of the bias that they would bring.
    """

    def __init__(self, real: Tensor):
        """``real`` (N, D) features of the prompts' own pictures."""
        self._real = real.double()
        self._among_real = _kernel(self._real, self._real).fill_diagonal_(0)

    def __call__(self, fake: Tensor, weights: Tensor) -> NDArray[np.float64]:
        """KID (B,) of pictures of the same prompts, for each row of weights (B, N)."""
        fake = fake.double()
        among_fake = _kernel(fake, fake).fill_diagonal_(0)
        across = _kernel(self._real, fake)
        pairs = weights.sum(1).square() - weights.square().sum(1)
        within = ((weights @ (self._among_real + among_fake)) * weights).sum(1) / pairs
        between = ((weights @ across) * weights).sum(1) / weights.sum(1).square()
        return (within - 2 * between).numpy()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


class Frechet:
    """The squared Fréchet distance to the prompts' own real pictures, under weights (arXiv 1706.08500)."""

    def __init__(self, real: Tensor):
        self._real = real.double()

    def __call__(self, fake: Tensor, weights: Tensor) -> NDArray[np.float64]:
        """FD (B,) of features (N, D) of the same prompts, for each row of weights (B, N)."""
        fake = fake.double()
        return np.array([self._one(fake, row) for row in weights])

    def _one(self, fake: Tensor, row: Tensor) -> float:
        kept = row > 0
        share = row[kept] / row.sum()
        (mean1, root1), (mean2, root2) = (
            _gaussian(x[kept], share, float(row.sum())) for x in (self._real, fake)
        )
        cross = torch.linalg.svdvals(root1 @ root2.T).sum()
        spread = root1.square().sum() + root2.square().sum() - 2 * cross
        return max(0.0, float((mean1 - mean2).square().sum() + spread))


def _gaussian(x: Tensor, share: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a root R, at most (D, D), with RᵀR the unbiased covariance of weighted rows."""
    mean = share @ x
    centred = (x - mean) * (share * count / (count - 1)).sqrt()[:, None]
    return mean, torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def hit_chances(pictures: Tensor, texts: Tensor, candidates: int) -> Tensor:
    """How likely each picture (N,) finds its own caption among ``candidates``, the others drawn at random.

    ``pictures`` and ``texts`` (N, D) are unit vectors. With m of the N − 1 other captions at least as near as
    the own one, all ``candidates`` − 1 drawn must be among the other N − 1 − m:
    C(N−1−m, c−1) / C(N−1, c−1). Its mean is what retrieval_r_at_1 estimates by drawing.
    """
    count = len(pictures)
    drawn = min(candidates, count) - 1
    similarity = pictures.double() @ texts.double().T
    own = similarity.diagonal().unsqueeze(1)
    nearer = (similarity >= own).sum(1) - 1
    whole = math.comb(count - 1, drawn)
    chances = [math.comb(count - 1 - int(m), drawn) / whole for m in nearer]
    return torch.tensor(chances, dtype=torch.float64)
