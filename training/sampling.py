"""Drawing with a many-step teacher: DPM-Solver++ with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
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
    solver: DPMSolverMultistepScheduler | None = None,
    watch: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """Latents float32 (N, C, h, w) drawn from ``noise`` by a UNet that predicts what ``solver`` says (ε, or v
    of Salimans & Ho 2022); without one, ε on Stable Diffusion's schedule.

    ``text`` (N, L, D) and ``empty`` (1, L, D) are text-encoder states; ε = ε(∅) + w·(ε(text) − ε(∅)), and
    with w ≤ 1 the text alone, as diffusers has it. The UNet computes in its own type, the solver in float32.
    ``watch`` is told of every point of the path: σ/α of the schedule there, and the latents.
    """
    solver = solver or dpm_solver()
    solver.set_timesteps(steps, device=noise.device)
    guided = guidance > 1
    states = (torch.cat([empty.expand_as(text), text]) if guided else text).to(unet.dtype)
    x = noise * solver.init_noise_sigma
    sigmas = solver.sigmas.tolist()  # σ/α at every timestep, and where the last one leads
    for i, t in enumerate(solver.timesteps):
        if watch is not None:
            watch(sigmas[i], x)
        z = (torch.cat([x, x]) if guided else x).to(unet.dtype, memory_format=torch.channels_last)
        predicted = unet(z, t, states).sample.float()
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        x = solver.step(predicted, t, x).prev_sample
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
