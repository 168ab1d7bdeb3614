"""The command line: parse, call, print. Each verb is one module, imported only when it runs.

Results go to stdout, everything else to stderr. Exit codes are those of edgeflow.errors; Ctrl-C is 130.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from edgeflow import __version__
from edgeflow.cli import options
from edgeflow.errors import EXIT_FAILED, EXIT_USAGE, BackendMissing, EdgeflowError, UnknownNameError

#: Verb → its one-line help, in the order in which the verbs are used. The module ``edgeflow.cli.<verb>``
#: exposes ``command``; the help stands here so that listing the verbs imports none of them.
VERBS = {
    "data": "Make a captioned picture set to train on.",
    "train": "Train a model stage by stage, from autoencoder to one step.",
    "quantize": "Store a checkpoint's weights as integers, by a recipe.",
    "export": "Turn a checkpoint into bundles for ONNX, OpenVINO and Core ML.",
    "generate": "Draw pictures from prompts.",
    "parity": "Measure how close each bundle is to PyTorch.",
    "quality": "Measure how good a model's pictures are.",
    "bench": "Measure how fast a model draws, loads and starts.",
    "push": "Upload a bundle or a checkpoint to the hub, with a card.",
    "doctor": "Check this machine and its installed versions.",
    "inspect": "Say what a checkpoint or a bundle is.",
}

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

#: Optional packages a verb may need, and the extra that brings each.
_EXTRAS = {
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "coremltools": "coreml",
    "webdataset": "train",
    "resvg_py": "train",
    "torchmetrics": "train",
    **dict.fromkeys(
        ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "torchao", "scipy"), "export"
    ),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
}


class LazyGroup(click.Group):
    """A group whose commands are named in VERBS and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"edgeflow.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise UnknownNameError("command", args[0], VERBS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=LazyGroup,
    context_settings=options.CONTEXT,
    epilog=options.example(
        'edgeflow generate emoji "red apple, noto style" -o apple.png',
        "edgeflow export emoji --to onnx -o bundles",
    ),
)
@click.version_option(__version__, message="edgeflow %(version)s")
def cli() -> None:
    """Take a text-to-image model down to one step and onto people's own devices."""


def main(argv: Sequence[str] | None = None, program: click.Command = cli, name: str = "edgeflow") -> int:
    """Run the command line and return its exit code. Never raises for what a user can cause.

    ``program`` is another command that is to answer as edgeflow does, under its own name.
    """
    options.reset_verbosity()
    try:
        with _terminate_cleanly():
            result = program.main(
                args=None if argv is None else list(argv), prog_name=name, standalone_mode=False
            )
        sys.stdout.flush()
        return result if type(result) is int else 0
    except EdgeflowError as error:
        return _fail(str(error), error.exit_code, error)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "edgeflow"
        return _fail(f"{error.format_message().rstrip('.')}; see: {path} -h", EXIT_USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        _handled()
        if _Terminated in (type(error), type(error.__cause__)):  # click turns every interrupt into Abort
            return EXIT_TERMINATED
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        return _reader_left()
    except SystemExit as error:  # click turns a broken pipe into this; a verb may exit by itself
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            return _unexpected(error)
        missing = BackendMissing(package, _EXTRAS[package])
        return _fail(str(missing), missing.exit_code, error)
    except Exception as error:
        return _unexpected(error)


def _handled() -> None:
    """Let the exit code stand: where an interrupt has left code given to exec (a dataclass being made, say),
    CPython run by ``-m`` ends by SIGINT whatever the program returns, until other such code has run."""
    exec("")


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    """One line on stderr; with -v the traceback before it."""
    if error is not None and options.verbose():
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    click.echo("error: " + " ".join(message.split()), err=True)
    return code


def _unexpected(error: Exception) -> int:
    hint = "" if options.verbose() else "; run with -v for the traceback"
    reason = " ".join(str(error).split()) or "no message"
    return _fail(f"unexpected {type(error).__name__}: {reason}{hint}", EXIT_FAILED, error)


def _reader_left() -> int:
    """The reader of our output has gone (``edgeflow … | head``): stay silent, also when Python flushes."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILED


class _Terminated(KeyboardInterrupt):
    """SIGTERM. An interrupt because Python itself lets nothing else through everywhere: a signal that arrives
    while the compiler folds a constant such as 2**64 is forgotten if its handler raises anything else."""


@contextlib.contextmanager
def _terminate_cleanly() -> Iterator[None]:
    """SIGTERM unwinds like an exception, so that half-written outputs are removed."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
