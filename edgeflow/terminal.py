"""Results on stdout: tables and sentences, as a terminal or the reader of a pipe wants them. Torch-free.

What is printed is a sequence of parts: ``rich`` tables (and other renderables) and plain sentences. A
terminal gets its own width and colours; a pipe gets plain text in which nothing is folded that its reader may
search for. Texts are printed as they are: no ``[markup]`` and no ``:emoji:`` is read out of a path or prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from rich.table import Table

#: A sentence, or anything else that ``rich`` prints.
Part = Any
#: Columns of an output that no terminal limits.
_PIPED_WIDTH = 240


class _Report(Protocol):
    def to_json(self) -> str: ...


def print_report(report: _Report, parts: Iterable[Part], *, as_json: bool) -> None:
    """The report on stdout: its JSON, or the parts that say the same to people."""
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        show(parts)


def show(parts: Iterable[Part]) -> None:
    """The parts on stdout, in the terminal's width and colours; plain in a pipe."""
    if not sys.stdout.isatty():
        click.echo(plain(parts), nl=False)
        return
    from rich.console import Console

    _print(parts, Console(highlight=False, markup=False, emoji=False))


def plain(parts: Iterable[Part]) -> str:
    """The parts as text without colours, no sentence wrapped, no white space at the ends of lines."""
    from rich.console import Console

    console = Console(
        width=_PIPED_WIDTH,
        force_terminal=False,
        color_system=None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as capture:
        _print(parts, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _print(parts: Iterable[Part], console: Any) -> None:
    from rich.table import Table

    for part in parts:
        console.print(part, soft_wrap=not isinstance(part, Table))


def table(texts: Sequence[str], figures: Sequence[str] = (), *, title: str | None = None) -> Table:
    """An empty table: columns of texts, which may fold, then of figures, on the right and whole."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in texts:
        made.add_column(name, overflow="fold")
    for name in figures:
        made.add_column(name, justify="right", no_wrap=True)
    return made
