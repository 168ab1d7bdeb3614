"""Rectified flow's mathematics, in InstaFlow's convention.

τ = 0 is noise x₀, τ = 1 is the picture's latent x₁; x_τ = τ·x₁ + (1−τ)·x₀; velocity v = x₁ − x₀;
the network's timestep is the float 1000·(1−τ). Shapes: x (N, C, h, w), τ (N,).
"""

from __future__ import annotations

from collections.abc import Callable

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


def straightness(velocity: Velocity, noise: Tensor, num_steps: int) -> Tensor:
    """S = ∫ ‖(z₁ − z₀) − v(z_τ, τ)‖² dτ along the flow's own Euler path, per sample (N,).

    InstaFlow (arXiv 2309.06380), section 2: a mean over steps, a sum over the latent's
    elements; 0 where every path is a straight line.
    """
    x, velocities = noise, []
    for i in range(num_steps):
        tau = torch.full((len(x),), i / num_steps, device=x.device)
        velocities.append(velocity(x, timestep(tau)))
        x = x + velocities[-1] / num_steps
    chord = x - noise
    return torch.stack([(chord - v).square().flatten(1).sum(1) for v in velocities]).mean(0)


def u_shaped(uniform: Tensor, mirror: Tensor, a: float = 4.0) -> Tensor:
    """Times of density ∝ cosh-like U on [0, 1]: t ~ a·e^{at}/(e^a − 1), mirrored where ``mirror`` < ½.

    Lee et al. 2024 (arXiv 2405.20320): reflowed pairs are hardest near both ends. ``uniform`` and
    ``mirror`` are U(0, 1) of shape (N,).
    """
    t = torch.log1p(uniform * (torch.exp(torch.tensor(a)).item() - 1.0)) / a
    return torch.where(mirror < 0.5, t, 1.0 - t)


#: What :func:`times` knows.
TIMES = ("u-shaped", "uniform")


def times(kind: str, uniform: Tensor, mirror: Tensor) -> Tensor:
    """Times τ (N,) of the density that ``kind`` names on [0, 1], from two U(0, 1) of shape (N,)."""
    return u_shaped(uniform, mirror) if kind == "u-shaped" else uniform
