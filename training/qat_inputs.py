"""What quantization-aware distillation is asked for. Apart from training/qat.py, which needs torchao."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeflow.training.config import LoopConfig
from edgeflow.training.pair_shards import list_shards, read_shards

#: What training starts from: the float weights, each rounded by itself, or GPTQ's integers.
STARTS = ("float", "gptq")


@dataclass(frozen=True)
class QatConfig:
    loop: LoopConfig
    start: str = "float"  # or "gptq"
    start_pictures: int = 64  # that GPTQ calibrates on, drawn of the captions
    scales: str = "learned"  # a parameter a block; or "weights": the block's largest weight at every step
    latent_weight: float = 1.0
    picture_weight: float = 1.0
    perceptual_weight: float = 0.2


def captions_of_pairs(folder: Path) -> list[str]:
    """The distinct captions of a folder of pairs, sorted. Raises DataError."""
    return sorted({caption for shard in read_shards(list_shards(folder)) for caption in shard.caption})
