"""What timings say and what they do not: medians, tails, and ratios that know their spread. Torch-free.

Two processes of the same program differ for reasons that no number of runs within one shows (where its memory
lies, which core it woke on). So a ratio is taken once per launch, between processes that took turns, and its
interval comes from the spread over launches: Student's t on the logarithm.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: Student's t, two-sided 95 %, by degrees of freedom from 1 on; beyond the table the last serves, which is
#: larger than the exact one and so errs towards "inside the noise".
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Some timings, in milliseconds."""

    count: int
    median: float
    p90: float
    low: float
    high: float


def summarize(values: Sequence[float]) -> Summary:
    """Median, p90 (linear between neighbours) and range. Raises ValueError for no value or one not finite."""
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"expected finite timings, at least one, got {list(values)[:3]}")
    ordered = sorted(values)
    return Summary(
        count=len(ordered),
        median=statistics.median(ordered),
        p90=quantile(ordered, 0.9),
        low=ordered[0],
        high=ordered[-1],
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of rising values, linear between the two neighbours of position q·(n − 1)."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Ratio:
    """How many times as long A takes as B, with its 95 % interval over launches."""

    value: float
    low: float
    high: float
    launches: int

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` (A than B), or ``inside the noise``."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "inside the noise"


def ratio(a: Sequence[Sequence[Sequence[float]]], b: Sequence[Sequence[Sequence[float]]]) -> Ratio:
    """The ratio of A's to B's times; both are launches of rounds of timings, taken in turns.

    In a launch it is the median over rounds of median A / median B, so that a machine that slows down half
    way slows both sides of each quotient. Raises ValueError for fewer than two launches or an unequal number
    of launches or rounds.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"expected two launches or more of each, got {len(a)} and {len(b)}")
    return ratio_of_launches([_log_quotient(x, y) for x, y in zip(a, b, strict=True)])


def ratio_of_launches(logs: Sequence[float]) -> Ratio:
    """The geometric mean of one log quotient a launch, and Student's t interval of it."""
    if len(logs) < 2:
        raise ValueError(f"expected two launches or more, got {len(logs)}")
    mean = statistics.fmean(logs)
    half = _T95[min(len(logs) - 1, len(_T95)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def _log_quotient(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    pairs = zip(a, b, strict=True)
    return statistics.median(math.log(statistics.median(x) / statistics.median(y)) for x, y in pairs)
