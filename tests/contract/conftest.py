"""Bundles of the tiny checkpoint on every backend, exported once however many processes run the tests."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path):
    """The tiny checkpoint, opened."""
    from edgeflow.checkpoint import Checkpoint

    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="session")
def bundles(checkpoint, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], Path]:
    """backend → the folder of its bundles, one for each graph layout and precision. Read-only."""
    from edgeflow.export import LAYOUTS, PRECISIONS, export_model

    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def exported(backend: str) -> Path:
        folder = shared / f"runtimes-{backend}"
        with (shared / f"runtimes-{backend}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                export_model(
                    checkpoint, backends=[backend], precisions=PRECISIONS, layouts=tuple(LAYOUTS), out=folder
                )
        return folder

    return exported
