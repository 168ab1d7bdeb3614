"""Narrow checkpoints of the published form, made once for all tests here. Read-only: copy before changing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgeflow.training.random_checkpoint import KINDS, build_random_checkpoint


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``published(family="sd15", kind="one-step")`` → a narrow folder in both precisions, in shards."""
    base, made = tmp_path_factory.mktemp("published"), {}

    def make(family: str = "sd15", kind: str = "one-step") -> Path:
        if family not in made:
            made[family] = base / family
            build_random_checkpoint(made[family], family=family, files="both", max_shard_size="4MB")
        folder = base / f"{family}-{kind}"
        if not folder.exists():
            shutil.copytree(made[family], folder)
            name, origin = KINDS[kind]
            index = json.loads((folder / "model_index.json").read_text())
            index |= {"_class_name": name, "_name_or_path": origin}
            (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture(scope="session")
def instaflow(published: Callable[..., Path]) -> Path:
    return published()
