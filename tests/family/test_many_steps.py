"""Many-step models: refused for one step; drawn in several as diffusers and InstaFlow's paper draw them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.cli import cli  # noqa: E402
from edgeflow.components import load_components  # noqa: E402
from edgeflow.errors import CheckpointError, ExportError, UsageError  # noqa: E402
from edgeflow.generate import Generator, open_model  # noqa: E402
from edgeflow.loading import load_modules  # noqa: E402

PROMPT, SEED = "a red bicycle", 3


def drawn(folder: Path, steps: int, guidance: float | None) -> np.ndarray:
    """The picture (3, H, W) in [0, 1] before rounding."""
    generator = Generator.open(folder, steps=steps, guidance=guidance)
    ids, noise = generator.inputs(PROMPT, SEED)
    return generator.runtime.run("pipeline", {"input_ids": ids, "noise": noise})["image"][0]


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_diffusion_model_is_drawn_as_diffusers_draws_it(
    guidance: float, prediction: str, published: Callable[..., Path], tmp_path: Path
) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    folder = Path(shutil.copytree(published("sd21", "diffusion"), tmp_path / "sd"))
    where = folder / "scheduler/scheduler_config.json"
    where.write_text(json.dumps({**json.loads(where.read_text()), "prediction_type": prediction}))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(SEED))
    options = {"num_inference_steps": 3, "guidance_scale": guidance, "latents": latents}
    expected = pipeline(PROMPT, output_type="pt", **options).images[0].numpy()
    actual = drawn(folder, 3, guidance)
    assert expected.std() > 0.05
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_a_rectified_flow_is_integrated_by_euler_with_float_timesteps(published: Callable[..., Path]) -> None:
    """Equation 1 of the paper in double-checked form: x₁ = x₀ + Σ v(x, 1000·(1 − i/N))/N, v guided."""
    folder = published(kind="rectified-flow")
    text, unet, vae = load_modules(Checkpoint.open(folder))
    generator = Generator.open(folder, steps=4, guidance=1.5)
    with torch.no_grad():
        hidden, empty = (
            text(torch.from_numpy(generator.tokenizer.encode(p))).last_hidden_state for p in (PROMPT, "")
        )
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(SEED))
        for t in (1000.0, 750.0, 500.0, 250.0):
            v, u = unet(x, t, hidden).sample, unet(x, t, empty).sample
            x = x + 0.25 * (1.5 * v - 0.5 * u)
        expected = (vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)[0].numpy()
    np.testing.assert_allclose(drawn(folder, 4, None), expected, atol=2e-4)  # 1.5 is the kind's own guidance
    assert np.abs(drawn(folder, 4, 1.0) - expected).max() > 0.01


def test_one_euler_step_is_the_one_step_model(published: Callable[..., Path], instaflow: Path) -> None:
    generator = Generator.open(instaflow)
    ids, noise = generator.inputs(PROMPT, SEED)
    pipeline = load_components(Checkpoint.open(instaflow))["pipeline"]
    expected = pipeline.run({"input_ids": ids, "noise": noise})["image"][0]
    np.testing.assert_allclose(drawn(published(kind="rectified-flow"), 1, 1.0), expected, atol=5e-5)


@pytest.mark.parametrize("kind", ["rectified-flow", "diffusion"])
def test_a_many_step_model_is_refused_for_one_step_with_the_reason(
    kind: str, published: Callable[..., Path]
) -> None:
    folder = published(kind=kind)
    assert open_model(folder).kind == kind
    with pytest.raises(CheckpointError, match=f"got kind '{kind}' of 25 steps; .* --steps 25"):
        Generator.open(folder)
    with pytest.raises(ExportError, match="needs several steps and cannot be drawn in one"):
        load_components(Checkpoint.open(folder))
    with pytest.raises(UsageError, match="expected the runtime torch, which draws in several, got 'onnx'"):
        Generator.open(folder, "onnx", steps=2)


def test_a_one_step_model_takes_neither_steps_nor_guidance(instaflow: Path) -> None:
    with pytest.raises(UsageError, match=r"--steps 4: .* draws in one step without guidance"):
        Generator.open(instaflow, steps=4)
    with pytest.raises(UsageError, match=r"--guidance 7\.5: "):
        Generator.open(instaflow, guidance=7.5)


def test_generate_draws_a_2_rectified_flow_and_says_how(
    published: Callable[..., Path], tmp_path: Path
) -> None:
    from PIL import Image

    folder, out = published(kind="rectified-flow"), tmp_path / "picture.png"
    asked = ["generate", str(folder), PROMPT, "--steps", "2", "-o", str(out)]
    done = CliRunner().invoke(cli, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with Image.open(out) as picture:
        assert picture.size == (64, 64)
        assert (picture.info["steps"], picture.info["guidance"]) == ("2", "1.5")
