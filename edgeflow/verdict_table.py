"""A verdict in the terminal: a line a model, then every figure with its difference and interval."""

from __future__ import annotations

import math

from edgeflow import terminal
from edgeflow.speed import speed_sentence, speed_table
from edgeflow.terminal import Part
from edgeflow.verdict import CLOSENESS, FIGURES, INSIDE, WORSE, VerdictReport, VerdictRow

_MIB = 2**20


def print_verdict(report: VerdictReport, *, as_json: bool = False) -> None:
    """The report on stdout: JSON, or the tables and notes."""
    terminal.print_report(report, _parts(report), as_json=as_json)


def render(report: VerdictReport) -> str:
    """The tables and notes as plain text, no line wrapped."""
    return terminal.plain(_parts(report))


def _parts(report: VerdictReport) -> list[Part]:
    speed = [speed_table(report)] if any(row.speed for row in report.rows) else []
    tables = [_overview(report), _changes(report), *speed]
    return [*tables, *summary(report), *report.notes, *sentences(report)]


def _overview(report: VerdictReport) -> Part:
    closeness = [f"{f.column}{' dB' if 'PSNR' in f.column else ''}" for f in CLOSENESS.values()]
    columns = ["MiB", *(f.column for f in FIGURES.values()), *closeness]
    table = terminal.table(["Model", "runs"], columns, title=f"against {report.model.name}")
    for row in (report.model, *report.rows):
        figures = [f"{row.figures[name]:.{f.digits}f}" for name, f in FIGURES.items()]
        near = [show_close(row, name) for name in CLOSENESS]
        cells = (row.name, f"{row.runtime} {row.precision}", f"{row.graph_bytes / _MIB:.2f}")
        table.add_row(*cells, *figures, *near, end_section=row is report.model)
    return table


def show_close(row: VerdictRow, name: str) -> str:
    """A figure of closeness, ``equal`` for equal pictures, a dash for the model itself."""
    found = row.closeness.get(name)
    if found is None:
        return "–"
    return "equal" if math.isinf(found.value) else f"{found.value:.{CLOSENESS[name].digits}f}"


def _changes(report: VerdictReport) -> Part:
    from rich.text import Text

    table = terminal.table(
        ["Model", "figure"],
        ["value", "change", "95 % interval", "verdict"],
        title="change, with its interval",
    )
    for row in report.rows:
        for number, (name, change) in enumerate(row.changes.items()):
            digits = FIGURES[name].digits
            colour = {INSIDE: "", WORSE: "red"}.get(change.verdict, "green")
            table.add_row(
                row.name if number == 0 else "",
                heading(name),
                f"{row.figures[name]:.{digits}f}",
                signed(change.value, digits),
                f"{signed(change.low, digits)} to {signed(change.high, digits)}",
                Text(change.verdict, colour),
                end_section=number == len(row.changes) - 1,
            )
    return table


def sentences(report: VerdictReport) -> list[str]:
    """What is said of every row: its pictures, then its speed where it was measured."""
    said = [speed_sentence(row) for row in report.rows]
    return [*(row.sentence for row in report.rows), *(sentence for sentence in said if sentence)]


def signed(value: float, digits: int) -> str:
    """``+0.012``, and ``0`` for what rounds to nothing, which has no sign."""
    shown = f"{value:+.{digits}f}"
    return "0" if float(shown) == 0 else shown


def heading(name: str) -> str:
    """A figure's column with the direction that is good."""
    figure = FIGURES[name]
    return f"{figure.column} {'↑' if figure.more_is_better else '↓'}"


def summary(report: VerdictReport) -> list[str]:
    """What the columns are, with every count that they depend on."""
    d, s = report.data, report.settings
    return [
        f"{d.prompts} captions of split {d.split!r} of {d.name}, picture i from seed {s.seed} + i on "
        "every model; a bundle runs in its own runtime",
        f"KID (unbiased), FD: against these captions' own {d.prompts} real pictures; R@1: own caption among "
        f"{min(s.candidates, d.prompts)}; Real distance: mean cosine distance of features "
        "to the own real picture",
        f"PSNR, Distance: against {report.model.name}'s picture of the same prompt and noise",
        f"change: less {report.model.name}'s own figure; intervals: bootstrap over prompts, paired, "
        f"{s.resamples} resamples (FD {s.frechet_resamples}); inside the noise: the interval holds 0",
        "FD is biased by the count of pictures: read the change and the ratio, at equal counts",
    ]
