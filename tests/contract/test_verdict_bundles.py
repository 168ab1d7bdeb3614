"""The verdict runs the bundles themselves, in their own runtimes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeflow.cli import main
from edgeflow.generate import Generator
from edgeflow.measure import Plan
from edgeflow.training.verdict import Request, judge
from edgeflow.verdict import VerdictSettings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "edgeflow.training.verdict.VerdictSettings",
        lambda **given: VerdictSettings(resamples=40, frechet_resamples=10, agreement_steps=10, **given),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training pictures and 8 held-out ones of flat colours."""
    import io

    from PIL import Image

    from edgeflow.training.dataset import write_shards

    folder, named = tmp_path_factory.mktemp("flat"), []
    for i in range(28):
        out = io.BytesIO()
        Image.new("RGB", (32, 32), (9 * i, 255 - 7 * i, (60 * i) % 256)).save(out, "PNG")
        named.append((f"{i:03d}", out.getvalue(), {"caption": f"colour {i}"}))
    write_shards(folder, "train", named[:20], "png")
    write_shards(folder, "test", named[20:], "png")
    return folder


def test_a_bundles_pictures_are_its_runtimes_own(
    bundles: Callable[[str], Path], tiny_checkpoint: Path, data: Path
) -> None:
    paths = [bundles("onnx") / f"onnx-pipeline-{precision}" for precision in ("fp32", "fp16")]
    judged = judge(
        Request([str(p) for p in paths], str(tiny_checkpoint), data, seed=3),
        lambda name, total: lambda done: None,
    )
    for row, path, drawn in zip(judged.report.rows, paths, judged.drawn, strict=True):
        assert (row.kind, row.runtime, row.name) == ("bundle", "onnx", path.name)
        generator = Generator.open(path)
        for prompt, seed, picture in list(zip(judged.prompts, judged.seeds, drawn, strict=True))[:2]:
            assert np.array_equal(generator.draw(prompt, seed).pixels.transpose(2, 0, 1), picture)
    full, half = (row.closeness["psnr_worst_db"].value for row in judged.report.rows)
    assert full >= 50 and half >= 35
    assert judged.report.rows[1].graphs[0]["name"] == "pipeline"


def test_the_command_gates_times_and_draws_bundles(
    bundles: Callable[[str], Path],
    tiny_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgeflow.measure.Plan", lambda: Plan(launches=2, rounds=1, runs=1))
    models = [str(bundles("onnx") / f"onnx-pipeline-{precision}") for precision in ("fp16", "fp32")]
    page = tmp_path / "verdict.html"
    argv = ["quality", *models, "--against", str(tiny_checkpoint), "--data", str(data), "--json"]
    assert main([*argv, "--gate", "psnr=35,distance=0.1", "--speed", "--html", str(page)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gates"] == {"psnr": 35.0, "distance": 0.1}
    assert [row["speed"]["check"].split(",")[0] for row in report["rows"]] == ["the expected picture"] * 2
    half, full = (row["speed"]["against"] for row in report["rows"])
    assert [other["precision"] for other in half] == ["fp32"] and [o["name"] for o in full] == [
        "onnx-pipeline-fp16"
    ]
    assert half[0]["value"] == pytest.approx(1 / full[0]["value"])
    assert report["model"]["speed"]["against"] == []  # torch's own runtime, which no bundle shares
    text = page.read_text(encoding="utf-8")
    assert text.count("<img") == 2 * 8 * 4 and "Speed on the machine" in text and "gates passed" in text
