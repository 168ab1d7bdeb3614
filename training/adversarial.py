"""The adversarial last stage: a one-step model made sharper. It is no part of InstaFlow.

A distance to the teacher's picture alone is smallest at a mean of the pictures that could be meant, which is
blurred. ADD (arXiv 2311.17042) and LADD (arXiv 2403.12015) put a discriminator beside it: here small heads on
the same frozen features that the perceptual distance uses, see ``discriminator``. Generator and discriminator
step together: one loss, one backward pass, gradients that never cross.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow.errors import ConfigError, UsageError
from edgeflow.spec import FIRST_TIMESTEP
from edgeflow.training.augmentation import KINDS, UNIFORMS, Augmentation
from edgeflow.training.config import LoopConfig
from edgeflow.training.corpus import Corpus, caption_states, encode_pictures
from edgeflow.training.discriminator import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    mean_logit,
    mismatch_loss,
)
from edgeflow.training.draw import Draw
from edgeflow.training.flow_model import draw_flow_sheet, save_flow
from edgeflow.training.loop import averaged_copy
from edgeflow.training.losses import NORMS, LiteFeatures, check_choice, feature_distance, latent_distance
from edgeflow.training.models import load_parts
from edgeflow.training.pair_source import PairFolder, pair_source
from edgeflow.training.pairs import Pairs

#: Blocks of EfficientNet-Lite0: the perceptual distance's own four (strides 2 to 16), and the last (32).
_TAPS = (0, 2, 4, 10, 15)
_PERCEPTUAL, _JUDGED = slice(0, 4), slice(1, 5)


@dataclass(frozen=True)
class AdversarialConfig:
    loop: LoopConfig
    latent_weight: float = 1.0
    perceptual_weight: float = 0.2
    adversarial_weight: float = 0.1
    adversarial_warmup: int = 300  # steps over which the adversarial weight rises from 0
    mismatch_weight: float = 0.0  # of real pictures under another's caption, in the discriminator's loss
    real_fraction: float = 0.0  # of the discriminator's real side: corpus pictures; the rest is the teacher's
    augment: tuple[str, ...] = KINDS
    discriminator_width: int = 64
    discriminator_rate: float = 2.0  # times the loop's learning rate
    keep_nearest: float = 1.0
    loss: str = "huber"  # of the latents; or "l2"
    pairs_gib: float = 24.0  # more pairs than this, with their captions' states, are streamed

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, NORMS)
        for kind in self.augment:
            check_choice("augment", kind, KINDS)
        if not 0.0 <= self.real_fraction <= 1.0:
            raise ConfigError(f"config: real_fraction: expected 0 to 1, got {self.real_fraction}")
        if self.discriminator_width < 8 or self.discriminator_width % 8:
            raise ConfigError(
                f"config: discriminator_width: expected a multiple of 8, got {self.discriminator_width}"
            )


class AdversarialObjective:
    """Trains a one-step UNet on pairs, against a discriminator that is trained along.

    The discriminator's real side is the pairs' latents and, with ``real``, that corpus's own, decoded both:
    so it cannot tell the autoencoder from reality, which no UNet could mend.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        source: Path,
        pairs: Pairs | PairFolder,
        real: Corpus | None,
        device: torch.device,
    ):
        if (real is not None) != (config.real_fraction > 0):
            raise UsageError(
                "train adversarial: expected --data DIR and real_fraction above 0, both or neither, got "
                f"{'--data' if real else 'no --data'} and real_fraction={config.real_fraction}"
            )
        self.config, self.device = config, device
        self.parts = load_parts(source)
        torch.manual_seed(config.loop.seed)
        unet = self.parts.unet.to(device, memory_format=torch.channels_last)
        self.draw = Draw(config.loop.batch_size, device)
        batch, keep = config.loop.batch_size, config.keep_nearest
        self.source = pair_source(
            pairs, self.parts, device, batch_size=batch, keep=keep, seed=config.loop.seed
        )
        self.pairs, self.text = self.source.pairs, self.source.text
        self.vae = self.parts.vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
        self.features = LiteFeatures(_TAPS).to(device, memory_format=torch.channels_last)
        self._condition(real)
        heads = Discriminator(
            self.features.channels[_JUDGED], self.text.shape[2], config.discriminator_width
        ).to(device)
        self.trained = nn.ModuleDict({"unet": unet, "discriminator": heads})
        self.steps = heads.steps
        self.averaged = averaged_copy(nn.ModuleDict({"unet": unet}))
        if config.loop.compile:
            unet.compile()
            # Called on two sizes of batch, with and without gradients: a graph each, none of unknown size.
            self.vae.decoder.compile(dynamic=False)
            self.features.compile(dynamic=False)

    @property
    def adamw(self) -> dict[str, dict[str, Any]]:
        """The loop's options by module: a discriminator without momentum follows a moving generator better
        (β₁ = 0, as in StyleGAN and Projected GAN)."""
        return {"discriminator": {"rate": self.config.discriminator_rate, "betas": (0.0, 0.99)}}

    def _condition(self, real: Corpus | None) -> None:
        """How captions are standardised for the discriminator, and the corpus's latents and captions."""
        deviation, self.middle = torch.std_mean(self.text.mean(1), 0, correction=0)
        self.spread = deviation + 1e-3
        self.real_latent = self.real_caption = None
        if real is not None:
            self.real_latent = encode_pictures(self.vae, real)
            self.real_caption = self._caption(caption_states(self.parts, real.captions, self.device))

    def _caption(self, text: Tensor) -> Tensor:
        """A caption as the discriminator sees it (N, D): the mean of its states (N, L, D), standardised."""
        return (text.mean(1) - self.middle) / self.spread

    def loss(self) -> dict[str, Tensor]:
        config, index = self.config, self.draw.index(len(self.pairs.noise))
        batch, text = len(index), self.text[self.pairs.caption[index]]
        target, noise = (
            self.pairs.latent[index],
            self.pairs.noise[index].contiguous(memory_format=torch.channels_last),
        )
        t = torch.full((batch,), FIRST_TIMESTEP, device=self.device)
        latent = noise + self.trained["unet"](noise, t, text).sample.float()

        wanted, captions, others = self._real_side(target, self._caption(text))
        uniform = torch.cat(
            [self.draw.uniform(UNIFORMS), self.draw.uniform(UNIFORMS)]
        )  # rows enough, and more
        changed = Augmentation(uniform[: batch + others], config.augment)
        with torch.no_grad():
            real = self.features(changed.apply(self._decode(wanted)))
        drawn = self.features(changed.first(batch).apply(self._decode(latent)))
        judged = self.trained["discriminator"](
            [x[others:] for x in real[_JUDGED]],
            captions[others:],
            drawn[_JUDGED],
            captions[:batch],
            mismatched=config.mismatch_weight > 0,
        )
        losses = {
            "latent": latent_distance(config.loss, latent, target),
            "perceptual": feature_distance(drawn[_PERCEPTUAL], [x[:batch] for x in real[_PERCEPTUAL]]),
            "adversarial": generator_loss(judged.drawn),
            "discriminator": discriminator_loss(judged.real, judged.fake),
            "logit_real": mean_logit(judged.real),
            "logit_fake": mean_logit(judged.fake),
        }
        if judged.mismatched:
            losses["mismatch"] = mismatch_loss(judged.mismatched)
        return {"loss": self._total(losses), **losses}

    def _real_side(self, target: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, int]:
        """The pairs' latents and captions (N, …), then those of ``others`` pictures of the corpus."""
        others = round(self.config.real_fraction * len(target))
        if self.real_latent is None or self.real_caption is None or not others:
            return target, captions, 0
        index = self.draw.integers(len(self.real_latent))[:others]
        return (
            torch.cat([target, self.real_latent[index]]),
            torch.cat([captions, self.real_caption[index]]),
            others,
        )

    def _decode(self, latent: Tensor) -> Tensor:
        """Pictures float32 in about [-1, 1] of UNet-scale latents."""
        latent = (latent / self.vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return self.vae.decode(latent).sample.float()

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        config = self.config
        ramp = (self.steps / max(1, config.adversarial_warmup)).clamp(max=1.0)
        total = (
            config.latent_weight * losses["latent"]
            + config.perceptual_weight * losses["perceptual"]
            + config.adversarial_weight * ramp * losses["adversarial"]
            + losses["discriminator"]
        )
        if "mismatch" in losses:
            total = total + config.mismatch_weight * losses["mismatch"]
        return total

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
