"""``edgeflow train``: the stages from files to files, at the preset ``tiny`` on a CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.cli.train import command
from edgeflow.generate import Generator
from edgeflow.training.flow import euler
from edgeflow.training.models import load_parts
from edgeflow.training.pair_shards import read_shard
from edgeflow.training.pairs import Pairs
from edgeflow.training.sampling import seeded_noise

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 60, 220), "yellow": (250, 220, 40)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of 12 coloured shapes, and one picture that cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for colour, rgb in COLOURS.items():
        for shape in ("circle", "square", "line"):
            picture = Image.new("RGB", (32, 32), "white")
            draw = ImageDraw.Draw(picture)
            {"circle": draw.ellipse, "square": draw.rectangle, "line": draw.line}[shape](
                (6, 6, 25, 25), fill=rgb
            )
            picture.save(folder / f"{colour}-{shape}.png")
            rows.append({"file_name": f"{colour}-{shape}.png", "text": f"{colour} {shape}"})
    (folder / "broken.png").write_bytes(b"no picture")
    rows.append({"file_name": "broken.png", "text": "broken"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def train(*arguments: object) -> None:
    result = CliRunner().invoke(
        command, [str(a) for a in (*arguments, "--preset", "tiny", "--device", "cpu")]
    )
    assert result.exit_code == 0, result.output + str(result.exception)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of all stages."""
    out = tmp_path_factory.mktemp("runs")
    train("autoencoder", "--data", data, "-o", out / "autoencoder")
    train("teacher", "--data", data, "--from", out / "autoencoder", "-o", out / "teacher")
    train("pairs", "--data", data, "--from", out / "teacher", "-o", out / "pairs")
    train("reflow", "--from", out / "teacher", "--pairs", out / "pairs", "-o", out / "reflow")
    train("distill", "--from", out / "reflow", "--pairs", out / "pairs", "-o", out / "distill")
    sharpen = ("adversarial", "--from", out / "distill", "--pairs", out / "pairs")
    train(*sharpen, "--data", data, "--set", "real_fraction=0.5", "-o", out / "adversarial")
    return out


