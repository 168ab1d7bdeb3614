"""Drawing with a many-step teacher: DPM-Solver++ with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from edgeflow.training.models import dpm_solver


def seeded_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32 (N, *shape): row i is ``torch.randn`` of a CPU generator seeded with ``seeds[i]``."""
    rows = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds.tolist()]
    return torch.stack(rows)


@torch.no_grad()
def sample_teacher(
    unet: UNet2DConditionModel,
    text: Tensor,
    empty: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    watch: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """Latents (N, C, h, w) drawn from ``noise`` by an ε-predicting UNet.

    ``text`` (N, L, D) and ``empty`` (1, L, D) are text-encoder states; ε = ε(∅) + w·(ε(text) − ε(∅)).
    ``watch`` is told of every point of the path: σ/α of the schedule there, and the latents.
    """
    solver = dpm_solver()
    solver.set_timesteps(steps, device=noise.device)
    both = torch.cat([empty.expand_as(text), text])
    x = noise * solver.init_noise_sigma
    sigmas = solver.sigmas.tolist()  # σ/α at every timestep, and where the last one leads
    for i, t in enumerate(solver.timesteps):
        if watch is not None:
            watch(sigmas[i], x)
        unconditional, conditional = unet(torch.cat([x, x]), t, both).sample.float().chunk(2)
        epsilon = unconditional + guidance * (conditional - unconditional)
        x = solver.step(epsilon, t, x).prev_sample
    if watch is not None:
        watch(sigmas[-1], x)
    return x


@torch.no_grad()
def decode(vae: AutoencoderTiny, latents: Tensor, batch_size: int = 64) -> Tensor:
    """uint8 pictures (N, 3, S, S) of UNet-scale latents, on the CPU."""
    pictures = [vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(batch_size)]
    return to_uint8(torch.cat(pictures))


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] to uint8 on the CPU."""
    return ((pictures.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
