"""Gates of a verdict: ``--gate kid=0.01,psnr=38,fd=noise``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgeflow.errors import GateFailed, UnknownNameError, UsageError
from edgeflow.verdict import WORSE, VerdictReport, VerdictRow

#: The limit "not measurably worse than the model".
NOISE = "noise"


@dataclass(frozen=True)
class Gate:
    """What a gate reads and which side of its limit is good; ``figure`` is what ``noise`` asks about."""

    says: str
    read: Callable[[VerdictRow], float]
    at_least: bool
    figure: str | None = None
    unit: str = ""
    digits: int = 4


def _change(figure: str) -> Callable[[VerdictRow], float]:
    return lambda row: row.changes[figure].value


def _close(figure: str) -> Callable[[VerdictRow], float]:
    return lambda row: row.closeness[figure].value


#: Name → gate. Differences are the row's figure less the model's.
GATES: dict[str, Gate] = {
    "kid": Gate("KID above the model's", _change("kid"), False, "kid"),
    "fd": Gate("FD above the model's", _change("fd"), False, "fd", digits=2),
    "fd_ratio": Gate("FD over the model's", _close("fd_ratio"), False, "fd"),
    "psnr": Gate("PSNR of the worst picture", _close("psnr_worst_db"), True, unit=" dB", digits=1),
    "psnr_median": Gate("median PSNR", _close("psnr_median_db"), True, unit=" dB", digits=1),
    "distance": Gate("mean feature distance", _close("distance"), False),
    "r_at_1": Gate("R@1 below the model's", lambda row: -row.changes["r_at_1"].value, False, "r_at_1"),
    "real_distance": Gate(
        "distance to real above the model's", _change("real_distance"), False, "real_distance"
    ),
}


def parse_gates(texts: Sequence[str]) -> dict[str, float | str]:
    """``["kid=0.01,psnr=38"]`` → name → limit, a number or NOISE. Raises UsageError naming what is wrong."""
    gates: dict[str, float | str] = {}
    for item in (part.strip() for text in texts for part in text.split(",")):
        name, _, value = item.partition("=")
        if name not in GATES:
            raise UnknownNameError("gate", name, GATES)
        if value == NOISE:
            if GATES[name].figure is None:
                raise UsageError(
                    f"gate: {item}: has no noise to be inside of; expected a number after {name}="
                )
            gates[name] = NOISE
            continue
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            wanted = "a number" if GATES[name].figure is None else f"a number or {NOISE!r}"
            raise UsageError(f"gate: {item}: expected {wanted} after {name}=, got {value!r}")
        gates[name] = limit
    return gates


def failures(rows: Sequence[VerdictRow], gates: Mapping[str, float | str]) -> tuple[str, ...]:
    """One sentence for each gate that a row does not hold."""
    return tuple(
        said for row in rows for name, limit in gates.items() if (said := _failure(row, name, limit))
    )


def _failure(row: VerdictRow, name: str, limit: float | str) -> str | None:
    gate = GATES[name]
    value = gate.read(row)
    shown = f"{value:.{gate.digits}f}{gate.unit}"
    if isinstance(limit, str):
        change = row.changes[str(gate.figure)]
        if change.verdict != WORSE:
            return None
        interval = f"{change.low:+.{gate.digits}f} to {change.high:+.{gate.digits}f}"
        return f"{row.name}: gate {name}: {gate.says}: expected inside the noise, got {interval}"
    if value >= limit if gate.at_least else value <= limit:
        return None
    side = "at least" if gate.at_least else "at most"
    return f"{row.name}: gate {name}: {gate.says}: expected {side} {limit:g}{gate.unit}, got {shown}"


def raise_failures(report: VerdictReport) -> None:
    """Raises GateFailed with a sentence for every failing gate."""
    if report.failures:
        raise GateFailed("quality: " + "; ".join(report.failures))
