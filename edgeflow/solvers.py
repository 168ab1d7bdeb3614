"""How a many-step model is drawn: from noise to latent by its own kind of solver. Imports torch in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError
from edgeflow.facts import read_json
from edgeflow.spec import FIRST_TIMESTEP

#: (latent (1, C, h, w), timestep) → what the network predicts, guidance included.
Predict = Callable[[Any, Any], Any]


def solve(checkpoint: Checkpoint, predict: Predict, noise: Any, steps: int) -> Any:
    """Noise (1, C, h, w) float32 → UNet latent. Rectified flows by Euler, diffusion models by DPM-Solver++.

    Raises CheckpointError for a diffusion model without the scheduler's config, which says its noise levels.
    """
    if checkpoint.kind == "rectified-flow":
        return euler(predict, noise, steps)
    return dpm_solver(checkpoint, predict, noise, steps)


def euler(predict: Predict, noise: Any, steps: int) -> Any:
    """x ← x + v(x, 1000·(1 − τ))/N for τ = 0, 1/N … (InstaFlow, arXiv 2309.06380, equation 1)."""
    latent = noise
    for i in range(steps):
        latent = latent + predict(latent, FIRST_TIMESTEP * (1 - i / steps)) / steps
    return latent


def dpm_solver(checkpoint: Checkpoint, predict: Predict, noise: Any, steps: int) -> Any:
    """DPM-Solver++(2M) on the checkpoint's own noise levels (Lu et al. 2022, arXiv 2211.01095)."""
    solver = scheduler_of(checkpoint)
    solver.set_timesteps(steps)
    latent = noise * solver.init_noise_sigma
    for t in solver.timesteps:
        latent = solver.step(predict(solver.scale_model_input(latent, t), t), t, latent).prev_sample
    return latent


def scheduler_of(checkpoint: Checkpoint) -> Any:
    """diffusers' DPM-Solver++(2M) on the checkpoint's own noise levels and prediction type.

    Raises CheckpointError for a diffusion model without one, or of a prediction type that is not known.
    """
    from diffusers import DPMSolverMultistepScheduler

    config = read_json(checkpoint.root / "scheduler" / "scheduler_config.json")
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise CheckpointError(
            f"checkpoint: {checkpoint.root / 'scheduler'}: prediction_type {kind!r} is not known; "
            "known: epsilon, sample, v_prediction"
        )
    return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
