"""The benchmark of drawing at full size: narrow, eager, on a CPU; what it says of its own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("torchao")

from edgeflow.training.inference_benchmark import MORE_ROWS, ROWS, goals, main, table  # noqa: E402
from edgeflow.training.inference_model import Model  # noqa: E402
from edgeflow.training.inference_rows import Variant, build, compared  # noqa: E402

NARROW = ("--width", "narrow", "--device", "cpu", "--no-compile", "--runs", "1")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("narrow", "cpu", runs=1, compile=False)


@pytest.mark.slow  # half precision on a CPU: a minute where it is busy
def test_rows_are_drawn_compared_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    rows = "eager fp32;bf16;decoder fp16"
    assert main(["-o", str(out), *NARROW, "--rows", rows]) == 0
    report = json.loads(out.read_text())
    assert list(report["rows"]) == rows.split(";")
    assert report["rows"]["eager fp32"]["psnr_db"] > 55 and report["rows"]["bf16"]["psnr_db"] > 35
    decoder = report["rows"]["decoder fp16"]
    assert decoder["sqnr_db"] > 40 and decoder["kernels"][0]["ms"] >= decoder["kernels"][-1]["ms"] > 0
    assert decoder["of_matrix_rate"] == pytest.approx(decoder["floor_ms"] / decoder["gpu_ms"], abs=2e-3)
    assert report["goals"]["batch 1, ms"]["measured"] is None
    assert "| bf16 |" in capsys.readouterr().out


def test_a_batch_is_compared_with_its_own_first_pictures(model: Model) -> None:
    variant = Variant(precision="fp32", batch=3)
    module, _ = build(model, variant)
    with torch.no_grad():
        output = module(*model.inputs("pipeline", 3, False))
    assert compared(model, output, variant)["psnr_db"] > 55
    assert compared(model, output.flip(0), variant)["psnr_db"] < 30


@pytest.mark.parametrize(("integers", "floor_db"), [("w8", 35), ("w8a8", 30)])
def test_integers_are_smaller_and_near(model: Model, integers: str, floor_db: float) -> None:
    plain, _ = build(model, Variant("unet", "bf16", without=("qkv",)))
    variant = Variant("unet", "bf16", integers=integers)
    module, facts = build(model, variant)
    with torch.no_grad():
        output = module(*model.inputs("unet", 1, False))
    assert compared(model, output, variant)["sqnr_db"] > floor_db - 10
    floats = sum(t.numel() * t.element_size() for t in plain.parameters())
    assert facts["weights_mib"] * 2**20 < 0.9 * floats


@pytest.mark.slow  # half a minute: the counter follows every call of the full-size modules
def test_the_arithmetic_is_stable_diffusions() -> None:
    """Full size, counted without weights; the issue's 803, 2,515 and 141 GFLOP, and what upsampling saves."""
    gflop = Model("full", "cpu", runs=0, compile=False).gflop
    assert gflop["unet"]["plain"] == pytest.approx(803, abs=4)
    assert gflop["decoder"]["plain"] == pytest.approx(2515, abs=10)
    assert gflop["tiny decoder"]["plain"] == pytest.approx(141, abs=4)
    saved = gflop["decoder"]["plain"] - gflop["decoder"]["rewritten"]
    # 5/9 of three 3 × 3 convolutions after upsampling, but for the border that a 2 × 2 kernel adds.
    sides, channels = (128, 256, 512), (512, 512, 256)
    whole = sum(2e-9 * 9 * n * n * c * c for n, c in zip(sides, channels, strict=True))
    assert saved == pytest.approx(5 / 9 * whole, rel=0.03)


def test_goals_know_their_direction() -> None:
    rows = {"fp16": {"ms": 8.0, "psnr_db": 39.0}, "eager fp16": {"ms": 80.0}}
    found = goals(rows)
    assert found["batch 1, ms"] == {"measured": 8.0, "goal": "at most 9", "met": True}
    assert found["batch 1, times as fast as eager fp16"]["met"] is True
    assert found["fp16 against fp32, PSNR dB"]["met"] is False
    assert found["tiny decoder, ms"]["met"] is None
    assert "| fp16 | 8.0 |" in table(rows)


def test_no_row_begins_that_would_not_end_in_time(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert main(["-o", str(out), *NARROW, "--minutes", "0", "--rows", "more"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == set(MORE_ROWS) and all("s left, about" in r["skipped"] for r in rows.values())
    assert main(["-o", str(out), *NARROW]) == 2
    assert main(["-o", str(tmp_path / "b.json"), *NARROW, "--rows", "magic"]) == 2
    assert not set(ROWS) & set(MORE_ROWS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a CUDA device")
def test_without_a_gpu_it_is_exit_code_4(tmp_path: Path) -> None:
    assert main(["-o", str(tmp_path / "report.json")]) == 4
