"""Sample sheets: the pictures a stage draws when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from edgeflow.pictures import contact_sheet, save_png


def draw_sheet(path: Path, pictures: Tensor, labels: Sequence[str], columns: int) -> None:
    """Write uint8 pictures (N, 3, S, S) with their labels as one PNG."""
    arrays = [p.permute(1, 2, 0).numpy() for p in pictures]
    save_png(path, contact_sheet(arrays, labels, columns), {})


def sheet_prompts(captions: Sequence[str], count: int) -> list[str]:
    """``count`` captions spread evenly over the corpus; the same corpus, the same captions."""
    distinct = sorted(set(captions))
    count = min(count, len(distinct))
    return [distinct[(2 * i + 1) * len(distinct) // (2 * count)] for i in range(count)]
