"""Sums of models: every weight against float64, what comes out as a checkpoint, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main as edgeflow
from edgeflow.training.merge import main
from edgeflow.training.models import dpm_solver

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT = Path("text_encoder", "model.safetensors")
VAE = Path("vae", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def three(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of one autoencoder and tokenizer whose UNets and text encoders differ in every tensor."""
    return [
        tiny_checkpoint,
        *(_moved(tiny_checkpoint, tmp_path_factory.mktemp("m"), seed) for seed in (1, 2)),
    ]


def _moved(root: Path, folder: Path, seed: int) -> Path:
    other = shutil.copytree(root, folder / "other")
    noise = torch.Generator().manual_seed(seed)
    for file in (UNET, TEXT):
        tensors = load_file(other / file)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
        save_file(tensors, other / file, metadata={"format": "pt"})
    return other


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.mark.parametrize("weights", [(0.25, 0.75, 0.0), (0.9, 0.9, -0.8)])
def test_every_tensor_is_the_sum(three: list[Path], tmp_path: Path, weights: tuple[float, ...]) -> None:
    assert run(*three, "--weights", *weights, "-o", tmp_path / "out") == 0
    for file in (UNET, TEXT):
        *ends, got = (load_file(root / file) for root in (*three, tmp_path / "out"))
        assert ends[0].keys() == got.keys()
        for name, tensor in got.items():
            expected = sum(w * end[name].double() for w, end in zip(weights, ends, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=5e-7)
    assert (tmp_path / "out" / VAE).read_bytes() == (three[0] / VAE).read_bytes()


def test_all_of_one_is_that_one_bit_for_bit(three: list[Path], tmp_path: Path) -> None:
    assert run(*three, "--weights", 0, 1, 0, "-o", tmp_path / "out") == 0
    for file in (UNET, TEXT):
        expected, got = (load_file(root / file) for root in (three[1], tmp_path / "out"))
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_it_is_a_checkpoint_that_says_where_it_comes_from(three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*three[:2], "--weights", 0.5, 0.5, "--dtype", "fp16", "-o", out) == 0
    opened = Checkpoint.open(out)
    said = opened.facts["training"]["merged"]
    assert [(end["weight"], end["hash"]) for end in said] == [
        (0.5, Checkpoint.open(root).hash) for root in three[:2]
    ]
    assert {t.dtype for t in opened.stored_tensors("unet").values()} == {"F16"}
    assert opened.generation.prompts == Checkpoint.open(three[0]).generation.prompts
    picture = str(tmp_path / "x.png")
    assert edgeflow(["generate", str(out), "red apple, twemoji style", "-o", picture]) == 0


def test_a_run_folder_is_its_checkpoint(three: list[Path], tmp_path: Path) -> None:
    shutil.copytree(three[1], tmp_path / "run" / "checkpoint")
    assert run(three[0], tmp_path / "run", "--weights", 0, 1, "-o", tmp_path / "out") == 0
    assert torch.equal(*(load_file(root / UNET)["conv_in.weight"] for root in (three[1], tmp_path / "out")))


def _other_autoencoder(root: Path) -> None:
    tensors = load_file(root / VAE)
    tensors["decoder.layers.0.weight"][0] += 1
    save_file(tensors, root / VAE, metadata={"format": "pt"})


def _other_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _other_kind(root: Path) -> None:
    facts = json.loads((root / "edgeflow.json").read_text(encoding="utf-8"))
    (root / "edgeflow.json").write_text(json.dumps({**facts, "kind": "rectified-flow"}), encoding="utf-8")


def _other_heads(root: Path) -> None:
    """Another function of weights of the very same shapes."""
    path = root / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "attention_head_dim": [1, 2]}), encoding="utf-8")


def _other_scale(root: Path) -> None:
    path = root / "vae" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "scaling_factor": 0.5}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_autoencoder, "vae: expected the same weights in both, but decoder.layers.0.weight differs"),
        (_other_tokenizer, "tokenizer: expected the same files in both, but merges.txt differs"),
        (_other_kind, "kind: expected the same in both, got 'one-step' and 'rectified-flow'"),
        (_other_heads, "unet: attention_head_dim: expected the same in both, got [2, 4] and [1, 2]"),
        (_other_scale, "latent scale: expected the same in both, got 1.0 and 0.5"),
    ],
)
def test_two_that_do_not_fit_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, words: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    change(other)  # type: ignore[operator]
    assert run(tiny_checkpoint, other, "--weights", 0.5, 0.5, "-o", tmp_path / "out") == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_teachers_are_merged_but_not_those_that_predict_v(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written would name the ε-prediction of our own teachers."""
    teacher = shutil.copytree(tiny_checkpoint, tmp_path / "teacher")
    facts = json.loads((teacher / "edgeflow.json").read_text(encoding="utf-8"))
    facts |= {"kind": "diffusion", "steps": 25, "guidance": 3.0}
    (teacher / "edgeflow.json").write_text(json.dumps(facts), encoding="utf-8")
    solver = dpm_solver()
    for prediction, code in (("epsilon", 0), ("v_prediction", 1)):
        solver.register_to_config(prediction_type=prediction)
        solver.save_pretrained(teacher / "scheduler")
        assert run(teacher, teacher, "--weights", 0.5, 0.5, "-o", tmp_path / prediction) == code
    assert "expected ε-prediction, got v_prediction" in capsys.readouterr().err
    assert not (tmp_path / "v_prediction").exists()


def test_a_sum_beyond_float16_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    tensors = load_file(other / UNET)
    tensors["conv_in.bias"][0] = 1e6
    save_file(tensors, other / UNET, metadata={"format": "pt"})
    args = (tiny_checkpoint, other, "--weights", 0.5, 0.5, "-o", tmp_path / "out")
    assert run(*args, "--dtype", "fp16") == 1
    assert "unet: conv_in.bias: expected finite fp16 weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*args) == 0  # float32 holds it


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.5, 0.4], "expected a sum of 1, got 0.9"),
        (["nan", 0.4], "expected a sum of 1, got nan"),
        ([1.0], "expected one for each of two models or more, got 1 for 2"),
    ],
)
def test_weights_that_are_no_mean_are_a_usage_error(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: list[float], words: str
) -> None:
    assert run(*three[:2], "--weights", *weights, "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: --weights: {words}\n"
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_without_force(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    args = (tiny_checkpoint, tiny_checkpoint, "--weights", 0.5, 0.5, "-o", tmp_path / "out")
    assert run(*args) == 2
    assert run(*args, "--force") == 0
