"""What can go wrong that a user can mend, each with the exit code the command line documents.

Exit codes: 0 done, 1 failed, 2 usage, 3 a gate failed, 4 backend not installed.
A message is one sentence: ``what: where: expected, got; known: …``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_BACKEND = 4


class EdgeflowError(Exception):
    """Base of every error a user can mend. Misuse by code is a plain ``ValueError``."""

    exit_code = EXIT_FAILED


class UsageError(EdgeflowError):
    """The command was asked for something that does not exist (exit code 2)."""

    exit_code = EXIT_USAGE


class UnknownNameError(UsageError):
    """A name that is not in a known set; the message lists the set."""

    def __init__(self, what: str, name: str, known: Iterable[str]):
        super().__init__(f"{what} {name!r} is not known; known: {', '.join(sorted(known))}")


class OutputExistsError(UsageError):
    """The output is already there and ``--force`` was not given."""

    def __init__(self, path: object):
        super().__init__(f"output {path} already exists; give another -o/--out or --force to replace it")


class CheckpointError(EdgeflowError):
    """A checkpoint that cannot be opened: missing part, pickle, truncated file."""


class BundleError(EdgeflowError):
    """A bundle that cannot be trusted: changed bytes, a path outside the folder, an unknown schema."""


class DataError(EdgeflowError):
    """A dataset that cannot be used."""


class ConfigError(UsageError):
    """One or several wrong configuration keys; the message holds all of them."""


class TrainingError(EdgeflowError):
    """A training run that had to stop: non-finite loss, a resume that does not fit."""


class ExportError(EdgeflowError):
    """A component that a backend cannot take."""


class RuntimeFailure(EdgeflowError):
    """A backend that could not load or run an artifact."""


class GateFailed(EdgeflowError):
    """A measured figure is on the wrong side of its gate. Raised after the whole report is printed."""

    exit_code = EXIT_GATE


class BackendMissing(EdgeflowError):
    """An optional dependency is not installed; the message carries the pip line."""

    exit_code = EXIT_BACKEND

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; install it with: pip install 'edgeflow[{extra}]'")


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of what an extra brings: a missing package is BackendMissing, with the pip line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgeflow"):
            raise
        raise BackendMissing(error.name or extra, extra) from error


class DeviceMissing(EdgeflowError):
    """A backend whose device this machine does not have, or whose driver does not answer."""

    exit_code = EXIT_BACKEND
