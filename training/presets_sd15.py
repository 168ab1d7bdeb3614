"""Presets of Stable Diffusion 1.5's size: the paper's schedule (InstaFlow, arXiv 2309.06380).

Its numbers come from the authors' model card of instaflow_0_9B_from_sd_1_5 [card] and from the paper's
section 5 and appendix as public notes quote them [notes]. ``sd15`` is the first phase of each stage,
``sd15-second`` the second. Batches are over all processes; ``accumulate`` splits them for one GPU of 80 GB
into pieces of 16 pictures, so on N GPUs divide it by N.

What is not the paper's: the perceptual distance has EfficientNet-Lite0's features in place of LPIPS, AdamW's
second beta is 0.99, and distillation's rate, which no source gives, is reflow's, the middle of the grid that
the paper's pilot tried (1e-5, 1e-6, 1e-7) [notes].
"""

from __future__ import annotations

from typing import Any

from edgeflow.training.config import LoopConfig
from edgeflow.training.distill import DistillConfig
from edgeflow.training.pairs import PairsConfig
from edgeflow.training.reflow import ReflowConfig


def _loop(steps: int, batch_size: int, accumulate: int) -> LoopConfig:
    """AdamW at 1e-6 (1e-4 and more diverged), warm-up 1,000, clipping at 1, average 0.9999, bf16 [notes]."""
    return LoopConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-6,
        warmup_steps=1000,
        clip_norm=1.0,
        ema_decay=0.9999,
        bf16=True,
        compile=True,
        accumulate=accumulate,
        save_minutes=30.0,  # a state is 14 GB
    )


def _pairs(guidance: float) -> PairsConfig:
    """About 3.2 M pairs of 25 steps, drawn 16 at a time [notes]."""
    return PairsConfig(
        num_pairs=3_200_000, batch_size=16, shard_size=2048, steps=25, guidance=guidance, weights="float16"
    )


_HELD_GIB = 4.0  # what the model and a micro-batch leave room for
#: All pairs, times uniform in [0, 1], L2 [card].
_PAPERS_REFLOW: dict[str, Any] = {
    "keep_nearest": 1.0,
    "times": "uniform",
    "loss": "l2",
    "pairs_gib": _HELD_GIB,
}

SD15: dict[str, dict[str, Any]] = {
    "sd15": {
        "pairs": _pairs(5.0),  # guidance 5.0; 6.0 over-saturated [notes]
        # 70,000 steps at batch 64: 11.2 A100-days [card]
        "reflow": ReflowConfig(_loop(70_000, 64, 4), **_PAPERS_REFLOW),
        # L2 for 21,500 steps at batch 1,024: 54.4 A100-days [card]
        "distill": DistillConfig(_loop(21_500, 1024, 64), loss="l2", pairs_gib=_HELD_GIB),
    },
    "sd15-second": {
        "pairs": _pairs(1.5),  # drawn by the 2-rectified flow, guidance 1.5 [notes]
        # 25,000 steps at batch 1,024: 64 A100-days [card]
        "reflow": ReflowConfig(_loop(25_000, 1024, 64), **_PAPERS_REFLOW),
        # LPIPS for 18,000 steps at batch 1,024: 53.6 A100-days [card]; a decoder at 512 px wants small pieces
        "distill": DistillConfig(
            _loop(18_000, 1024, 256), latent_weight=0.0, perceptual_weight=1.0, pairs_gib=_HELD_GIB
        ),
    },
}
