"""Losses at points where their value is known."""

from __future__ import annotations

import pytest
import torch

from edgeflow.training.losses import PerceptualDistance, latent_moments, pseudo_huber


def test_pseudo_huber_is_quadratic_near_and_linear_far() -> None:
    target = torch.zeros(1, 4, 8, 8)
    d, c = target.numel(), 0.03 * target.numel() ** 0.5
    near, far = torch.full_like(target, 1e-4), torch.full_like(target, 100.0)
    assert pseudo_huber(near, target).item() == pytest.approx(d * 1e-8 / (2 * c) / d**0.5, rel=2e-2)
    assert pseudo_huber(far, target).item() == pytest.approx(100.0, rel=1e-3)
    assert pseudo_huber(target, target).item() == 0.0


def test_latent_moments_is_the_gaussian_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(512, 2, 8, 8, generator=generator)
    z[:, 1] = 2.0 * z[:, 1] + 3.0
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(3.0, 2.0), torch.distributions.Normal(0.0, 1.0)
    )
    assert latent_moments(z).item() == pytest.approx(wanted.item(), rel=2e-2)


def test_perceptual_distance_orders_blur_before_another_picture() -> None:
    distance = PerceptualDistance()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    picture = torch.nn.functional.interpolate(coarse, 64)
    blurred = torch.nn.functional.avg_pool2d(picture, 5, 1, 2)
    other = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1, 64)
    with torch.no_grad():
        same, near, far = (distance(x, picture).item() for x in (picture, blurred, other))
    assert same == 0.0 and 0.0 < near < far
    assert not distance.train().training  # its batch statistics stay ImageNet's
