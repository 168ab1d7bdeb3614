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
from edgeflow.training.draw import Draw
from edgeflow.training.flow_model import draw_flow_sheet, save_flow
from edgeflow.training.loop import averaged_copy
from edgeflow.training.losses import NORMS, check_choice, latent_distance
from edgeflow.training.models import Parts, load_parts
from edgeflow.training.pair_source import PairFolder, pair_source
from edgeflow.training.pairs import Pairs

#: What a diffusion network's output is multiplied with to be nearest to the velocity x₁ − x₀ at τ = 0, where
#: its input is the noise: its ε is x₀ there, and its v = √ᾱ·ε − √(1−ᾱ)·x₁ (Salimans & Ho 2022, arXiv
#: 2202.00512) is −x̂₁ but for √ᾱ = 0.07 of noise. For Gaussian pictures the factor of least squares is −1.01
#: to −1.05 for ε and −1.06 to −1.08 for v, the more so the surer (less sure) the caption makes the picture;
#: no factor gives the part that is missing, x̂₁ or −x₀.
FIRST_SIGN = {"epsilon": -1.0, "v_prediction": -1.0, "sample": 1.0}


@dataclass(frozen=True)
class ReflowConfig:
    loop: LoopConfig
    keep_nearest: float = 0.9  # fraction of pairs kept, by distance
    sample_steps: int = 25
    times: str = "u-shaped"  # or "uniform"
    loss: str = "huber"  # or "l2"
    pairs_gib: float = 24.0  # more pairs than this, with their captions' states, are streamed

    def __post_init__(self) -> None:
        check_choice("times", self.times, flow.TIMES)
        check_choice("loss", self.loss, NORMS)


class ReflowObjective:
    """Trains the UNet to the velocity of straight lines, starting from the teacher's weights."""

    def __init__(
        self,
        config: ReflowConfig,
        teacher: Path | Parts,
        pairs: Pairs | PairFolder,
        device: torch.device,
    ):
        self.config, self.device = config, device
        self.parts = teacher if isinstance(teacher, Parts) else load_parts(teacher)
        torch.manual_seed(config.loop.seed)
        unet = self.parts.unet.to(device, memory_format=torch.channels_last)
        if self.parts.facts["kind"] == "diffusion":
            with torch.no_grad():
                unet.conv_out.weight.mul_(FIRST_SIGN[self.parts.prediction])
                unet.conv_out.bias.mul_(FIRST_SIGN[self.parts.prediction])
        self.trained = nn.ModuleDict({"unet": unet})
        self.averaged = averaged_copy(self.trained)
        self.draw = Draw(config.loop.batch_size, device)
        batch, keep = config.loop.batch_size, config.keep_nearest
        self.source = pair_source(
            pairs, self.parts, device, batch_size=batch, keep=keep, seed=config.loop.seed
        )
        self.pairs, self.text = self.source.pairs, self.source.text
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
        return self.source.names(index)

    def prepare(self, done: int) -> None:
        self.source.prepare(done)

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
