"""The presets of Stable Diffusion's size carry the paper's schedule."""

from __future__ import annotations

import pytest

from edgeflow.cli import main
from edgeflow.training.presets import PRESETS
from edgeflow.training.sd_paper_schedule import SCHEDULE, ratios, schedule, schedule_table


def test_the_presets_are_the_papers_schedule() -> None:
    """Batch sizes and steps of the four phases, and the benchmark's account of the same images."""
    first, second = PRESETS["sd15"], PRESETS["sd15-second"]
    loops = [first["reflow"].loop, second["reflow"].loop, first["distill"].loop, second["distill"].loop]
    phases = [(x.batch_size, x.steps) for x in loops]
    assert phases == [(64, 70_000), (1024, 25_000), (1024, 21_500), (1024, 18_000)]
    assert all((x.learning_rate, x.warmup_steps, x.ema_decay) == (1e-6, 1000, 0.9999) for x in loops)
    assert all(x.batch_size // x.accumulate in (4, 16) for x in loops)
    assert (first["pairs"].steps, first["pairs"].guidance, second["pairs"].guidance) == (25, 5.0, 1.5)
    images = [first["pairs"].num_pairs, *(batch * steps for batch, steps in phases)]
    assert [stage[1] for stage in SCHEDULE] == images
    assert sum(stage[3] for stage in SCHEDULE) == pytest.approx(199.2)
    assert first["distill"].latent_weight == 1 and first["distill"].perceptual_weight == 0
    assert second["distill"].latent_weight == 0 and second["distill"].perceptual_weight == 1


def test_gpu_days_are_images_over_speed() -> None:
    row = {"batch_size": 16, "images_per_s": 100.0}
    rows = {
        name: dict(row) for name in ("pairs", "reflow", "distill", "distill + perceptual", "plain reflow")
    }
    rows["reflow, CUDA graph"] = {"batch_size": 16, "images_per_s": 200.0}
    rows["plain reflow"]["images_per_s"] = 50.0
    rows["plain distill"] = {"batch_size": 8, "images_per_s": 50.0}
    assert dict(ratios(rows)) == {"reflow": 2.0, "reflow, CUDA graph": 4.0}, (
        "other batch sizes do not compare"
    )
    paper = schedule(rows)
    assert paper["stages"]["distill, L2"]["gpu_days"] == round(21_500 * 1024 / 100 / 86_400, 2)
    assert paper["stages"]["reflow, batch 64"]["gpu_days"] == round(70_000 * 64 / 200 / 86_400, 2)
    assert paper["gpu_days"] == pytest.approx(sum(s["gpu_days"] for s in paper["stages"].values()))
    assert f"| all | | {paper['gpu_days']} | 199.2 |" in schedule_table(rows)
    rows["pairs"] = {"skipped": "3 s left"}
    assert schedule(rows)["gpu_days"] is None and "| pairs | 3,200,000 | – | 16.0 |" in schedule_table(rows)


def test_a_stage_that_the_preset_lacks_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "teacher", "--preset", "sd15", "-o", "none"]) == 2
    assert (
        "stage of the preset sd15 'teacher' is not known; known: distill, pairs, reflow"
        in capsys.readouterr().err
    )
