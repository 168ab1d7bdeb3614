"""The full-size benchmark at narrow width on a CPU, and the plain loop that it compares with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from edgeflow.training import flow  # noqa: E402
from edgeflow.training.full_size_benchmark import main  # noqa: E402
from edgeflow.training.random_checkpoint import build_part, configs  # noqa: E402
from edgeflow.training.sd_plain_loop import PlainBatch, plain_loop  # noqa: E402


def test_the_plain_loop_descends_the_velocitys_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first loss is the formula's, in float32; a hundred times the rate brings it down on one batch."""
    generator = torch.Generator().manual_seed(0)
    noise, latent = torch.randn(2, 2, 4, 8, 8, generator=generator)
    batch = PlainBatch(noise, latent, torch.randn(2, 77, 64, generator=generator), torch.tensor([0.0, 0.7]))
    unet = build_part("unet", configs("sd15", "narrow")["unet"])
    with torch.no_grad():
        x = flow.interpolate(noise, latent, batch.tau)
        v = unet(x, torch.tensor([1000.0, 300.0]), batch.text).sample
        expected = float((v - (latent - noise)).square().mean())
    step = plain_loop(unet, lambda: batch, learning_rate=1e-2)
    losses = [step() for _ in range(8)]
    assert losses[0] == pytest.approx(expected, rel=0.02)  # bf16
    assert losses[-1] < 0.9 * losses[0]


def test_an_existing_report_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert main(["-o", str(tmp_path / "report.json"), "--device", "cpu", "--width", "narrow"]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.slow  # a minute or two: every row in bf16 on a CPU
def test_every_row_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    sizes = ("--batch-size", "2", "--perceptual-batch-size", "1", "--steps", "1", "--minutes", "30")
    assert main(["-o", str(out), "--device", "cpu", "--width", "narrow", "--no-compile", *sizes]) == 0
    report = json.loads(out.read_text())
    assert set(report["rows"]) == {
        *("plain reflow", "plain distill", "reflow", "distill", "pairs"),
        *("plain distill + perceptual", "distill + perceptual"),
    }
    assert all(row["images_per_s"] > 0 for row in report["rows"].values())
    assert set(report["ratio_to_plain"]) == {"reflow", "distill", "distill + perceptual"}
    assert "| reflow | 2 |" in capsys.readouterr().out


def test_no_row_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert main(["-o", str(out), "--device", "cpu", "--width", "narrow", "--minutes", "0"]) == 0
    rows = json.loads(out.read_text())["rows"].values()
    assert all("s left, about" in row["skipped"] for row in rows) and len(rows) == 7
