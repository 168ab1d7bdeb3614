"""A benchmark as one HTML file: time against quality against size, the table, who is faster. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflow.bench import BenchReport, BenchRow
from edgeflow.bench_table import lines, sentence
from edgeflow.errors import DataError
from edgeflow.html_page import bars, document, escape, listing, number, table
from edgeflow.svg_plot import Axis, Point, scatter

_MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """The Fréchet distance of models by name, from a verdict or a quality report."""

    source: str
    frechet: Mapping[str, float]

    def of(self, name: str) -> float | None:
        """A model's figure by its name, or by the end of it where only one model ends so."""
        if name in self.frechet:
            return self.frechet[name]
        alike = [v for k, v in self.frechet.items() if k.split("/")[-1] == name.split("/")[-1]]
        return alike[0] if len(alike) == 1 else None


def read_quality(path: Path) -> Figures:
    """Figures from verdict.json or quality.json. Raises DataError for a file that is neither."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw["kind"]
        if kind == "verdict":
            rows = {row["name"]: row["figures"]["fd"] for row in (raw["model"], *raw["rows"])}
        elif kind == "quality":
            rows = {row["model"]: row["figures"]["frechet"] for row in raw["rows"]}
        else:
            raise KeyError(kind)
        return Figures(path.name, {name: float(value) for name, value in rows.items()})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"quality: {path}: expected a verdict.json or quality.json, got: {reason}") from error


def bench_page(report: BenchReport, figures: Figures | None = None) -> str:
    """The whole file."""
    count = len(report.rows)
    body = [
        f"<h1>Time, memory and size of {count} model{'s' * (count > 1)}</h1>",
        f'<p class="lead">{escape(report.machine["processor"] or report.machine["system"])}, '
        f"{report.rows[0].threads} threads; every model in {len(report.rows[0].launches_ms)} processes "
        "of its own, drawing in turns.</p>",
        listing(sentence(found) for found in report.ratios) if report.ratios else "",
        *_plots(report, figures),
        "<h2>Figures</h2>",
        _table(report, figures),
        "<h2>Before the first picture</h2>",
        *_stages(report),
        "<h2>In full</h2>",
        f'<pre class="card scroll"><code>{escape(chr(10).join(lines(report)))}</code></pre>',
    ]
    return document("Benchmark", body)


def _plots(report: BenchReport, figures: Figures | None) -> Iterator[str]:
    yield '<h2>Time against quality and size</h2><div class="plots">'
    known = [(row, figures.of(row.name)) for row in report.rows] if figures else []
    judged = [(row, value) for row, value in known if value is not None]
    largest = max(row.graph_bytes for row in report.rows)
    if judged:
        points = [
            Point(row.name, row.warm_ms.median, value, size=_radius(row, largest)) for row, value in judged
        ]
        plot = scatter(
            points, Axis("ms a picture, median", zero=True), Axis("Fréchet distance, less is better"),
            described="Fréchet distance against the time of a picture",
        )  # fmt: skip
        source = escape(figures.source if figures else "")
        yield _figure(plot, f"Area: bytes. Figures: {source}.")
    points = [
        Point(row.name, row.graph_bytes / _MIB, row.warm_ms.median, row.warm_ms.low, row.warm_ms.p90)
        for row in report.rows
    ]
    plot = scatter(
        points, Axis("MiB of weights and graphs", zero=True), Axis("ms a picture, median", zero=True),
        described="The time of a picture against size",
    )  # fmt: skip
    yield _figure(
        plot, "Nearer the corner is better. Whiskers: from the fastest picture to the 90th percentile."
    )
    yield "</div>"
    if figures and len(judged) < len(report.rows):
        absent = [row.name for row, value in known if value is None]
        yield f'<p class="note">Not in {escape(figures.source)}: {escape(", ".join(absent))}.</p>'


def _figure(plot: str, caption: str) -> str:
    return f'<figure class="card">{plot}<figcaption class="note">{caption}</figcaption></figure>'


def _radius(row: BenchRow, largest: int) -> float:
    return max(3.0, 14 * math.sqrt(row.graph_bytes / largest))


def _table(report: BenchReport, figures: Figures | None) -> str:
    gpu = any(row.peak_gpu_mib is not None for row in report.rows)
    head = ["Model", "Picture", "First picture", "Load", "Cold start", "Peak RSS", *(["GPU"] if gpu else [])]
    head += ["On disk", "GFLOP/s", *(["FD"] if figures else [])]
    rows = []
    for row in report.rows:
        share = row.share_of_matrix_rate
        rows.append(
            [
                f"{escape(row.name)}<small>{escape(row.runtime)} {escape(row.precision)}</small>",
                f"{row.warm_ms.median:.1f} ms<small>p90 {row.warm_ms.p90:.1f}</small>"
                f"<small>{row.warm_ms.low:.1f} … {row.warm_ms.high:.1f}</small>",
                f"{row.first_picture_ms.median:.0f} ms",
                f"{row.load_ms.median:.0f} ms",
                "–" if row.cold_start_ms is None else f"{row.cold_start_ms.median:.0f} ms",
                f"{row.peak_rss_mib:.0f} MiB",
                *([number(row.peak_gpu_mib, 0)] if gpu else []),
                f"{row.bytes / _MIB:.2f} MiB",
                "–"
                if share is None
                else f"{row.gflop_per_s:.0f}<small>{100 * share:.0f} % of the rate</small>",
                *([number(figures.of(row.name), 2)] if figures else []),
            ]
        )
    return table(head, rows)


def _stages(report: BenchReport) -> Iterator[str]:
    most = max(value for row in report.rows for value in row.stages_ms.values())
    for row in report.rows:
        stages: Mapping[str, Any] = row.stages_ms
        yield f"<h3>{escape(row.name)}</h3>"
        rows = [(name, value, f"{value:.0f} ms") for name, value in stages.items()]
        yield f'<div class="card">{bars(rows, most=most)}</div>'
