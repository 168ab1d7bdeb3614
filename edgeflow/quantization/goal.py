"""What a search for a recipe is asked for. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeflow.errors import UsageError

#: What the error of a picture may be: squared difference of pixels, or distance of a network's features.
ERRORS = PICTURE, FEATURE = ("picture", "feature")
#: Metrics of --max-drop: PSNR of the mean squared error over the prompts, of the worst prompt's, and the mean
#: distance of features; with what its limit is a number of.
METRICS = {"psnr": "DB", "worst_psnr": "DB", FEATURE: "DISTANCE"}


@dataclass(frozen=True)
class Goal:
    """What is asked for; one of the three."""

    budget_mib: float | None = None
    average_bits: float | None = None
    drop: tuple[str, float] | None = None  # a metric and its limit: the least dB, the largest distance

    def __str__(self) -> str:
        if self.budget_mib is not None:
            return f"least error in {self.budget_mib:g} MiB"
        if self.average_bits is not None:
            return f"least error at {self.average_bits:g} bits a value on average"
        assert self.drop is not None
        if self.drop[0] == FEATURE:
            return f"least bytes at a feature distance of {self.drop[1]:g} or less"
        return f"least bytes at {self.drop[0]} of {self.drop[1]:g} dB or more"


def parse_drop(text: str) -> tuple[str, float]:
    """``METRIC=VALUE``. Raises UsageError."""
    name, _, value = text.partition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if name not in METRICS or not math.isfinite(limit) or (name == FEATURE and limit < 0):
        known = ", ".join(f"{metric}={unit}" for metric, unit in METRICS.items())
        raise UsageError(f"--max-drop {text!r}: expected a metric and its limit; known: {known}")
    return name, limit
