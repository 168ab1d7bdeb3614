"""Options that mean the same in every verb, and how loud a verb is.

Decorators, each giving the verb one keyword argument:

- ``out_option`` → ``out: Path``; ``force_option`` → ``force: bool``; ``seed_option`` → ``seed: int``;
  ``json_option`` → ``as_json: bool``; ``count_option(NAME, …)`` → a whole number under that name.
- ``verbosity`` → no argument: it sets how loud the logger ``edgeflow`` is (-q errors, default also
  warnings and notes, -v also debugging and tracebacks).

Use ``logging.getLogger("edgeflow")`` (or a child) for notes: they go to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_LOG = logging.getLogger("edgeflow")

#: ``context_settings`` of the group and of every verb: a verb answers to -h also when it is run by itself.
CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
#: Loggers of libraries that remark on themselves while they are imported, on any use: torchao on kernels that
#: we never call, diffusers on torchao. -v lets them speak.
_CHATTY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def out_option(help: str, *, required: bool = True) -> Callable[[F], F]:
    """``-o/--out PATH`` → ``out: Path`` (or None where not required)."""
    return click.option(
        "-o", "--out", type=click.Path(path_type=Path), required=required, metavar="PATH", help=help
    )


def force_option(function: F) -> F:
    """``--force`` → ``force: bool``."""
    return click.option("--force", is_flag=True, help="Replace an output that already exists.")(function)


def seed_option(function: F) -> F:
    """``--seed N`` → ``seed: int``, 0 if not given."""
    return click.option(
        "--seed",
        type=int,  # not IntRange, which would print twenty digits into the help
        callback=_checked_seed,
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of all randomness; the same seed gives the same result.",
    )(function)


def _checked_seed(ctx: click.Context, param: click.Parameter, value: int) -> int:
    if not 0 <= value < 2**64:
        raise click.BadParameter(f"expected 0 to 2**64 - 1, got {value}", ctx, param)
    return value


def json_option(function: F) -> F:
    """``--json`` → ``as_json: bool``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def verbosity(function: F) -> F:
    """``-v/--verbose`` and ``-q/--quiet``; the verb gets no argument for them."""
    quiet = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=lambda ctx, param, value: _set_level(logging.ERROR) if value else None,
        help="Say nothing but errors.",
    )
    loud = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=lambda ctx, param, value: _set_level(logging.DEBUG) if value else None,
        help="Say more, and show tracebacks.",
    )
    return loud(quiet(function))


def count_option(
    name: str,
    help: str,
    *,
    least: int = 1,
    most: int | None = None,
    default: int | None = None,
    of: str = "N",
) -> Callable[[F], F]:
    """``NAME N``, a whole number from ``least`` to ``most``; without it ``default``, which the help shows."""
    return click.option(
        name,
        type=click.IntRange(least, most),
        default=default,
        show_default=default is not None,
        metavar=of,
        help=help,
    )


def example(*lines: str) -> str:
    """A ``click.command(epilog=…)``: the runnable example that ends every help text."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


def print_json(value: Any) -> None:
    """The result as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def verbose() -> bool:
    """Whether -v was given."""
    return _LOG.isEnabledFor(logging.DEBUG)


def quiet() -> bool:
    """Whether -q was given."""
    return not _LOG.isEnabledFor(logging.WARNING)


def show_progress() -> bool:
    """Whether a progress bar belongs on stderr: it is a terminal, and -q was not given."""
    return sys.stderr.isatty() and not quiet()


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """The items, with a progress bar on stderr while they are worked off, where one belongs."""
    if not show_progress() or len(items) < 2:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=label, console=Console(stderr=True), transient=True)


def spinner(stack: ExitStack) -> Callable[[str], None]:
    """Tells each step on stderr until the stack ends, where there is a terminal to show it; else with -v."""
    if not show_progress():
        return lambda step: _LOG.debug("step: %s", step)
    from rich.console import Console

    return stack.enter_context(Console(stderr=True).status("opening")).update


def bars(stack: ExitStack) -> Callable[[str, int], Callable[[int], None]]:
    """``begin(name, total)`` draws one more bar on stderr and gives what advances it by a count.

    The bars stay until the stack ends; nothing is drawn where none belong.
    """
    if not show_progress():
        return lambda name, total: lambda done: None
    drawn = _drawn(stack)

    def begin(name: str, total: int) -> Callable[[int], None]:
        task = drawn.add_task(name, total=total)
        return lambda done: drawn.advance(task, done)

    return begin


def bar(stack: ExitStack) -> Callable[[str, int, int], None]:
    """``at(step, done, total)`` moves the one bar on stderr to that step.

    The bar stays until the stack ends; nothing is drawn where none belongs.
    """
    if not show_progress():
        return lambda step, done, total: None
    drawn = _drawn(stack)
    task = drawn.add_task("", total=None)
    return lambda step, done, total: drawn.update(task, description=step, completed=done, total=total)


def _drawn(stack: ExitStack) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    return stack.enter_context(Progress(console=Console(stderr=True), transient=True))


class _Stderr(logging.Handler):
    """Notes as they are, warnings and debugging marked; to the stderr of this very moment."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        click.echo(mark + record.getMessage(), err=True)


def _set_level(level: int) -> None:
    _LOG.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET if level == logging.DEBUG else logging.ERROR)


def reset_verbosity() -> None:
    """The default loudness; the handler is added once."""
    _set_level(logging.INFO)
    if not any(isinstance(h, _Stderr) for h in _LOG.handlers):
        _LOG.addHandler(_Stderr())
        _LOG.propagate = False
