"""What quantization-aware distillation is asked for. Apart from training/qat.py, which needs torchao."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeflow.errors import DataError
from edgeflow.training.config import LoopConfig
from edgeflow.training.corpus import read_captions


@dataclass(frozen=True)
class QatConfig:
    loop: LoopConfig
    scales: str = "learned"  # a parameter a block; or "weights": the block's largest weight at every step
    latent_weight: float = 1.0
    picture_weight: float = 1.0
    perceptual_weight: float = 0.2


def prompts_of(file: Path) -> list[str]:
    """The distinct lines of a text file, sorted. Raises DataError."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts: {file}: expected a text file, got: {error}") from error
    return _distinct([line.strip() for line in lines if line.strip()], file)


def captions_of_pairs(folder: Path) -> list[str]:
    """The distinct captions of a folder of pairs, whose shards need not be there. Raises DataError."""
    try:
        captions = read_captions(folder / "captions.json")
    except (OSError, ValueError) as error:
        raise DataError(f"pairs: {folder}: expected captions.json, got: {error}") from error
    return _distinct(captions, folder)


def _distinct(captions: list[str], where: Path) -> list[str]:
    if not captions:
        raise DataError(f"captions: {where}: expected one or more, got none")
    return sorted(set(captions))
