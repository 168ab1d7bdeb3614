"""Distribution matching: a last stage that makes one-step pictures the teacher's as a set. Not InstaFlow.

A distance to the teacher's picture of the same noise is smallest at a mean of the pictures that could be
meant. DMD (Yin et al. 2023, arXiv 2311.18828; 2024, arXiv 2405.14867) follows instead the gradient of the
Kullback-Leibler divergence between the student's pictures and the teacher's, diffused: the difference of two
denoisers at the same noisy point, the teacher's and that of a second network, the *fake* one, which is
trained along on what the student draws. A part of the batch keeps the distance to the teacher's own latents.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import ConfigError
from edgeflow.solvers import scheduler_of
from edgeflow.spec import FIRST_TIMESTEP
from edgeflow.training.config import LoopConfig
from edgeflow.training.corpus import caption_states
from edgeflow.training.draw import Draw
from edgeflow.training.flow_model import draw_flow_sheet, parts_beside, save_flow
from edgeflow.training.loop import averaged_copy
from edgeflow.training.losses import NORMS, check_choice, latent_distance
from edgeflow.training.models import load_parts
from edgeflow.training.pair_source import PairFolder, pair_source
from edgeflow.training.pairs import Pairs

#: Timesteps that are judged at, as fractions of the schedule: at its very ends one of the two says nothing.
_EARLIEST, _LATEST = 0.02, 0.98


@dataclass(frozen=True)
class DmdConfig:
    loop: LoopConfig
    guidance: float = 3.0  # of the teacher's denoiser; 1: none
    matching_weight: float = 1.0
    latent_weight: float = 0.25  # of the distance to the pairs' latents
    paired_fraction: float = 0.25  # of the batch that starts from the pairs' noise; the rest from fresh noise
    fake_rate: float = 2.0  # the fake network's learning rate over the student's
    keep_nearest: float = 1.0
    loss: str = "huber"  # of the latents; or "l2"
    pairs_gib: float = 24.0  # more pairs than this, with their captions' states, are streamed

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, NORMS)
        if not 0.0 <= self.paired_fraction <= 1.0:
            raise ConfigError(f"config: paired_fraction: expected 0 to 1, got {self.paired_fraction}")


class DmdObjective:
    """Trains a one-step UNet so that its pictures, diffused, are distributed as ``score``'s.

    ``score`` is a diffusion checkpoint with the autoencoder and text encoder of ``source``; raises UsageError
    for another. The fake network starts as a copy of it. Both sides step together: one loss, one backward
    pass, gradients that never cross.
    """

    def __init__(
        self,
        config: DmdConfig,
        source: Path,
        score: Path,
        pairs: Pairs | PairFolder,
        device: torch.device,
    ):
        self.config, self.device = config, device
        self.parts = load_parts(source)
        teacher = parts_beside(score, self.parts, "train dmd: --score")
        torch.manual_seed(config.loop.seed)
        unet = self.parts.unet.to(device, memory_format=torch.channels_last)
        fake = teacher.unet.to(device, memory_format=torch.channels_last)
        self.score = copy.deepcopy(fake).eval().requires_grad_(False)
        self.velocity = teacher.prediction == "v_prediction"
        self.alpha_bar = scheduler_of(Checkpoint.open(score)).alphas_cumprod.to(device)
        self.draw = Draw(config.loop.batch_size, device)
        batch, keep = config.loop.batch_size, config.keep_nearest
        self.source = pair_source(
            pairs, self.parts, device, batch_size=batch, keep=keep, seed=config.loop.seed
        )
        self.pairs, self.text = self.source.pairs, self.source.text
        self.empty = caption_states(self.parts, [""], device)
        self.trained = nn.ModuleDict({"unet": unet, "fake": fake})
        self.averaged = averaged_copy(nn.ModuleDict({"unet": unet}))
        if config.loop.compile:
            for network in (unet, fake, self.score):
                network.compile(dynamic=False)

    @property
    def adamw(self) -> dict[str, dict[str, Any]]:
        """The loop's options by module: the fake network has to follow a student that moves (two time-scale
        update rule, Heusel et al. 2017, arXiv 1706.08500)."""
        return {"fake": {"rate": self.config.fake_rate}}

    def loss(self) -> dict[str, Tensor]:
        config, index = self.config, self.draw.index(len(self.pairs.noise))
        text, target = self.text[self.pairs.caption[index]], self.pairs.latent[index]
        paired = self.draw.uniform(1, 1, 1) < config.paired_fraction
        noise = torch.where(paired, self.pairs.noise[index], self.draw.normal(*target.shape[1:]))
        noise = noise.contiguous(memory_format=torch.channels_last)
        t = torch.full((len(index),), FIRST_TIMESTEP, device=self.device)
        drawn = noise + self.trained["unet"](noise, t, text).sample.float()

        gradient, fake = self._compare(drawn.detach(), text)
        losses = {
            "matching": 0.5 * F.mse_loss(drawn, (drawn - gradient).detach()),
            "fake": fake,
            # where the noise is not a pair's, the distance is zero and so is its gradient
            "latent": latent_distance(config.loss, torch.where(paired, drawn, target), target)
            / max(config.paired_fraction, 1e-6),
        }
        total = config.matching_weight * losses["matching"] + config.latent_weight * losses["latent"]
        return {"loss": total + losses["fake"], **losses}

    def _compare(self, drawn: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The direction that leads ``drawn`` (N, C, h, w) away from the teacher's pictures, and the fake
        network's own loss. One diffused point serves both."""
        last = len(self.alpha_bar)
        span = int(_LATEST * last) - int(_EARLIEST * last)
        t = int(_EARLIEST * last) + self.draw.integers(span)
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        noise = self.draw.normal(*drawn.shape[1:])
        noisy = alpha_bar.sqrt() * drawn + (1 - alpha_bar).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)

        of_fake = self.trained["fake"](noisy, t.float(), text).sample.float()
        wanted = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * drawn if self.velocity else noise
        of_teacher = self._guided(noisy, t.float(), text)
        real, fake = (
            denoised(p, noisy, alpha_bar, velocity=self.velocity) for p in (of_teacher, of_fake.detach())
        )
        return matching_gradient(drawn, real, fake), F.mse_loss(of_fake, wanted)

    @torch.no_grad()
    def _guided(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What the teacher predicts with classifier-free guidance, as it is drawn with."""
        w = self.config.guidance
        if w <= 1:
            return self.score(noisy, t, text).sample.float()
        states = torch.cat([self.empty.expand_as(text), text])
        twice = torch.cat([noisy, noisy]).contiguous(memory_format=torch.channels_last)
        without, given = self.score(twice, torch.cat([t, t]), states).sample.float().chunk(2)
        return without + w * (given - without)

    def batch_keys(self, index: Tensor) -> list[str]:
        return self.source.names(index)

    def prepare(self, done: int) -> None:
        self.source.prepare(done)

    def save(self, folder: Path) -> None:
        facts = {"kind": "one-step", "steps": 1, "guidance": 0.0, "training": dataclasses.asdict(self.config)}
        save_flow(self.parts, self.averaged["unet"], folder, facts)

    def draw_sheet(self, path: Path) -> None:
        """One-step pictures of 32 prompts."""
        draw_flow_sheet(
            path, self.parts, self.averaged["unet"], self.pairs.captions, (1,), self.config.loop.bf16
        )


def denoised(predicted: Tensor, noisy: Tensor, alpha_bar: Tensor, *, velocity: bool) -> Tensor:
    """The clean latent that a prediction (ε, or v = √ᾱ·ε − √(1−ᾱ)·x of Salimans & Ho 2022, arXiv 2202.00512)
    at ``noisy`` = √ᾱ·x + √(1−ᾱ)·ε stands for; all (N, C, h, w), ``alpha_bar`` (N, 1, 1, 1)."""
    sigma = (1 - alpha_bar).sqrt()
    if velocity:
        return alpha_bar.sqrt() * noisy - sigma * predicted
    return (noisy - sigma * predicted) / alpha_bar.sqrt()


def matching_gradient(drawn: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(fake − real) / mean |drawn − real|, the mean over a sample: DMD's gradient and its weight (arXiv
    2311.18828, equations 7 and 8), which gives every noise level the same say. All (N, C, h, w)."""
    size = (drawn - real).abs().mean((1, 2, 3), keepdim=True)
    return (fake - real) / size.clamp_min(1e-4)
