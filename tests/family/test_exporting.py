"""Published forms through every door: bundles of each backend, parity measured by the command itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.training.random_checkpoint import build_random_checkpoint


@pytest.mark.slow  # four bundles and their parity, four levels of UNet: a minute each
@pytest.mark.parametrize("family", ["sd15", "sd21"])
@pytest.mark.parametrize("backend", ["onnx", "openvino", "coreml"])
def test_narrow_published_forms_hold_every_gate(
    family: str, backend: str, published: Callable[..., Path], tmp_path: Path
) -> None:
    asked = ["export", str(published(family)), "--to", backend, "-o", str(tmp_path / "bundles")]
    asked += ["--precision", "fp32", "--precision", "fp16", "--graph", "pipeline", "--graph", "components"]
    assert main(asked) == 0  # 3 if a parity gate failed
    bundles = sorted((tmp_path / "bundles").iterdir())
    assert len(bundles) == 4
    for path in bundles:
        assert Bundle.open(path).generation.picture_size == 64


@pytest.mark.slow  # writes 2.1 GB
def test_the_full_size_opens_as_instaflow_does(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    build_random_checkpoint(folder, width="full", files="fp16", max_shard_size="1GB")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.kind == "one-step" and checkpoint.generation.picture_size == 512
    assert checkpoint.num_parameters("unet") == 859_520_964
    assert len(checkpoint.weight_files("unet")) == 2
