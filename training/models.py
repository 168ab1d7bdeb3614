"""The shapes of the models that edgeflow trains, and their checkpoints on disk.

A model is Stable Diffusion's own set of parts at a chosen size: CLIPTextModel, UNet2DConditionModel and
AutoencoderTiny, so everything that opens Stable Diffusion opens these.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from edgeflow.checkpoint import FACTS, SCHEMA, Checkpoint
from edgeflow.errors import CheckpointError
from edgeflow.loading import load_modules, quiet_libraries
from edgeflow.solvers import scheduler_of
from edgeflow.training import client_files


def dpm_solver() -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) on Stable Diffusion's schedule: β from 0.00085 to
    0.012, linear in √β, 1000 steps. The teacher is trained on its ``alphas_cumprod`` and drawn with it."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's parts. Defaults are the emoji model's."""

    picture_size: int = 128
    latent_channels: int = 8
    autoencoder_width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 1, 2, 3)
    decoder_blocks: tuple[int, ...] = (4, 3, 2, 1)
    unet_channels: tuple[int, ...] = (96, 160, 160)
    unet_layers: int = 1
    unet_heads: tuple[int, ...] = (3, 5, 5)
    unet_attention: tuple[bool, ...] = (True, True, False)
    text_width: int = 192
    text_layers: int = 3
    text_heads: int = 6
    vocabulary: int = 2048
    max_tokens: int = 24

    @property
    def latent_side(self) -> int:
        return self.picture_size // 2 ** (len(self.decoder_blocks) - 1)


@dataclass
class Parts:
    """A model in memory. ``tokenizer_dir`` is copied as it is when the checkpoint is saved."""

    vae: AutoencoderTiny | AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer_dir: Path
    facts: dict[str, Any] = field(default_factory=dict)
    prediction: str = "epsilon"  # what a diffusion model's UNet predicts


def build_autoencoder(shape: ModelShape) -> AutoencoderTiny:
    """Convolutions without norms: picture (N, 3, S, S) in [-1, 1] ↔ latent (N, C, S/8, S/8)."""
    width = (shape.autoencoder_width,) * len(shape.decoder_blocks)
    return AutoencoderTiny(
        latent_channels=shape.latent_channels,
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        num_encoder_blocks=shape.encoder_blocks,
        num_decoder_blocks=shape.decoder_blocks,
    )


def build_unet(shape: ModelShape) -> UNet2DConditionModel:
    """Stable Diffusion's UNet: latent (N, C, s, s), timestep, text (N, L, D) → (N, C, s, s)."""
    return UNet2DConditionModel(
        sample_size=shape.latent_side,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        block_out_channels=shape.unet_channels,
        layers_per_block=shape.unet_layers,
        # diffusers' name for it; on SD-style blocks this number is the count of heads.
        attention_head_dim=shape.unet_heads,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in shape.unet_attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in shape.unet_attention[::-1]),
        cross_attention_dim=shape.text_width,
        norm_num_groups=32 if all(c % 32 == 0 for c in shape.unet_channels) else 8,
    )


def build_text_encoder(shape: ModelShape, num_tokens: int) -> CLIPTextModel:
    """CLIP's text transformer: ids (N, L) → states (N, L, D). The vocabulary's last id ends a text."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=num_tokens,
            hidden_size=shape.text_width,
            intermediate_size=4 * shape.text_width,
            num_hidden_layers=shape.text_layers,
            num_attention_heads=shape.text_heads,
            max_position_embeddings=shape.max_tokens,
            projection_dim=shape.text_width,
            hidden_act="quick_gelu",
            bos_token_id=num_tokens - 2,
            eos_token_id=num_tokens - 1,
            pad_token_id=num_tokens - 1,
        )
    )


def load_parts(model: str | Path) -> Parts:
    """Open a checkpoint; every part in float32 and eval mode. Raises CheckpointError for a bad folder."""
    checkpoint = _open_float(model)
    text_encoder, unet, vae = load_modules(checkpoint)
    for part in (text_encoder, unet, vae):
        part.requires_grad_(True)
    prediction = "epsilon"
    if checkpoint.kind == "diffusion":
        prediction = scheduler_of(checkpoint).config.prediction_type
    return Parts(vae, unet, text_encoder, checkpoint.root / "tokenizer", checkpoint.facts, prediction)


def _open_float(model: str | Path) -> Checkpoint:
    """The libraries' own loaders know no integers and would begin anew without a word."""
    checkpoint = Checkpoint.open(model)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"checkpoint: {checkpoint.root}: expected float weights to train from, got quantized ones"
        )
    return checkpoint


def save_autoencoder(vae: AutoencoderTiny, folder: Path, facts: dict[str, Any]) -> None:
    """A checkpoint of the autoencoder alone."""
    vae.save_pretrained(folder / "vae")
    _finish(folder)
    _write_index(folder, "AutoencoderTiny", {"vae": ["diffusers", "AutoencoderTiny"]}, facts)


def save_parts(parts: Parts, folder: Path, facts: dict[str, Any]) -> None:
    """A checkpoint in the published layout: ``model_index.json`` and one folder per part."""
    parts.vae.save_pretrained(folder / "vae")
    parts.unet.save_pretrained(folder / "unet")
    parts.text_encoder.save_pretrained(folder / "text_encoder")
    is_flow = facts["kind"] != "diffusion"
    if is_flow:
        client_files.ship_scheduler(folder)
    else:
        dpm_solver().save_pretrained(folder / "scheduler")
    _finish(folder)
    target = folder / "tokenizer"
    target.mkdir()
    for file in sorted(parts.tokenizer_dir.iterdir()):
        (target / file.name).write_bytes(file.read_bytes())
    index = {
        "vae": ["diffusers", type(parts.vae).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": client_files.SCHEDULER if is_flow else ["diffusers", "DPMSolverMultistepScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    _write_index(folder, client_files.PIPELINE_CLASS, index, facts)


def _finish(folder: Path) -> None:
    """Drop the paths that the libraries record of a part's origin; make weights readable by all."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _write_index(folder: Path, class_name: str, index: dict[str, Any], facts: dict[str, Any]) -> None:
    for path, content in (
        (folder / "model_index.json", {"_class_name": class_name, **index}),
        (folder / FACTS, {"schema": SCHEMA, **facts}),
    ):
        path.write_text(
            json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def load_autoencoder(model: str | Path) -> AutoencoderTiny:
    """The autoencoder of a checkpoint of any kind, in eval mode. Raises CheckpointError for integers."""
    with quiet_libraries():
        vae = AutoencoderTiny.from_pretrained(_open_float(model).root / "vae")
    return vae.eval().requires_grad_(False)
