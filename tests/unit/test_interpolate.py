"""The model between two: its ends, its middle, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main as edgeflow
from edgeflow.training.interpolate import main

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TEXT = Path("text_encoder", "model.safetensors")
VAE = Path("vae", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def ends(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one autoencoder and tokenizer whose UNets and text encoders differ in every tensor."""
    other = tmp_path_factory.mktemp("ends") / "other"
    shutil.copytree(tiny_checkpoint, other)
    noise = torch.Generator().manual_seed(1)
    for file in (UNET, TEXT):
        tensors = load_file(other / file)
        moved = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in tensors.items()
        }
        save_file(moved, other / file, metadata={"format": "pt"})
    return tiny_checkpoint, other


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_every_weight_lies_that_far_between(ends: tuple[Path, Path], tmp_path: Path, weight: float) -> None:
    a, b = ends
    assert run(a, b, "--weight", weight, "-o", tmp_path / "out") == 0
    for file in (UNET, TEXT):
        first, second, got = (load_file(root / file) for root in (a, b, tmp_path / "out"))
        assert first.keys() == got.keys()
        for name, tensor in got.items():
            expected = first[name].double() * (1 - weight) + second[name].double() * weight
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)
            if weight in (0, 1):  # the ends are the models themselves, bit for bit
                assert torch.equal(tensor, (first, second)[int(weight)][name])
    assert torch.equal(*(load_file(root / VAE)["decoder.layers.0.weight"] for root in (a, tmp_path / "out")))


def test_it_is_a_checkpoint_that_says_where_it_comes_from(ends: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = ends
    out = tmp_path / "out"
    assert run(a, b, "--weight", 0.5, "--dtype", "fp16", "-o", out) == 0
    opened = Checkpoint.open(out)
    said = opened.facts["training"]["interpolated"]
    assert said["weight"] == 0.5
    assert [end["hash"] for end in said["between"]] == [Checkpoint.open(end).hash for end in ends]
    assert {t.dtype for t in opened.stored_tensors("unet").values()} == {"F16"}
    assert opened.generation.prompts == Checkpoint.open(a).generation.prompts
    picture = str(tmp_path / "x.png")
    assert edgeflow(["generate", str(out), "red apple, twemoji style", "-o", picture]) == 0


def test_a_run_folder_is_its_checkpoint(ends: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(ends[1], tmp_path / "run" / "checkpoint")
    assert run(ends[0], tmp_path / "run", "--weight", 1, "-o", tmp_path / "out") == 0
    assert torch.equal(*(load_file(root / UNET)["conv_in.weight"] for root in (ends[1], tmp_path / "out")))


def _other_autoencoder(root: Path) -> None:
    tensors = load_file(root / VAE)
    tensors["decoder.layers.0.weight"][0] += 1
    save_file(tensors, root / VAE, metadata={"format": "pt"})


def _other_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _other_kind(root: Path) -> None:
    facts = json.loads((root / "edgeflow.json").read_text(encoding="utf-8"))
    (root / "edgeflow.json").write_text(json.dumps({**facts, "kind": "rectified-flow"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_autoencoder, "vae: expected the same weights in both, but decoder.layers.0.weight differs"),
        (_other_tokenizer, "tokenizer: expected the same files in both, but merges.txt differs"),
        (_other_kind, "kind: expected the same in both, got 'one-step' and 'rectified-flow'"),
    ],
)
def test_two_that_do_not_fit_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, words: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    change(other)  # type: ignore[operator]
    assert run(tiny_checkpoint, other, "--weight", 0.5, "-o", tmp_path / "out") == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_width_is_refused_by_its_first_tensor(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "unet" / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(other / UNET)
    hidden = tensors["time_embedding.linear_1.weight"].shape[0]
    config["time_embedding_dim"] = 2 * hidden
    (other / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, tensor in tensors.items():
        if name == "time_embedding.linear_2.weight":
            tensors[name] = tensor.repeat(2, 2)
        elif name.startswith("time_embedding"):
            tensors[name] = tensor.repeat(2, *[1] * (tensor.dim() - 1))
        elif "time_emb_proj.weight" in name:
            tensors[name] = tensor.repeat(1, 2)
    save_file(tensors, other / UNET, metadata={"format": "pt"})
    assert run(tiny_checkpoint, other, "--weight", 0.5, "-o", tmp_path / "out") == 1
    assert "unet: expected the same shapes in both, got [" in capsys.readouterr().err


@pytest.mark.parametrize("weight", [-0.1, 1.5, "nan"])
def test_a_weight_outside_is_a_usage_error(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weight: float
) -> None:
    out = tmp_path / "out"
    assert run(tiny_checkpoint, tiny_checkpoint, f"--weight={weight}", "-o", out) == 2
    assert capsys.readouterr().err.startswith("error: --weight: expected 0 to 1, got ")
    assert not out.exists()


def test_nothing_is_replaced_without_force(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    args = (tiny_checkpoint, tiny_checkpoint, "--weight", 1, "-o", tmp_path / "out")
    assert run(*args) == 2
    assert run(*args, "--force") == 0
