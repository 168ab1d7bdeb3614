"""The autoencoder: pictures ↔ small latents that a diffusion model can learn.

Reconstruction (L1) + perceptual distance, latents held to mean 0 and variance 1 per channel, and noise on
the latent while decoding, so that the decoder forgives what a one-step generator gets slightly wrong.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeflow.training.config import LoopConfig
from edgeflow.training.corpus import Corpus, encode_pictures
from edgeflow.training.draw import Draw
from edgeflow.training.loop import averaged_copy
from edgeflow.training.losses import PerceptualDistance, latent_moments
from edgeflow.training.models import ModelShape, build_autoencoder, save_autoencoder
from edgeflow.training.sampling import to_uint8
from edgeflow.training.sheet import draw_sheet


@dataclass(frozen=True)
class AutoencoderConfig:
    loop: LoopConfig
    shape: ModelShape
    perceptual_weight: float = 0.1
    moments_weight: float = 1e-3
    moments_group: int = 0  # pictures whose latents are held to mean 0, variance 1 together; 0: see _moments
    latent_noise: float = 0.2  # largest σ of the noise put on the latent; each sample draws its own below it


class AutoencoderObjective:
    """Trains AutoencoderTiny on a corpus."""

    def __init__(self, config: AutoencoderConfig, corpus: Corpus, device: torch.device):
        self.config, self.corpus, self.device = config, corpus, device
        torch.manual_seed(config.loop.seed)
        vae = build_autoencoder(config.shape).to(device, memory_format=torch.channels_last)
        self.trained = nn.ModuleDict({"vae": vae})
        self.averaged = averaged_copy(self.trained)
        self.draw = Draw(config.loop.batch_size, device)
        self.perceptual = PerceptualDistance().to(device, memory_format=torch.channels_last)
        if config.loop.compile:
            vae.encoder.compile()
            vae.decoder.compile()
            self.perceptual.compile()

    def loss(self) -> dict[str, Tensor]:
        vae = self.trained["vae"]
        x = self.corpus.pictures(self.draw.index(len(self.corpus.images)))
        mirrored = self.draw.uniform(1, 1, 1) < 0.5  # captions play no part here
        x = torch.where(mirrored, x.flip(3), x).contiguous(memory_format=torch.channels_last)
        z = vae.encode(x).latents
        sigma = self.config.latent_noise * self.draw.uniform(1, 1, 1)
        noise = self.draw.normal(*z.shape[1:]).contiguous(memory_format=torch.channels_last)
        y = vae.decode(z + sigma * noise).sample
        l1 = (y.float() - x).abs().mean()
        perceptual = self.perceptual(y, x)
        moments = self._moments(z)
        loss = l1 + self.config.perceptual_weight * perceptual + self.config.moments_weight * moments
        return {"loss": loss, "l1": l1, "perceptual": perceptual, "moments": moments}

    def _moments(self, z: Tensor) -> Tensor:
        """The one term that is no mean over pictures: it depends on which are taken together. By default that
        is all this process has in hand; a ``moments_group`` that divides it makes the loss the same however
        the batch is split over processes and micro-batches."""
        group = self.config.moments_group or len(z)
        return torch.stack([latent_moments(part) for part in z.split(group)]).mean()

    def batch_keys(self, index: Tensor) -> list[str]:
        return self.corpus.names(index)

    def save(self, folder: Path) -> None:
        """The checkpoint; its scaling factor makes the training latents' standard deviation 1."""
        vae = self.averaged["vae"]
        vae.register_to_config(scaling_factor=1.0)
        some = self.corpus.images[
            :: max(1, len(self.corpus.images) // 1024)
        ]  # enough for a standard deviation
        spread = encode_pictures(vae, dataclasses.replace(self.corpus, images=some)).std().item()
        vae.register_to_config(scaling_factor=round(1.0 / spread, 6))
        facts = {
            "kind": "autoencoder",
            "licence": "Apache-2.0",
            "origin": "trained by edgeflow",
            "picture_size": self.config.shape.picture_size,
            "training": dataclasses.asdict(self.config),
        }
        save_autoencoder(vae, folder, facts)

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """Pictures above their reconstructions."""
        vae = self.averaged["vae"]
        index = torch.linspace(0, len(self.corpus.images) - 1, 16, device=self.device).long()
        x = self.corpus.pictures(index)
        y = vae.decode(vae.encode(x).latents).sample
        mse = (x - y.clamp(-1, 1)).square().mean((1, 2, 3)) / 4.0
        psnr = (-10 * mse.log10()).tolist()
        captions = [self.corpus.captions[i] for i in index.tolist()]
        labels = [
            c for k in range(0, 16, 8) for c in captions[k : k + 8] + [f"{p:.1f} dB" for p in psnr[k : k + 8]]
        ]
        rows = torch.cat([torch.cat([x[k : k + 8], y[k : k + 8]]) for k in range(0, 16, 8)])
        draw_sheet(path, to_uint8(rows), labels, columns=8)
