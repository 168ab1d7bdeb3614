"""Speed as a verdict tells it: a row's timings, and how they stand against the float bundles beside it.

SPEED, as the verdict's JSON holds it (times in ms, memory in MiB)::

    {"threads", "launches", "check", "first_picture_ms": SUMMARY, "load_ms": SUMMARY, "warm_ms": SUMMARY,
     "peak_rss_mib", "peak_gpu_mib", "against": [{"name", "precision", "value", "low", "high", "verdict"}…]}

    SUMMARY = {"count", "median", "p90", "low", "high"}
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from edgeflow import terminal
from edgeflow.measure import Measured
from edgeflow.measure_statistics import Ratio, ratio, summarize
from edgeflow.terminal import Part
from edgeflow.verdict import VerdictReport, VerdictRow

_FLOAT = ("fp32", "fp16")


def compare(a: Measured, b: Measured) -> Ratio:
    """How many times as long A's warm pictures take as B's, measured in turns."""
    return ratio([launch.rounds for launch in a.launches], [launch.rounds for launch in b.launches])


def speeds(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """SPEED of each, in order; a float bundle is a baseline of what runs in the same runtime."""
    return [
        {
            "threads": m.threads,
            "launches": len(m.launches),
            "check": m.check,
            "first_picture_ms": asdict(summarize([x.first_picture_ms for x in m.launches])),
            "load_ms": asdict(summarize([x.load_ms for x in m.launches])),
            "warm_ms": asdict(summarize(m.warm_ms)),
            "peak_rss_mib": statistics.median(x.peak_rss_mib for x in m.launches),
            "peak_gpu_mib": peak_gpu(m),
            "against": [
                {"name": b.label, "precision": b.precision, **_ratio(compare(m, b))}
                for b in measured
                if b is not m and b.runtime == m.runtime and b.precision in _FLOAT
            ],
        }
        for m in measured
    ]


def peak_gpu(measured: Measured) -> float | None:
    """The median over launches of the most GPU memory held, in MiB; None where none was used."""
    peaks = [launch.peak_gpu_mib for launch in measured.launches]
    known = [peak for peak in peaks if peak is not None]
    return statistics.median(known) if known else None


def _ratio(found: Ratio) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high, "verdict": found.verdict}


def speed_sentence(row: VerdictRow) -> str | None:
    """What is to be said of a quantized row's speed against the float bundles; None for what is not one."""
    if row.speed is None or row.recipe is None or not row.speed["against"]:
        return None
    parts = []
    for other in row.speed["against"]:
        times = (
            f"{other['value']:.2f} × the time of {other['name']} ({other['low']:.2f} to {other['high']:.2f})"
        )
        said = {"slower": "SLOWER", "faster": "faster"}.get(other["verdict"], "inside the noise")
        parts.append(f"{said}: {times}")
    return f"{row.name}: quantized is {'; '.join(parts)}"


def speed_table(report: VerdictReport) -> Part:
    """A line a model as a ``rich`` table: first picture, load, warm picture, memory, and the ratios."""
    figures = ["first picture ms", "load ms", "picture ms", "p90", "range", "peak RSS MiB", "MiB"]
    table = terminal.table(
        ["Model", "runs"],
        [*figures, *(f"× {precision}" for precision in _FLOAT)],
        title="speed on this machine",
    )
    for row in (report.model, *report.rows):
        if row.speed is None:
            continue
        warm = row.speed["warm_ms"]
        table.add_row(
            row.name,
            f"{row.runtime} {row.precision}, {row.speed['threads']} threads",
            f"{row.speed['first_picture_ms']['median']:.0f}",
            f"{row.speed['load_ms']['median']:.0f}",
            f"{warm['median']:.1f}",
            f"{warm['p90']:.1f}",
            f"{warm['low']:.1f} … {warm['high']:.1f}",
            f"{row.speed['peak_rss_mib']:.0f}",
            f"{row.bytes / 2**20:.2f}",
            *(show_ratio(row.speed, precision) for precision in _FLOAT),
        )
    return table


def show_ratio(speed: Mapping[str, Any], precision: str) -> str:
    """``1.31 (1.25 … 1.38) slower`` against the first baseline of that precision, or a dash."""
    for other in speed["against"]:
        if other["precision"] == precision:
            return f"{other['value']:.2f} ({other['low']:.2f} … {other['high']:.2f}) {other['verdict']}"
    return "–"
