"""edgeflow's quantization beside each backend's own: what is matched with what, and what a row says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from torch import nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.loading import load_modules
from edgeflow.parity_reference import reference_from_checkpoint
from edgeflow.quantization import peers
from edgeflow.quantization.apply import plan_for
from edgeflow.quantization.peer_tools import EIGHT, EIGHT_PRODUCTS, FOUR, STORED, TOOLS, Tool, ort_nbits


def test_a_matched_recipe_stores_each_kind_of_layer_as_asked(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    modules = dict(zip(("text_encoder", "unet", "vae"), load_modules(checkpoint), strict=True))
    asked = {"linear": "w4g32", "embedding": "float", "convolution": "w8"}
    plan = plan_for(peers.recipe_of(checkpoint, asked), modules)
    kinds = {
        component: {name.removeprefix("text_model."): type(m) for name, m in modules[part].named_modules()}
        for component, part in (("text_encoder", "text_encoder"), ("unet", "unet"), ("decoder", "vae"))
    }
    expected = {nn.Linear: "w4g32", nn.Embedding: "float", nn.Conv2d: "w8"}
    seen = set()
    for component, schemes in plan.schemes.items():
        for name, scheme in schemes.items():
            kind = kinds[component][name]
            seen.add(kind)
            assert scheme == ("float" if "time_emb" in name else expected[kind]), name
    assert seen == set(expected)
    assert peers.recipe_of(checkpoint, "w8").name == "w8"
    same = dict.fromkeys(asked, "w8g32")
    assert peers.recipe_of(checkpoint, same).name == "w8g32 throughout"


def test_every_tool_has_a_row_of_edgeflows_beside_it() -> None:
    ours = {row.stored for row in peers.OURS}
    assert ours == {tool.stored for tool in TOOLS} == set(STORED)


def test_a_tool_is_a_row_and_one_that_is_absent_or_fails_says_why(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = Checkpoint.open(tiny_checkpoint)

    def broken(source: Path, out: Path, feeds: object) -> None:
        raise ValueError("no such mode\nand a long story")

    nbits = partial(ort_nbits, 8)
    found = (
        Tool(EIGHT_PRODUCTS, "onnxruntime", "MatMulNBits", "onnx", nbits),
        Tool(EIGHT, "onnxruntime", "absent", "onnx", nbits, needs="no_such_package"),
        Tool(EIGHT, "onnxruntime", "broken", "onnx", broken),
    )
    monkeypatch.setattr(peers, "TOOLS", found)
    samples = reference_from_checkpoint(checkpoint, checkpoint.generation.prompts, 1).samples
    rows = list(peers.peer_rows(checkpoint, samples, tmp_path, None))
    assert rows[0].psnr_db[0] > 60 and rows[0].graph_bytes["onnx"] > 1e6
    assert rows[1].said == "ModuleNotFoundError: No module named 'no_such_package'" and not rows[1].psnr_db
    assert rows[2].said == "ValueError: no such mode"
    table = peers.table([*rows, peers.Row(EIGHT, "edgeflow", "w8", (50.0, 60.0), {"onnx": 2**20})])
    lines = table.splitlines()[2:]
    assert lines[0] == "| 8 bits | edgeflow | w8 | 50.0 dB | 55.0 dB | 1.00 MiB onnx |"
    assert [line.split(" | ")[2] for line in lines[1:3]] == ["absent", "broken"]
    assert lines[3].startswith(f"| {EIGHT_PRODUCTS} | onnxruntime | MatMulNBits |")


def test_calibration_is_edgeflows_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from edgeflow.noise import gaussian_noise
    from edgeflow.quantization.calibration import SEED

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"picture {i}" for i in range(70)))
    checkpoint = Checkpoint.open(tiny_checkpoint)
    (sample,) = reference_from_checkpoint(checkpoint, checkpoint.generation.prompts, 1).samples
    feeds = peers.calibration_feeds(checkpoint, str(prompts), sample.arrays)
    assert len(feeds) == peers.PICTURES
    np.testing.assert_array_equal(feeds[3]["noise"], gaussian_noise(SEED + 3, feeds[3]["noise"].shape))
    for name, array in feeds[0].items():
        assert (array.shape, array.dtype) == (sample.arrays[name].shape, sample.arrays[name].dtype)
    assert len({feed["input_ids"].tobytes() for feed in feeds}) > 1


def test_groups_of_four_bits_come_before_tables() -> None:
    row = peers.Row(FOUR, "nncf", "x", (1.0,), {"onnx": 1})
    table = peers.Row(STORED[-1], "edgeflow", "w4", (90.0,), {"coreml": 1})
    assert peers.table([table, row]).splitlines()[2].startswith("| 4 bits |")
