"""Any Stable Diffusion as the teacher: pairs are diffusers' own pictures, the student loads in diffusers."""

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
from edgeflow.cli.train import command  # noqa: E402
from edgeflow.generate import Generator  # noqa: E402
from edgeflow.training.pair_shards import read_shard, shard_path  # noqa: E402
from edgeflow.training.reflow import FIRST_SIGN  # noqa: E402

PROMPTS = ("a red bicycle", "an owl on a branch, at night", "soup")
SMALL = ("--preset", "sd15", "--device", "cpu", "--set", "batch_size=2", "--set", "shard_size=4")
LOOP = (
    *("loop.batch_size=2", "loop.bf16=false", "loop.compile=false", "loop.warmup_steps=0"),
    *("loop.accumulate=1", "loop.learning_rate=1e-4"),
)


def train(*arguments: object) -> None:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + str(result.exception)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def teacher(
    published: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``teacher(prediction)`` → a narrow Stable Diffusion whose scheduler says what its UNet predicts."""
    base = tmp_path_factory.mktemp("teachers")

    def make(prediction: str) -> Path:
        folder = base / prediction
        if not folder.exists():
            shutil.copytree(published("sd15", "diffusion"), folder)
            where = folder / "scheduler/scheduler_config.json"
            where.write_text(json.dumps({**json.loads(where.read_text()), "prediction_type": prediction}))
        return folder

    return make


@pytest.fixture(scope="module")
def drawn(
    teacher: Callable[[str], Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``drawn(prediction)`` → a folder of six pairs of that teacher."""
    base = tmp_path_factory.mktemp("pairs")

    def make(prediction: str) -> Path:
        out = base / prediction
        if not out.exists():
            settings = ("--set", "weights=float32", "--set", "steps=4", "--set", "compile=false")
            source = ("--teacher", teacher(prediction), "--prompts", prompts)
            train("pairs", *source, *SMALL, *settings, "--steps", 6, "--seed", 40, "-o", out)
        return out

    return make


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pairs_are_what_diffusers_draws(
    prediction: str, teacher: Callable[[str], Path], drawn: Callable[[str], Path]
) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(teacher(prediction), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.prediction_type == prediction
    shards = [read_shard(shard_path(drawn(prediction), n)) for n in range(2)]
    assert [len(s) for s in shards] == [4, 2]
    assert [c for s in shards for c in s.caption] == [*PROMPTS, *PROMPTS]
    config = json.loads((drawn(prediction) / "config.json").read_text())
    assert config["guidance"] == 5.0, "the preset has the paper's guidance"
    for shard, i in ((shards[0], 1), (shards[1], 0)):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(int(shard.seed[i])))
        options = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise}
        expected = pipeline(shard.caption[i], output_type="latent", **options).images[0]
        actual = torch.from_numpy(shard.latent[i]).float()
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def test_the_predictions_differ(drawn: Callable[[str], Path]) -> None:
    """The same weights and noise, read as ε and as v: no setting is ignored by both sides above."""
    a, b = (read_shard(shard_path(drawn(p), 0)).latent for p in ("epsilon", "v_prediction"))
    assert np.abs(a.astype(float) - b).mean() > 0.1


@pytest.fixture(scope="module")
def student(
    teacher: Callable[[str], Path], drawn: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The v-predicting teacher's one-step student, through the command line."""
    out, source = tmp_path_factory.mktemp("student"), teacher("v_prediction")
    pairs = ("--pairs", drawn("v_prediction"), "--preset", "sd15", "--device", "cpu")
    settings = [a for s in LOOP for a in ("--set", s)]
    train("reflow", *pairs, "--from", source, *settings, "--steps", 2, "-o", out / "reflow")
    train("distill", *pairs, "--from", out / "reflow", *settings, "--steps", 2, "-o", out / "distill")
    return out / "distill" / "checkpoint"


def test_the_student_opens_in_diffusers_and_draws_the_one_step_formula(student: Path) -> None:
    """x₁ = x₀ + v(x₀, 1000), decoded, written out with the parts that diffusers loads."""
    from diffusers import StableDiffusionPipeline

    index = json.loads((student / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert Checkpoint.open(student).kind == "one-step"
    pipeline = StableDiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    # The published pipeline multiplies its noise with this.
    assert float(pipeline.scheduler.init_noise_sigma) == 1.0
    prompt = PROMPTS[0]
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(9))
        latent = noise + pipeline.unet(noise, 1000.0, encoder_hidden_states=text).sample
        image = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    expected = (image[0].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy() * 255
    picture = Generator.open(student).draw(prompt, seed=9)
    assert expected.std() > 5 and np.abs(picture.pixels.astype(float) - expected).max() <= 0.51


def test_the_student_has_the_published_models_keys(student: Path, published: Callable[..., Path]) -> None:
    """The tensor names of every part are InstaFlow's own: what its users' loaders look for."""
    mine, theirs = Checkpoint.open(student), Checkpoint.open(published("sd15", "one-step"))
    for part in ("unet", "text_encoder", "vae"):
        assert set(mine.stored_tensors(part)) == set(theirs.stored_tensors(part)), part
        assert mine.class_name(part) == theirs.class_name(part)
    files = {p.name for p in (student / "tokenizer").iterdir()}
    assert files >= {"vocab.json", "merges.txt", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("prediction", "low", "high"), [("epsilon", -1.06, -1.0), ("v_prediction", -1.09, -1.05)]
)
def test_the_first_sign_is_least_squares(prediction: str, low: float, high: float) -> None:
    """Of pictures N(μ, 1 − m) with known μ, E‖μ‖² = m, the perfect network at t = T; Stable Diffusion's ᾱ."""
    from edgeflow.training.models import dpm_solver

    alpha_bar = dpm_solver().alphas_cumprod[-1]
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    assert 0.06 < a < 0.075
    generator = torch.Generator().manual_seed(0)
    for m in (0.3, 0.6, 0.9):
        mean, rest, noise = torch.randn(3, 400_000, generator=generator)
        mean, x1 = mean * m**0.5, mean * m**0.5 + rest * (1 - m) ** 0.5
        # Posterior mean of x₁ given the input a·x₁ + s·x₀, which one takes for x₀ at τ = 0.
        x = noise
        guess = mean + a * (1 - m) / (a**2 * (1 - m) + s**2) * (x - a * mean)
        output = {"epsilon": (x - a * guess) / s, "v_prediction": (a * x - guess) / s}[prediction]
        best = float((output * (x1 - noise)).sum() / output.square().sum())
        assert low < best < high, m
        assert abs(best - FIRST_SIGN[prediction]) < 0.1


def test_a_rectified_flow_draws_pairs_by_euler_with_guidance(published: Callable[..., Path]) -> None:
    """x ← x + (v(∅) + 1.5·(v(text) − v(∅)))/N, written out: how the second phase's pairs come about."""
    from edgeflow.training.models import load_parts
    from edgeflow.training.sampling import sample_flow

    unet = load_parts(published("sd15", "rectified-flow")).unet
    noise, text, empty = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64), torch.randn(1, 77, 64)
    actual = sample_flow(unet, text, empty, noise, steps=2, guidance=1.5)
    x = noise
    with torch.no_grad():
        for t in (1000.0, 500.0):
            v, u = unet(x, t, text).sample, unet(x, t, empty.expand_as(text)).sample
            x = x + 0.5 * (1.5 * v - 0.5 * u)
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)
    one = sample_flow(unet, text, empty, noise, steps=1, guidance=1.0)
    with torch.no_grad():
        torch.testing.assert_close(one, noise + unet(noise, 1000.0, text).sample, rtol=1e-4, atol=1e-4)
