"""Reflow: learn the velocity of straight lines between each pair's noise and latent.

min_v E ‖(x₁ − x₀) − v(x_τ, τ | text)‖² over the teacher's pairs (InstaFlow, arXiv 2309.06380, section 2),
with a pseudo-Huber norm and U-shaped times (Lee et al. 2024, arXiv 2405.20320); ``loss`` "l2" and ``times``
"uniform" are the paper's own. The text encoder stays as the teacher's, so its states are computed once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeflow.training import flow
from edgeflow.training.config import LoopConfig
from edgeflow.training.corpus import caption_states
from edgeflow.training.draw import Draw
from edgeflow.training.flow_model import draw_flow_sheet, save_flow
from edgeflow.training.loop import averaged_copy
from edgeflow.training.losses import NORMS, check_choice, latent_distance
from edgeflow.training.models import Parts, load_parts
from edgeflow.training.pairs import Pairs


@dataclass(frozen=True)
class ReflowConfig:
    loop: LoopConfig
    keep_nearest: float = 0.9  # fraction of pairs kept, by distance
    sample_steps: int = 25
    times: str = "u-shaped"  # or "uniform"
    loss: str = "huber"  # or "l2"

    def __post_init__(self) -> None:
        check_choice("times", self.times, flow.TIMES)
        check_choice("loss", self.loss, NORMS)


class ReflowObjective:
    """Trains the UNet to the velocity of straight lines, starting from the teacher's weights."""

    def __init__(self, config: ReflowConfig, teacher: Path | Parts, pairs: Pairs, device: torch.device):
        self.config, self.device = config, device
        self.parts = teacher if isinstance(teacher, Parts) else load_parts(teacher)
        torch.manual_seed(config.loop.seed)
        unet = self.parts.unet.to(device, memory_format=torch.channels_last)
        if self.parts.facts["kind"] == "diffusion":
            # At τ = 0 the velocity is x₁ − x₀ and an ε-network predicts x₀: its negative is nearest.
            with torch.no_grad():
                unet.conv_out.weight.neg_()
                unet.conv_out.bias.neg_()
        self.trained = nn.ModuleDict({"unet": unet})
        self.averaged = averaged_copy(self.trained)
        self.draw = Draw(config.loop.batch_size, device)
        self.pairs = pairs.nearest(config.keep_nearest)
        self.text = caption_states(self.parts, pairs.captions, device)
        if config.loop.compile:
            unet.compile()

    def loss(self) -> dict[str, Tensor]:
        index = self.draw.index(len(self.pairs.noise))
        noise, latent = self.pairs.noise[index], self.pairs.latent[index]
        tau = flow.times_of(self.config.times, self.draw.uniform(), self.draw.uniform())
        x = flow.interpolate(noise, latent, tau).contiguous(memory_format=torch.channels_last)
        text = self.text[self.pairs.caption[index]]
        velocity = self.trained["unet"](x, flow.timestep(tau), text).sample
        loss = latent_distance(self.config.loss, velocity, latent - noise)
        return {"loss": loss, "mse": (velocity.float() - (latent - noise)).square().mean()}

    def batch_keys(self, index: Tensor) -> list[str]:
        return self.pairs.names(index)

    def save(self, folder: Path) -> None:
        facts = {
            "kind": "rectified-flow",
            "steps": self.config.sample_steps,
            "guidance": 0.0,
            "training": dataclasses.asdict(self.config),
        }
        save_flow(self.parts, self.averaged["unet"], folder, facts)

    def draw_sheet(self, path: Path) -> None:
        """The flow at 1, 2 and 25 Euler steps from the same noise."""
        counts = (1, 2, self.config.sample_steps)
        draw_flow_sheet(
            path, self.parts, self.averaged["unet"], self.pairs.captions, counts, self.config.loop.bf16
        )
