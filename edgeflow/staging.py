"""Files and folders that appear whole or not at all.

``staged_folder`` and ``staged_output`` write what a user asked for, and replace nothing without --force.
``staged_file`` replaces a file of our own while a run goes on, and leaves the old one to whoever is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from edgeflow.errors import EdgeflowError, OutputExistsError, UsageError


@contextlib.contextmanager
def staged_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place when the block ends without an exception.

    Raises OutputExistsError when ``out`` is there and ``force`` is off, EdgeflowError when the place
    cannot be written. On any exception the temporary folder is removed and ``out`` is untouched.
    """
    stage = _beside(out, force)
    try:
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes it private; an output is not
        yield stage
        _replace(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def staged_output(out: Path, *, force: bool) -> Iterator[Path]:
    """The path of a file to write, which takes the place of ``out`` when the block ends without an exception.

    Raises OutputExistsError when ``out`` is there and ``force`` is off, UsageError when it is a folder,
    EdgeflowError when the place cannot be written.
    """
    if out.is_dir():
        raise UsageError(f"output {out}: expected the name of a file, got a folder")
    folder = _beside(out, force)
    try:
        yield folder / out.name
        (folder / out.name).replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _beside(out: Path, force: bool) -> Path:
    """A new private folder beside ``out``, once it is known that ``out`` may be written."""
    if (out.exists() or out.is_symlink()) and not force:
        raise OutputExistsError(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise EdgeflowError(f"output: {out}: expected a writable folder, got: {error.strerror}") from error


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[IO[Any]]:
    """An open binary file that takes the place of ``path`` once it is complete and on the disk.

    A process that is killed meanwhile leaves ``path`` as it was, and perhaps a file ``.partial`` beside it.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    with contextlib.suppress(OSError):  # a folder cannot be synced everywhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _replace(stage: Path, out: Path) -> None:
    """Rename ``stage`` to ``out``; what lay there is moved aside first and removed last."""
    if not (out.exists() or out.is_symlink()):
        stage.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    out.rename(aside / "old")
    stage.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
