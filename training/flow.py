"""Rectified flow's mathematics, in InstaFlow's convention.

τ = 0 is noise x₀, τ = 1 is the picture's latent x₁; x_τ = τ·x₁ + (1−τ)·x₀; velocity v = x₁ − x₀;
the network's timestep is the float 1000·(1−τ). Shapes: x (N, C, h, w), τ (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

#: A velocity field: (x (N, C, h, w), timestep (N,)) → velocity (N, C, h, w).
Velocity = Callable[[Tensor, Tensor], Tensor]


def timestep(tau: Tensor) -> Tensor:
    """The network's float timestep, 1000·(1−τ): 1000.0 at pure noise."""
    return 1000.0 * (1.0 - tau)


def interpolate(noise: Tensor, latent: Tensor, tau: Tensor) -> Tensor:
    """x_τ on the straight line from ``noise`` to ``latent``."""
    tau = tau.view(-1, 1, 1, 1)
    return tau * latent + (1.0 - tau) * noise


def euler(velocity: Velocity, noise: Tensor, num_steps: int) -> Tensor:
    """Integrate dx = v(x, τ) dτ from τ = 0 to 1 in equal Euler steps. One step is x₀ + v(x₀, 1000)."""
    x = noise
    for i in range(num_steps):
        tau = torch.full((len(x),), i / num_steps, device=x.device)
        x = x + velocity(x, timestep(tau)) / num_steps
    return x


@dataclass(frozen=True)
class Path:
    """A sampler's path in the flow's own coordinates: points z_τ (N, C, h, w) at times τ from 0 to 1."""

    tau: tuple[float, ...]
    points: tuple[Tensor, ...]

    @property
    def transport(self) -> Tensor:
        """‖z₁ − z₀‖² per sample (N,), summed over the latent's elements: how far noise is carried."""
        return (self.points[-1] - self.points[0]).square().flatten(1).sum(1)

    @property
    def straightness(self) -> Tensor:
        """The sum of ``bends``, per sample (N,): S; 0 where the path is a straight line."""
        return self.bends.sum(0)

    @property
    def bends(self) -> Tensor:
        """S = ∫ ‖(z₁ − z₀) − v(z_τ, τ)‖² dτ, each segment's share of it (segments, N).

        InstaFlow (arXiv 2309.06380), section 2. The velocity of a segment is what the sampler took, (z_b −
        z_a)/(τ_b − τ_a), which for Euler steps is the network's own v(z_a, τ_a); segments count by
        their length in τ, elements are summed.
        """
        chord = self.points[-1] - self.points[0]
        found = []
        for i, (a, b) in enumerate(pairwise(self.tau)):
            velocity = (self.points[i + 1] - self.points[i]) / (b - a)
            found.append((b - a) * (chord - velocity).square().flatten(1).sum(1))
        return torch.stack(found)


def euler_path(velocity: Velocity, noise: Tensor, num_steps: int) -> Path:
    """The path of ``euler``, all its points kept."""
    points = [noise]
    for i in range(num_steps):
        tau = torch.full((len(noise),), i / num_steps, device=noise.device)
        points.append(points[-1] + velocity(points[-1], timestep(tau)) / num_steps)
    return Path(tuple(i / num_steps for i in range(num_steps + 1)), tuple(points))


def straightness(velocity: Velocity, noise: Tensor, num_steps: int) -> Tensor:
    """S per sample (N,) along the flow's own Euler path (see ``Path.straightness``)."""
    return euler_path(velocity, noise, num_steps).straightness


def u_shaped(uniform: Tensor, mirror: Tensor, a: float = 4.0) -> Tensor:
    """Times of density ∝ cosh-like U on [0, 1]: t ~ a·e^{at}/(e^a − 1), mirrored where ``mirror`` < ½.

    Lee et al. 2024 (arXiv 2405.20320): reflowed pairs are hardest near both ends. ``uniform`` and
    ``mirror`` are U(0, 1) of shape (N,).
    """
    t = torch.log1p(uniform * (torch.exp(torch.tensor(a)).item() - 1.0)) / a
    return torch.where(mirror < 0.5, t, 1.0 - t)


def times_of(kind: str, uniform: Tensor, mirror: Tensor) -> Tensor:
    """Times τ (N,), ``u-shaped`` or ``uniform`` on [0, 1], of two U(0, 1) draws of shape (N,)."""
    return u_shaped(uniform, mirror) if kind == "u-shaped" else uniform


#: What :func:`times_of` knows.
TIMES = ("u-shaped", "uniform")
