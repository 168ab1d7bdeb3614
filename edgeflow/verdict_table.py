"""A verdict in the terminal: a line a model, then every figure with its difference and interval."""

from __future__ import annotations

import math
import sys
from typing import Any

from edgeflow.verdict import CLOSENESS, FIGURES, INSIDE, WORSE, VerdictReport, VerdictRow

_MIB = 2**20


def print_verdict(report: VerdictReport, *, as_json: bool = False) -> None:
    """The report on stdout: JSON, or tables in the terminal's width and colours (plain in a pipe)."""
    import click

    if as_json:
        click.echo(report.to_json(), nl=False)
    elif sys.stdout.isatty():
        from rich.console import Console

        _print(report, Console(highlight=False))
    else:
        click.echo(render(report), nl=False)


def render(report: VerdictReport) -> str:
    """The tables and notes as plain text, no line wrapped."""
    from rich.console import Console

    console = Console(width=240, force_terminal=False, color_system=None, highlight=False)
    with console.capture() as capture:
        _print(report, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _print(report: VerdictReport, console: Any) -> None:
    console.print(_overview(report))
    console.print(_changes(report))
    if any(row.speed for row in report.rows):
        from edgeflow.speed import speed_table

        console.print(speed_table(report))
    for line in [*summary(report), *report.notes, *sentences(report)]:
        console.print(line, markup=False, soft_wrap=True)


def grid(*columns: str, title: str) -> Any:
    """An empty ``rich`` table; the first two columns are texts, the others figures."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold", no_wrap=number > 1)
    return table


def _overview(report: VerdictReport) -> Any:
    closeness = [f"{f.column}{' dB' if 'PSNR' in f.column else ''}" for f in CLOSENESS.values()]
    table = grid(
        "Model", "runs", "MiB", *(f.column for f in FIGURES.values()), *closeness,
        title=f"against {report.model.name}",
    )  # fmt: skip
    for row in (report.model, *report.rows):
        figures = [f"{row.figures[name]:.{f.digits}f}" for name, f in FIGURES.items()]
        near = [show_close(row, name) for name in CLOSENESS]
        cells = (row.name, f"{row.runtime} {row.precision}", f"{row.graph_bytes / _MIB:.2f}", *figures, *near)
        table.add_row(*map(_plain, cells), end_section=row is report.model)
    return table


def show_close(row: VerdictRow, name: str) -> str:
    """A figure of closeness, ``equal`` for equal pictures, a dash for the model itself."""
    found = row.closeness.get(name)
    if found is None:
        return "–"
    return "equal" if math.isinf(found.value) else f"{found.value:.{CLOSENESS[name].digits}f}"


def _changes(report: VerdictReport) -> Any:
    table = grid(
        "Model", "figure", "value", "change", "95 % interval", "verdict", title="change, with its interval"
    )
    for row in report.rows:
        for number, (name, change) in enumerate(row.changes.items()):
            digits = FIGURES[name].digits
            colour = {INSIDE: "", WORSE: "red"}.get(change.verdict, "green")
            table.add_row(
                _plain(row.name if number == 0 else ""),
                heading(name),
                f"{row.figures[name]:.{digits}f}",
                signed(change.value, digits),
                f"{signed(change.low, digits)} to {signed(change.high, digits)}",
                f"[{colour}]{change.verdict}[/]" if colour else change.verdict,
                end_section=number == len(row.changes) - 1,
            )
    return table


def sentences(report: VerdictReport) -> list[str]:
    """What is said of every row: its pictures, then its speed where it was measured."""
    from edgeflow.speed import speed_sentence

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


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


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