def test_every_stage_leaves_its_files(runs: Path) -> None:
    kinds = {
        "autoencoder": "autoencoder",
        "teacher": "diffusion",
        "reflow": "rectified-flow",
        "distill": "one-step",
        "adversarial": "one-step",
    }
    for stage, kind in kinds.items():
        assert Checkpoint.open(runs / stage / "checkpoint").kind == kind
        lines = [json.loads(x) for x in (runs / stage / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((runs / stage / "config.json").read_text())
        assert lines[-1]["step"] == config["loop"]["steps"]
    for stage in (*kinds, "pairs"):
        assert np.asarray(Image.open(runs / stage / "sheet.png")).std() > 1


def test_pairs_are_the_teachers_pictures_of_seeded_noise(runs: Path) -> None:
    """Every stored latent is drawn again from its seed and caption by diffusers' own pipeline."""
    from diffusers import StableDiffusionPipeline

    config = json.loads((runs / "pairs" / "config.json").read_text())
    shard = read_shard(sorted((runs / "pairs").glob("*.tar"))[1])
    assert shard.seed.tolist() == list(range(16, 32)) and len(set(shard.caption)) == 12
    pipeline = StableDiffusionPipeline.from_pretrained(runs / "teacher" / "checkpoint", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for i in (0, 7):
        drawn = pipeline(
            shard.caption[i],
            num_inference_steps=config["steps"],
            guidance_scale=config["guidance"],
            latents=seeded_noise(torch.from_numpy(shard.seed[i : i + 1]), (8, 8, 8)),
            output_type="latent",
        ).images
        torch.testing.assert_close(torch.from_numpy(shard.latent[i]).float(), drawn[0], rtol=2e-3, atol=2e-3)


def test_the_one_step_model_draws_its_own_one_step(runs: Path) -> None:
    """``edgeflow generate``'s picture is decode(x₀ + v(x₀, 1000)) written out with the parts."""
    folder = runs / "distill" / "checkpoint"
    picture = Generator.open(folder).draw("red circle", seed=5)
    parts = load_parts(folder)
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        "red circle", padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        text = parts.text_encoder(ids).last_hidden_state
        noise = seeded_noise(torch.tensor([5]), (8, 8, 8))
        latent = euler(lambda x, t: parts.unet(x, t, text).sample, noise, 1)
        image = parts.vae.decode(latent / parts.vae.config.scaling_factor).sample
    wanted = (image[0].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy() * 255
    assert np.abs(picture.pixels.astype(float) - wanted).max() <= 0.51


def test_reflow_starts_from_the_teacher(runs: Path) -> None:
    """Ten steps from the teacher's weights (its last layer negated) stay nearer to them than to none."""
    teacher = load_file(runs / "teacher" / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    student = load_file(runs / "reflow" / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in teacher.items():
        wanted = -weight if name.startswith("conv_out") else weight
        assert (student[name] - wanted).abs().mean() < 0.02


def test_a_run_goes_on_with_more_steps(runs: Path, data: Path, tmp_path: Path) -> None:
    """Six steps and four more are ten: the same weights as the uninterrupted run, bit for bit."""
    out = tmp_path / "autoencoder"
    train("autoencoder", "--data", data, "-o", out, "--steps", 6)
    train("autoencoder", "--data", data, "-o", out, "--resume")
    name = Path("checkpoint", "vae", "diffusion_pytorch_model.safetensors")
    assert (out / name).read_bytes() == (runs / "autoencoder" / name).read_bytes()


def _first_log(run: Path) -> dict[str, float]:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return {k: v for k, v in line.items() if k not in ("images_per_s", "seconds", "peak_mib")}


@pytest.mark.parametrize(
    ("stage", "inputs"),
    [
        ("teacher", ("--data", "data", "--from", "autoencoder")),
        ("reflow", ("--from", "teacher", "--pairs", "pairs")),
        ("distill", ("--from", "reflow", "--pairs", "pairs")),
    ],
)
def test_micro_batches_and_checkpointing_change_nothing(
    runs: Path, data: Path, tmp_path: Path, stage: str, inputs: tuple[str, ...]
) -> None:
    """Losses and gradient norms of five steps in four pieces each, with activations recomputed."""
    given = [data if w == "data" else w if w.startswith("--") else runs / w for w in inputs]
    extra = ("--set", "loop.accumulate=4", "--set", "loop.checkpointing=true", "--steps", 5)
    train(stage, *given, *extra, "-o", tmp_path / "run")
    assert _first_log(tmp_path / "run") == pytest.approx(_first_log(runs / stage), rel=2e-5, abs=2e-5)


def test_the_autoencoder_is_split_by_groups(data: Path, tmp_path: Path) -> None:
    """Its term on the latents' moments belongs to a group of pictures: the same in one piece and in four."""
    for pieces in (1, 4):
        settings = (f"loop.accumulate={pieces}", "moments_group=2", "loop.log_every=1")
        extra = [word for setting in settings for word in ("--set", setting)]
        train("autoencoder", "--data", data, *extra, "--steps", 1, "-o", tmp_path / str(pieces))
    whole, split = (_first_log(tmp_path / n) for n in "14")
    assert split == pytest.approx(whole, rel=1e-5)


def test_a_dry_run_says_what_the_run_became_and_writes_nothing(
    runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("train", "teacher", "--preset", "tiny", "--data", str(data), "--device", "cpu", "--dry-run")
    out = str(tmp_path / "out")
    plans = []
    for more in ((), ("--set", "loop.checkpointing=true")):
        assert main([*wanted, "--from", str(runs / "autoencoder"), "-o", out, "--json", *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    plan, lean = plans
    for row in plan["modules"]:
        part = runs / "teacher" / "checkpoint" / row["name"]
        stored = sum(t.numel() for f in part.glob("*.safetensors") for t in load_file(f).values())
        assert row["parameters"] == stored and bool(row["trained"]) == (row["name"] != "vae")
    assert plan["config"] == json.loads((runs / "teacher" / "config.json").read_text())
    assert (plan["steps"], plan["pictures_seen"], plan["examples"], plan["passes"]) == (10, 80, 12, 6.67)
    assert lean["memory_estimate_mib"]["activations"] < 0.5 * plan["memory_estimate_mib"]["activations"]
    assert main([*wanted, "--from", str(runs / "autoencoder"), "-o", out]) == 0
    assert "Nothing was written." in capsys.readouterr().out
    assert not Path(out).exists()
    assert main([*wanted, "--from", str(runs / "autoencoder"), "-o", str(runs / "teacher")]) == 2
    capsys.readouterr()
    reflow = ("train", "reflow", "--preset", "tiny", "--from", str(runs / "teacher"), "--device", "cpu")
    for gib in ("1.0", "1e-6"):  # held, and streamed: the nearest 0.9 of 32 pairs either way
        more = ("--pairs", str(runs / "pairs"), "--set", f"pairs_gib={gib}", "-o", out, "--dry-run", "--json")
        assert main([*reflow, *more]) == 0
        assert json.loads(capsys.readouterr().out)["examples"] == 28
    assert not Path(out).exists()


@pytest.mark.slow  # 20 s: three processes that import everything
def test_a_stage_killed_on_the_command_line_resumes_to_the_same_bytes(
    runs: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as a state is there, wherever the run is by then."""
    out = tmp_path / "run"
    words = ["train", "autoencoder", "--preset", "tiny", "--device", "cpu", "--data", str(data)]
    words += ["--set", "loop.save_steps=1", "-o", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "edgeflow.cli", *words], stderr=subprocess.PIPE)
    while not (out / "state.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main([*words, "--resume"]) == 0
    name = Path("checkpoint", "vae", "diffusion_pytorch_model.safetensors")
    assert (out / name).read_bytes() == (runs / "autoencoder" / name).read_bytes()


@pytest.mark.slow  # 30 s: two processes that import everything
def test_two_processes_on_the_command_line_are_one(runs: Path, data: Path, tmp_path: Path) -> None:
    words = ["train", "teacher", "--preset", "tiny", "--device", "cpu", "--data", str(data)]
    words += ["--from", str(runs / "autoencoder"), "-o", str(tmp_path / "two")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "edgeflow.cli"]
    done = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.splitlines() == [str(tmp_path / "two")]
    assert _first_log(tmp_path / "two") == pytest.approx(_first_log(runs / "teacher"), rel=2e-5, abs=2e-5)


def test_the_adversarial_stage_goes_on_with_its_discriminator(runs: Path, data: Path, tmp_path: Path) -> None:
    """Six steps and four more are ten, bit for bit: heads, spectral norms and warm-up come back too."""
    out = tmp_path / "adversarial"
    arguments = ("adversarial", "--from", runs / "distill", "--pairs", runs / "pairs", "--data", data)
    train(*arguments, "--set", "real_fraction=0.5", "-o", out, "--steps", 6)
    train(*arguments, "--set", "real_fraction=0.5", "-o", out, "--resume")
    name = Path("checkpoint", "unet", "diffusion_pytorch_model.safetensors")
    assert (out / name).read_bytes() == (runs / "adversarial" / name).read_bytes()


def test_online_targets_come_from_the_flow_that_is_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the one-step model towards the flow: a first loss of its own, unlike that towards itself."""
    flow = ("--flow", runs / "reflow")
    arguments = ("distill", "--from", runs / "distill", "--pairs", runs / "pairs", "--steps", 1)
    train(*arguments, "-o", tmp_path / "itself")
    train(*arguments, *flow, "-o", tmp_path / "flow")
    losses = [json.loads((tmp_path / n / "metrics.jsonl").read_text())["latent"] for n in ("itself", "flow")]
    assert losses[0] != losses[1]
    tail = ("--preset", "tiny", "--device", "cpu", "-o", str(tmp_path / "out"))
    line = [str(a) for a in ("train", *arguments, *flow)]
    assert main([*line, *tail, "--set", "target_steps=0"]) == 2
    assert "expected target_steps of 1 or more" in capsys.readouterr().err
    line[line.index("--flow") + 1] = str(runs / "distill")
    assert main([*line, *tail]) == 2
    assert "expected a rectified-flow, got one-step" in capsys.readouterr().err


def test_pairs_go_on_where_they_stopped(runs: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    arguments = ("pairs", "--data", data, "--from", runs / "teacher", "-o", out)
    train(*arguments, "--steps", 16)
    train(*arguments, "--resume")
    whole, parts = (Pairs.load(f, torch.device("cpu")) for f in (runs / "pairs", out))
    assert torch.equal(whole.latent, parts.latent) and torch.equal(whole.noise, parts.noise)


def test_bad_requests_are_one_sentence(
    runs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, here = str(tmp_path / "out"), str(data)
    cases = {
        ("train", "fly", "-o", out): (2, "stage 'fly' is not known"),
        ("train", "teacher", "-o", out): (2, "needs --data DIR, --from RUN"),
        ("train", "reflow", "--preset", "huge", "-o", out): (
            2,
            "preset 'huge' is not known; known: emoji, sd15",
        ),
        ("train", "pairs", "--data", here, "--from", str(runs / "distill"), "-o", out): (
            2,
            "got one-step",
        ),
        ("train", "autoencoder", "--preset", "tiny", "--data", f"{here}/no", "-o", out): (1, "no"),
        ("train", "autoencoder", "--data", str(data), "--device", "cpu", "-o", out): (
            2,
            "expected a CUDA device",
        ),
        ("train", "pairs", "--preset", "tiny", "--teacher", str(runs / "teacher"), "-o", out): (
            2,
            "expected one of --data DIR and --prompts FILE",
        ),
        (
            *("train", "reflow", "--preset", "tiny", "--from", str(runs / "teacher")),
            *("--pairs", str(data), "-o", out),
        ): (1, "expected pairs.json and shards pairs-*.tar"),
    }
    for arguments, (code, words) in cases.items():
        assert main(list(arguments)) == code, arguments
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in message and message.startswith("error: ")
        assert not Path(out).exists(), "a refused request left something behind"


def test_a_teacher_goes_on_from_a_teacher(runs: Path, data: Path, tmp_path: Path) -> None:
    """At rate 0 the result is what it began with: weights, text encoder and vocabulary."""
    out = tmp_path / "teacher"
    rate = ("--set", "loop.learning_rate=0.0", "--steps", 1)
    train("teacher", "--data", data, "--from", runs / "teacher", *rate, "-o", out)
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        ours, theirs = (load_file(run / "checkpoint" / name) for run in (out, runs / "teacher"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # the average sums weights of one
    for file in (runs / "teacher/checkpoint/tokenizer").iterdir():
        assert (out / "checkpoint/tokenizer" / file.name).read_bytes() == file.read_bytes()
