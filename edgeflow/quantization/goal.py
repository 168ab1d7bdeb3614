"""What a search for a recipe is asked for. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeflow.errors import UsageError

#: Metrics of --max-drop: PSNR of the mean squared error over the prompts, and of the worst prompt's.
METRICS = ("psnr", "worst_psnr")


@dataclass(frozen=True)
class Goal:
    """What is asked for; one of the three."""

    budget_mib: float | None = None
    average_bits: float | None = None
    drop: tuple[str, float] | None = None  # a metric and the least it may be, in dB

    def __str__(self) -> str:
        if self.budget_mib is not None:
            return f"least error in {self.budget_mib:g} MiB"
        if self.average_bits is not None:
            return f"least error at {self.average_bits:g} bits a value on average"
        assert self.drop is not None
        return f"least bytes at {self.drop[0]} of {self.drop[1]:g} dB or more"


def parse_drop(text: str) -> tuple[str, float]:
    """``METRIC=VALUE``. Raises UsageError."""
    name, _, value = text.partition("=")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if name not in METRICS or not math.isfinite(least):
        known = ", ".join(f"{m}=DB" for m in METRICS)
        raise UsageError(f"--max-drop {text!r}: expected a metric and a number of dB; known: {known}")
    return name, least
