"""diffusers' scheduler for a rectified flow, shipped in the folder ``scheduler/`` of a checkpoint.

The flow is x_τ = τ·x₁ + (1 − τ)·x₀ from noise x₀ at τ = 0 to the latent x₁ at τ = 1. The network takes the
timestep 1000·(1 − τ) and predicts the velocity x₁ − x₀; Euler's steps follow it (Liu et al. 2022, arXiv
2209.03003). A one-step model takes one of them: x₁ = x₀ + v(x₀, 1000).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Euler's method on a rectified flow, in equal steps of τ."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Timesteps 1000, …, 1000/n of n steps, float32 (n,)."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected 1 or more, got {num_inference_steps}")
        self.num_inference_steps = num_inference_steps
        left = torch.arange(num_inference_steps, 0, -1, dtype=torch.float32) / num_inference_steps
        self.timesteps = (self.config.num_train_timesteps * left).to(device or "cpu")

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The network takes the sample as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """From ``sample`` along the velocity ``model_output`` by 1/n of the way; both of one shape."""
        moved = sample + model_output / self.num_inference_steps
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)
