"""The teacher: a small Stable Diffusion, trained from captioned pictures.

ε-prediction on Stable Diffusion's scaled-linear schedule, the text encoder trained along, captions dropped
for classifier-free guidance, min-SNR-γ weighting (Hang et al. 2023, arXiv 2303.09556).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from edgeflow.errors import ConfigError
from edgeflow.training.config import LoopConfig
from edgeflow.training.corpus import Corpus, encode_captions, encode_pictures
from edgeflow.training.draw import Draw
from edgeflow.training.loop import averaged_copy
from edgeflow.training.models import (
    ModelShape,
    Parts,
    build_text_encoder,
    build_unet,
    dpm_solver,
    save_parts,
)
from edgeflow.training.sampling import decode, sample_teacher
from edgeflow.training.sheet import draw_sheet, sheet_prompts


@dataclass(frozen=True)
class TeacherConfig:
    loop: LoopConfig
    shape: ModelShape
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    sample_steps: int = 25
    guidance: float = 3.0


class TeacherObjective:
    """Trains UNet and text encoder on the latents of a corpus; from ``begun``'s weights, or from noise.

    Raises ConfigError where ``begun`` is of another shape.
    """

    def __init__(
        self,
        config: TeacherConfig,
        corpus: Corpus,
        vae: AutoencoderTiny,
        tokenizer_dir: Path,
        device: torch.device,
        begun: Parts | None = None,
    ):
        self.config, self.device = config, device
        self.vae, self.tokenizer_dir, self.captions = vae.to(device), tokenizer_dir, corpus.captions
        self.batch_keys = corpus.names
        self.latents = encode_pictures(self.vae, corpus)
        self.ids = encode_captions(corpus.captions, tokenizer_dir, device)
        self.empty_ids = encode_captions([""], tokenizer_dir, device)
        self.alpha_bar = dpm_solver().alphas_cumprod.to(device)
        torch.manual_seed(config.loop.seed)
        num_tokens = int(self.empty_ids.max()) + 1  # the end-of-text token is the last of the vocabulary
        self.trained = nn.ModuleDict(
            {
                "unet": build_unet(config.shape).to(device, memory_format=torch.channels_last),
                "text_encoder": build_text_encoder(config.shape, num_tokens).to(device),
            }
        )
        if begun is not None:
            _go_on(self.trained, begun)
        self.averaged = averaged_copy(self.trained)
        self.draw = Draw(config.loop.batch_size, device)
        if config.loop.compile:
            self.trained["unet"].compile()

    def loss(self) -> dict[str, Tensor]:
        index = self.draw.index(len(self.latents))
        x, ids = self.latents[index], self.ids[index]
        dropped = self.draw.uniform(1) < self.config.caption_dropout
        ids = torch.where(dropped, self.empty_ids, ids)
        noise = self.draw.normal(*x.shape[1:])
        t = self.draw.integers(len(self.alpha_bar))
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        noisy = (alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        text = self.trained["text_encoder"](ids).last_hidden_state
        # The timestep goes in as a float, as it does in a flow: one compiled graph serves every stage.
        predicted = self.trained["unet"](noisy, t.float(), text).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        weight = snr.clamp_max(self.config.snr_gamma) / snr
        return {"loss": (weight * error).mean(), "mse": error.mean()}

    def save(self, folder: Path) -> None:
        facts = {
            "kind": "diffusion",
            "steps": self.config.sample_steps,
            "guidance": self.config.guidance,
            "licence": "Apache-2.0",
            "origin": "trained by edgeflow",
            "picture_size": self.config.shape.picture_size,
            "prompts": sheet_prompts(self.captions, 8),
            "training": dataclasses.asdict(self.config),
        }
        parts = Parts(self.vae, self.averaged["unet"], self.averaged["text_encoder"], self.tokenizer_dir)
        save_parts(parts, folder, facts)

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """Pictures drawn with guidance from fixed seeds, over captions spread across the corpus."""
        captions = sheet_prompts(self.captions, 32)
        encoder = self.averaged["text_encoder"]
        text = encoder(encode_captions(captions, self.tokenizer_dir, self.device)).last_hidden_state
        empty = encoder(self.empty_ids).last_hidden_state
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(len(captions), *self.latents.shape[1:], generator=generator).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.loop.bf16):
            latents = sample_teacher(
                self.averaged["unet"],
                text,
                empty,
                noise,
                steps=self.config.sample_steps,
                guidance=self.config.guidance,
            )
        draw_sheet(path, decode(self.vae, latents), captions, columns=8)


def _go_on(trained: nn.ModuleDict, begun: Parts) -> None:
    """Load a teacher's weights to train on."""
    try:
        trained["unet"].load_state_dict(begun.unet.state_dict())
        trained["text_encoder"].load_state_dict(begun.text_encoder.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"train teacher: --from: expected a teacher of the preset's shape, got another: {reason}"
        ) from error
