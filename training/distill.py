"""Distillation: the flow's whole path in one step, at τ = 0 only.

min_v E D(ODE[v_k](x₀ | text), x₀ + v(x₀, 1000 | text)) (InstaFlow, arXiv 2309.06380, section 2). The target
is integrated online from fresh noise by the frozen flow, or taken from the pairs; D is a pseudo-Huber norm
on latents (or their mean squared error) plus, when weighted, the perceptual distance of the decoded
pictures. Of the pairs, online targets use the captions alone.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeflow.errors import UsageError
from edgeflow.spec import FIRST_TIMESTEP
from edgeflow.training import flow
from edgeflow.training.config import LoopConfig
from edgeflow.training.draw import Draw
from edgeflow.training.flow_model import draw_flow_sheet, save_flow, velocity_field
from edgeflow.training.loop import averaged_copy
from edgeflow.training.losses import NORMS, PerceptualDistance, check_choice, latent_distance
from edgeflow.training.models import Parts, load_parts
from edgeflow.training.pair_source import PairFolder, pair_source
from edgeflow.training.pairs import Pairs
from edgeflow.training.student import begin_student


@dataclass(frozen=True)
class DistillConfig:
    loop: LoopConfig
    target_steps: int = 0  # Euler steps of the frozen flow from fresh noise; 0: the pairs' own latents
    latent_weight: float = 1.0
    perceptual_weight: float = 0.0
    keep_nearest: float = 1.0
    loss: str = "huber"  # of the latents; or "l2"
    student: str = "same"  # or "small": a UNet of half the parameters or less (student.py)
    pairs_gib: float = 24.0  # more pairs than this, with their captions' states, are streamed

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, NORMS)


class DistillObjective:
    """Trains a one-step UNet, starting from ``source``'s weights.

    ``flow_source`` is the checkpoint that online targets are integrated from; ``source`` itself if not given.
    Raises UsageError for one that the settings have no use for, or whose other parts are not the source's.
    """

    def __init__(
        self,
        config: DistillConfig,
        source: Path | Parts,
        pairs: Pairs | PairFolder,
        device: torch.device,
        flow_source: Path | None = None,
    ):
        if flow_source is not None and not config.target_steps:
            raise UsageError("train distill: --flow: expected target_steps of 1 or more, got 0")
        self.config, self.device = config, device
        self.parts = source if isinstance(source, Parts) else load_parts(source)
        torch.manual_seed(config.loop.seed)
        unet = self.parts.unet.to(device, memory_format=torch.channels_last)
        self.flow = None
        if config.target_steps:
            frozen = _flow_unet(flow_source, self.parts) if flow_source else copy.deepcopy(unet)
            self.flow = frozen.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        unet, self.student = begin_student(config.student, self.parts, unet)
        self.trained = nn.ModuleDict({"unet": unet})
        self.averaged = averaged_copy(self.trained)
        self.draw = Draw(config.loop.batch_size, device)
        batch, keep = config.loop.batch_size, config.keep_nearest
        self.source = pair_source(
            pairs, self.parts, device, batch_size=batch, keep=keep, seed=config.loop.seed
        )
        self.pairs, self.text = self.source.pairs, self.source.text
        self.vae = self.parts.vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
        self.perceptual = PerceptualDistance().to(device) if config.perceptual_weight else None
        if config.loop.compile:
            unet.compile()
            if self.flow is not None:
                self.flow.compile()
            if self.perceptual is not None:
                self.vae.decoder.compile()
                self.perceptual.compile()

    def loss(self) -> dict[str, Tensor]:
        index = self.draw.index(len(self.pairs.noise))
        text = self.text[self.pairs.caption[index]]
        if self.flow is None:
            noise, target = self.pairs.noise[index], self.pairs.latent[index]
        else:
            noise = self.draw.normal(*self.pairs.noise.shape[1:])
            with torch.no_grad():
                target = flow.euler(velocity_field(self.flow, text), noise, self.config.target_steps)
        noise = noise.contiguous(memory_format=torch.channels_last)
        t = torch.full((len(index),), FIRST_TIMESTEP, device=self.device)
        drawn = noise + self.trained["unet"](noise, t, text).sample.float()
        latent = latent_distance(self.config.loss, drawn, target)
        losses = {"loss": self.config.latent_weight * latent, "latent": latent}
        if self.perceptual is not None:
            scale = self.vae.config.scaling_factor
            with torch.no_grad():
                wanted = self.vae.decode(target / scale).sample
            perceptual = self.perceptual(self.vae.decode(drawn / scale).sample, wanted)
            losses["loss"] = losses["loss"] + self.config.perceptual_weight * perceptual
            losses["perceptual"] = perceptual
        return losses

    def batch_keys(self, index: Tensor) -> list[str]:
        return self.source.names(index)

    def prepare(self, done: int) -> None:
        self.source.prepare(done)

    def save(self, folder: Path) -> None:
        facts = {"kind": "one-step", "steps": 1, "guidance": 0.0, "training": dataclasses.asdict(self.config)}
        if self.student is not None:
            facts["student"] = self.student.facts()
        save_flow(self.parts, self.averaged["unet"], folder, facts)

    def draw_sheet(self, path: Path) -> None:
        """One-step pictures of 32 prompts."""
        draw_flow_sheet(
            path, self.parts, self.averaged["unet"], self.pairs.captions, (1,), self.config.loop.bf16
        )


def _flow_unet(source: Path, parts: Parts) -> nn.Module:
    """The UNet of the flow in ``source``, whose latents and text states must be those of ``parts``."""
    other = load_parts(source)
    for name in ("vae", "text_encoder"):
        mine, theirs = (getattr(p, name).state_dict() for p in (parts, other))
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[k], theirs[k]) for k in mine):
            raise UsageError(f"train distill: --flow {source}: expected the {name} of --from, got another")
    return other.unet
