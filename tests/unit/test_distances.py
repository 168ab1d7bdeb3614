"""Each distance against something independent: closed forms, torchmetrics, point sets counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from edgeflow.training import distances


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(mean: Tensor, root: Tensor, count: int = 64, seed: int = 0) -> Tensor:
    """A sample whose mean is ``mean`` and whose covariance is rootᵀ·root to rounding."""
    x = normal(count, len(mean), seed)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return whitened @ root + mean


# --- Fréchet ---------------------------------------------------------------------------------------------


def test_frechet_of_known_gaussians() -> None:
    """Diagonal covariances: ‖μ₁−μ₂‖² + Σ (σ₁ − σ₂)²."""
    a = exact(torch.tensor([0.0, 0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 2.0, 3.0])).double())
    b = exact(
        torch.tensor([1.0, 2.0, 0.0]).double(), torch.diag(torch.tensor([2.0, 2.0, 0.5])).double(), seed=1
    )
    assert distances.frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 6.25, rel=1e-9)


@pytest.mark.parametrize("counts", [(200, 300), (6, 300), (6, 7)], ids=["full", "one short", "both short"])
def test_frechet_is_that_of_torchmetrics(counts: tuple[int, int]) -> None:
    a = normal(counts[0], 12, 0) @ normal(12, 12, 2)
    b = normal(counts[1], 12, 1) @ normal(12, 12, 3) + 0.5

    class Same(nn.Identity):
        num_features = 12

    metric = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert distances.frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_frechet_of_a_set_with_itself_is_nothing_and_is_symmetric() -> None:
    a, b = normal(40, 8, 0), normal(30, 8, 1) * 2
    assert distances.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distances.frechet_distance(a, b) == pytest.approx(distances.frechet_distance(b, a))
    assert distances.frechet_distance(a, b) > 1


# --- KID -------------------------------------------------------------------------------------------------


def test_kid_of_whole_sets_is_the_unbiased_mmd_written_out() -> None:
    a, b = normal(9, 5, 0), normal(9, 5, 1) + 0.3
    kernel = lambda x, y: float((x @ y) / 5 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    within = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs) / 72
    across = sum(kernel(x, y) for x in a for y in b) / 81
    got = distances.kid(a, b, subsets=1, subset_size=9, seed=0)
    assert got.mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert got.mean == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kid_scatters_about_zero_for_one_distribution_and_sees_a_shift() -> None:
    one, other = normal(400, 16, 0), normal(400, 16, 1)
    null = distances.kid(one, other, subsets=50, subset_size=50, seed=0)
    shifted = distances.kid(one, other + 0.5, subsets=50, subset_size=50, seed=0)
    assert abs(null.mean) < 0.02 < 0.2 < shifted.mean
    assert null.std > 0


def test_kid_is_the_seeds_and_leaves_the_global_generator_alone() -> None:
    a, b = normal(40, 4, 0), normal(40, 4, 1)
    before = torch.random.get_rng_state()
    first = distances.kid(a, b, subsets=5, subset_size=10, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert distances.kid(a, b, subsets=5, subset_size=10, seed=7) == first
    assert distances.kid(a, b, subsets=5, subset_size=10, seed=8) != first


# --- precision and recall --------------------------------------------------------------------------------


def test_precision_and_recall_counted_by_hand() -> None:
    """Points on a line, one neighbour. Radii of the real: 1, 1, 2, 2; of the drawn: 2, 2, 8.5.

    Drawn within the real manifold: 0.5 (of 0) and 11 (of 10), not 2.5 (1.5 from 1, beyond its radius).
    Real within the drawn manifold: 0, 1 (of 0.5), 10, 12 (of 11): all.
    """
    real = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    fake = torch.tensor([[0.5], [2.5], [11.0]])
    got = distances.precision_recall(real, fake, neighbours=1)
    assert got.precision == pytest.approx(2 / 3)
    assert got.recall == 1.0
    swapped = distances.precision_recall(fake, real, neighbours=1)
    assert (swapped.precision, swapped.recall) == (got.recall, got.precision)


def test_collapse_costs_recall_and_noise_costs_precision() -> None:
    real = normal(100, 6, 0)
    collapsed = real[:1] + 0.01 * normal(100, 6, 1)
    assert distances.precision_recall(real, collapsed).precision == 1.0
    assert distances.precision_recall(real, collapsed).recall < 0.1
    assert distances.precision_recall(real, 8 * normal(100, 6, 2)).precision < 0.2
    same = distances.precision_recall(real, real)
    assert (same.precision, same.recall) == (1.0, 1.0)


# --- neighbours ------------------------------------------------------------------------------------------


def test_planted_copies_are_nearest_at_nothing() -> None:
    train, fake = normal(200, 32, 0), normal(20, 32, 1)
    fake[3], fake[11] = train[50], 2.0 * train[7]  # the same direction: the cosine sees no length
    nearest = distances.nearest_distance(fake, train)
    assert (nearest < 1e-9).nonzero().flatten().tolist() == [3, 11]
    assert nearest.argmin() in (3, 11) and nearest.median() > 0.3


def test_a_picture_is_not_its_own_neighbour_where_that_is_said() -> None:
    train = normal(50, 8, 0)
    index = torch.tensor([4, 9])
    got = distances.nearest_distance(train[index], train, index)
    for row, own in zip(got, index, strict=True):
        others = torch.cat([train[:own], train[own + 1 :]])
        assert float(row) == pytest.approx(
            float(distances.cosine_distance(train[own].expand(49, 8), others).min())
        )


def test_cosine_distance_of_known_angles() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert distances.cosine_distance(a, b).tolist() == pytest.approx([0, 1, 1 - math.sqrt(0.5)])


# --- retrieval -------------------------------------------------------------------------------------------


def test_retrieval_finds_all_one_in_n_and_none() -> None:
    eye = torch.eye(100)
    assert distances.retrieval_r_at_1(eye, eye, candidates=100, seed=0) == 1.0
    assert distances.retrieval_r_at_1(eye, eye.roll(1, 0), candidates=100, seed=0) == 0.0
    half = torch.cat([eye[:50], eye[50:].roll(1, 0)])
    assert distances.retrieval_r_at_1(half, eye, candidates=100, seed=0) == 0.5
    chance = distances.retrieval_r_at_1(
        nn.functional.normalize(normal(400, 64, 0), dim=1),
        nn.functional.normalize(normal(400, 64, 1), dim=1),
        candidates=10,
        seed=0,
    )
    assert chance == pytest.approx(0.1, abs=0.05)


def test_a_tie_is_lost() -> None:
    same = torch.ones(5, 1)
    assert distances.retrieval_r_at_1(same, same, candidates=5, seed=0) == 0.0


def test_fewer_candidates_are_easier() -> None:
    pictures = nn.functional.normalize(torch.eye(200).double() + 0.4 * normal(200, 200, 0), dim=1)
    few, many = (distances.retrieval_r_at_1(pictures, torch.eye(200), candidates=n, seed=0) for n in (5, 200))
    assert many < few


@pytest.mark.parametrize("measure", ["kid", "frechet", "precision_recall", "retrieval"])
def test_too_few_pictures_are_an_error(measure: str) -> None:
    one = torch.ones(1, 4)
    calls = {
        "kid": lambda: distances.kid(one, one, subsets=1, subset_size=1, seed=0),
        "frechet": lambda: distances.frechet_distance(one, one),
        "precision_recall": lambda: distances.precision_recall(one, one),
        "retrieval": lambda: distances.retrieval_r_at_1(one, one, candidates=100, seed=0),
    }
    with pytest.raises(ValueError, match="expected"):
        calls[measure]()
