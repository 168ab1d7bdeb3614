"""How far two sets of pictures are apart, in the feature space of a network that judges.

All take features (N, D) of real and generated pictures. Smaller is closer except where said.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.errors import BackendMissing


@dataclass(frozen=True)
class Kid:
    mean: float
    std: float  # over subsets: how far one subset's value scatters


def kid(real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, seed: int) -> Kid:
    """Kernel Inception distance: the unbiased squared MMD under the kernel (x·y/D + 1)³ over random subsets.

    Bińkowski et al. 2018 (arXiv 1801.01401), by torchmetrics, in float64. It has no bias from the number of
    samples and may be negative. ``subset_size`` is cut to the smaller set.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ModuleNotFoundError as error:
        raise BackendMissing("torchmetrics", "train") from error
    size = min(subset_size, len(real), len(fake))
    if size < 2:
        raise ValueError(f"kid: expected at least 2 pictures in each set, got {len(real)} and {len(fake)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=subsets, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws its subsets from the global generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return Kid(float(mean), float(std))


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to the sets, ‖μ₁−μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½).

    Heusel et al. 2017 (arXiv 1706.08500). With Σ = RᵀR, tr (Σ₁Σ₂)^½ is the sum of the singular values of
    R₁R₂ᵀ, which needs no matrix root and stays exact where there are fewer pictures than features. It is
    biased upwards by few samples: compare at equal counts only, and with the floor beside it.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(
            f"frechet: expected at least 2 pictures in each set, got {len(real)} and {len(fake)}"
        )
    (mean1, root1), (mean2, root2) = _gaussian(real), _gaussian(fake)
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    distance = (mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a root R with RᵀR the covariance, at most (D, D)."""
    x = features.double()
    mean = x.mean(0)
    centred = (x - mean) / (len(x) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


@dataclass(frozen=True)
class PrecisionRecall:
    """More is better; both in 0 to 1."""

    precision: float  # of the generated pictures, how many lie within the real ones' manifold: fidelity
    recall: float  # of the real pictures, how many lie within the generated ones' manifold: diversity


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), k = ``neighbours``.

    A set's manifold is the union of balls around its members, each as wide as the distance to the member's
    k-th nearest other member.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(f"precision_recall: expected more than {neighbours} pictures in each set")
    real, fake = real.double(), fake.double()
    across = _distances(fake, real)
    precision = (across <= _radii(real, neighbours)).any(1).double().mean()
    recall = (across <= _radii(fake, neighbours)[:, None]).any(0).double().mean()
    return PrecisionRecall(float(precision), float(recall))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance (N,) of each to its k-th nearest other; the nearest of all is itself, at distance 0."""
    return _distances(features, features).kthvalue(neighbours + 1, dim=1).values


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos of matching rows (N,): 0 for the same direction, 2 for opposite ones."""
    return 1.0 - F.cosine_similarity(a.double(), b.double(), dim=1)


def nearest_distance(features: Tensor, among: Tensor, leave_out: Tensor | None = None) -> Tensor:
    """Cosine distance (N,) of each to the nearest of ``among``.

    ``leave_out`` (N,) is each one's own index in ``among``, which is passed over.
    """
    similarity = F.normalize(features.double(), dim=1) @ F.normalize(among.double(), dim=1).T
    if leave_out is not None:
        similarity[torch.arange(len(features)), leave_out] = -2.0
    return 1.0 - similarity.max(1).values


def retrieval_r_at_1(
    pictures: Tensor, texts: Tensor, *, candidates: int, seed: int, rounds: int = 20
) -> float:
    """How often a picture's own caption is the nearest of ``candidates`` captions; more is better, 0 to 1.

    ``pictures`` and ``texts`` (N, D) are unit vectors, row i belonging together. In each round the other
    captions are drawn anew, without replacement; a tie counts as lost. Chance is 1 / candidates.
    """
    count = len(pictures)
    candidates = min(candidates, count)
    if candidates < 2:
        raise ValueError(f"retrieval: expected at least 2 captions, got {count}")
    similarity = pictures.double() @ texts.double().T
    own = similarity.diagonal().unsqueeze(1)
    lost = similarity >= own
    lost.fill_diagonal_(False)
    generator = torch.Generator("cpu").manual_seed(seed)
    hits = torch.zeros(())
    for _ in range(rounds):
        order = torch.rand(count, count, generator=generator)
        order.fill_diagonal_(2.0)  # never drawn as one of the others
        others = order.argsort(dim=1)[:, : candidates - 1]
        hits += (~lost.gather(1, others).any(1)).float().mean()
    return float(hits / rounds)
