"""Rectified flow's mathematics, held against cases with a known answer."""

from __future__ import annotations

import math

import pytest
import torch

from edgeflow.training import flow


def gaussian_velocity(spread: float) -> flow.Velocity:
    """E[X₁ − X₀ | X_τ = x] for independent X₀ ~ N(0, 1) and X₁ ~ N(0, spread²), in closed form."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tau = (1 - t / 1000).view(-1, 1, 1, 1)
        return x * (tau * spread**2 - (1 - tau)) / (tau**2 * spread**2 + (1 - tau) ** 2)

    return velocity


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_transport_cost_identity(spread: float) -> None:
    """E‖X₁−X₀‖² − E‖Z₁−Z₀‖² = S(Z) + V(X₀, X₁) (rectified flow paper, equation 15)."""
    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)  # the sample's own moments are exactly 0 and 1
    velocity = gaussian_velocity(spread)
    straight = flow.straightness(velocity, noise, 1000).mean()
    moved = (flow.euler(velocity, noise, 1000) - noise).square().mean()
    tau = torch.linspace(0, 1, 20001, dtype=torch.float64)
    explained = (tau * spread**2 - (1 - tau)) ** 2 / (tau**2 * spread**2 + (1 - tau) ** 2)
    variance = torch.trapezoid(1 + spread**2 - explained, tau)  # of X₁ − X₀ given X_τ, over τ
    assert (1 + spread**2 - moved).item() == pytest.approx((straight + variance).item(), rel=2e-3)
    assert moved.item() == pytest.approx((spread - 1) ** 2, rel=1e-2)  # the flow is the monotone map


def test_one_step_is_noise_plus_velocity_at_1000() -> None:
    noise = torch.randn(2, 3, 4, 4)
    seen = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return 2 * x

    assert torch.equal(flow.euler(velocity, noise, 1), noise + 2 * noise)
    assert seen[0].tolist() == [1000.0, 1000.0] and seen[0].dtype == torch.float32


def test_a_constant_velocity_is_straight_and_exact_in_any_number_of_steps() -> None:
    noise, latent = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return latent - noise

    for steps in (1, 2, 25):
        torch.testing.assert_close(flow.euler(velocity, noise, steps), latent, atol=1e-5, rtol=0)
    assert flow.straightness(velocity, noise, 8).max() < 1e-9


def test_interpolation_starts_at_noise_and_ends_at_the_latent() -> None:
    noise, latent = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert torch.equal(flow.interpolate(noise, latent, torch.zeros(2)), noise)
    assert torch.equal(flow.interpolate(noise, latent, torch.ones(2)), latent)
    assert flow.timestep(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1000.0, 750.0, 0.0]


def test_u_shaped_times_have_their_density() -> None:
    """The cumulative distribution is ½(F(t) + 1 − F(1−t)) with F(t) = (e^{at} − 1)/(e^a − 1)."""
    generator, a = torch.Generator().manual_seed(0), 4.0
    times = flow.u_shaped(*torch.rand(2, 200_000, generator=generator), a=a)
    assert times.min() >= 0 and times.max() <= 1
    for t in (0.05, 0.3, 0.5, 0.8):
        one = (math.exp(a * t) - 1) / (math.exp(a) - 1)
        other = (math.exp(a * (1 - t)) - 1) / (math.exp(a) - 1)
        assert (times < t).double().mean().item() == pytest.approx(0.5 * (one + 1 - other), abs=5e-3)
