"""Presets: one literal table per stage; ``emoji``'s measured results stand beside the lines.

``tiny`` runs every stage on a CPU within the tests. ``emoji`` runs them on one H100-class GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeflow.training.adversarial import AdversarialConfig
from edgeflow.training.autoencoder import AutoencoderConfig
from edgeflow.training.config import LoopConfig
from edgeflow.training.distill import DistillConfig
from edgeflow.training.models import ModelShape
from edgeflow.training.pairs import PairsConfig
from edgeflow.training.presets_sd15 import SD15
from edgeflow.training.qat_inputs import QatConfig
from edgeflow.training.reflow import ReflowConfig
from edgeflow.training.teacher import TeacherConfig

TINY_SHAPE = ModelShape(
    picture_size=32,
    latent_channels=8,
    autoencoder_width=16,
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    unet_channels=(32, 64),
    unet_layers=1,
    unet_heads=(2, 4),
    unet_attention=(True, True),
    text_width=32,
    text_layers=1,
    text_heads=2,
    vocabulary=600,
    max_tokens=16,
)
EMOJI_SHAPE = ModelShape()


def _tiny(steps: int) -> LoopConfig:
    return LoopConfig(
        steps=steps, batch_size=8, learning_rate=1e-3, warmup_steps=5, ema_decay=0.9, log_every=5
    )


def _gpu(steps: int, batch_size: int, learning_rate: float, **more: Any) -> LoopConfig:
    return LoopConfig(steps, batch_size, learning_rate, bf16=True, compile=True, cuda_graph=True, **more)


PRESETS: dict[str, dict[str, Any]] = {
    **SD15,
    "tiny": {
        "autoencoder": AutoencoderConfig(_tiny(10), TINY_SHAPE),
        "teacher": TeacherConfig(_tiny(10), TINY_SHAPE, sample_steps=5),
        "pairs": PairsConfig(num_pairs=32, batch_size=16, shard_size=16, steps=5),
        "reflow": ReflowConfig(_tiny(10), sample_steps=5),
        "distill": DistillConfig(_tiny(10), target_steps=2, perceptual_weight=0.1),
        "adversarial": AdversarialConfig(_tiny(10)),
        "qat": QatConfig(replace(_tiny(10), learning_rate=5e-5)),
    },
    # Measured on one H100 80GB, torch 2.11, 2026-11-22; seconds are the loop alone. The shipped model's
    # minutes are others: its card and logs are in edgeflow/models/emoji.
    "emoji": {
        # 4,800 steps in 155 s, 4,330 pictures/s: L1 0.020, mean PSNR over the sheet 32.7 dB
        "autoencoder": AutoencoderConfig(_gpu(8000, 128, 5e-4, decay_fraction=0.3, minutes=2.6), EMOJI_SHAPE),
        # 6,650 steps (6.8 M pictures) in 478 s, 18,700 pictures/s: ε-MSE 0.031
        "teacher": TeacherConfig(
            _gpu(40000, 1024, 6e-4, ema_decay=0.9995, decay_fraction=0.15, minutes=8.0), EMOJI_SHAPE
        ),
        # 43,008 pairs in 76 s, 565 pairs/s
        "pairs": PairsConfig(num_pairs=81920, batch_size=2048, bf16=True, minutes=1.25),
        # 1,650 steps in 136 s, 21,900 pictures/s: velocity MSE 0.118
        "reflow": ReflowConfig(_gpu(10000, 1024, 4e-4, decay_fraction=0.3, minutes=2.3)),
        # 2,700 steps in 260 s, 4,700 pictures/s
        "distill": DistillConfig(
            _gpu(10000, 256, 3e-4, decay_fraction=0.3, minutes=4.35), perceptual_weight=0.2
        ),
        # on one H200, 3,900 pictures/s; docs/one-step.md has the ablations
        "adversarial": AdversarialConfig(
            _gpu(20000, 256, 1e-4, decay_fraction=0.3, minutes=4.0), adversarial_weight=0.6, real_fraction=0.5
        ),
        # of a given recipe's integers, from the one-step model: `edgeflow train qat --recipe w4g32`;
        # a higher rate than 1e-4 undoes what rounding left, on a CPU at batch 8 and on `tiny`
        "qat": QatConfig(
            _gpu(10000, 256, 5e-5, decay_fraction=0.3, minutes=2.0, warmup_steps=50, weight_decay=0.0)
        ),
    },
}
STAGES = ("autoencoder", "teacher", "pairs", "reflow", "distill", "adversarial", "qat")
