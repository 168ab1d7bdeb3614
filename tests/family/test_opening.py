"""Published folders: shapes, precisions, shards; held against the libraries' own loaders."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.components import load_components  # noqa: E402
from edgeflow.errors import CheckpointError, ExportError, UnknownNameError  # noqa: E402
from edgeflow.generate import Generator  # noqa: E402
from edgeflow.training import random_checkpoint as random  # noqa: E402


def originals(folder: Path, ids: np.ndarray, noise: np.ndarray, variant: str | None = None) -> np.ndarray:
    """One step with diffusers' and transformers' modules as they load by themselves: picture in [0, 1]."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(folder / "text_encoder", variant=variant, dtype=torch.float32).eval()
    options = {"variant": variant, "torch_dtype": torch.float32}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **options)
    vae = AutoencoderKL.from_pretrained(folder / "vae", **options)
    with torch.no_grad():
        x0 = torch.from_numpy(noise)
        x1 = x0 + unet(x0, 1000.0, text(torch.from_numpy(ids)).last_hidden_state).sample
        return (vae.decode(x1 / 0.18215).sample / 2 + 0.5).clamp(0, 1).numpy()


@pytest.mark.parametrize("family", random.FAMILIES)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_published_folder_draws_what_diffusers_draws(
    family: str, variant: str | None, published: Callable[..., Path]
) -> None:
    folder = published(family)
    checkpoint = Checkpoint.open(folder, variant=variant)
    assert checkpoint.kind == "one-step" and checkpoint.generation.picture_size == 64
    assert len(checkpoint.weight_files("unet")) > 1
    assert all((".fp16" in p.name) == (variant == "fp16") for p in checkpoint.weight_files("unet"))
    ids = np.random.default_rng(0).integers(0, 1000, (1, 77))
    noise = np.random.default_rng(1).standard_normal((1, 4, 8, 8), np.float32)
    pipeline = load_components(checkpoint)["pipeline"]
    drawn = pipeline.run({"input_ids": ids, "noise": noise})["image"]
    np.testing.assert_allclose(drawn, originals(folder, ids, noise, variant), atol=3e-5)
    assert 0.1 < drawn.std() < 0.5


def test_half_precision_alone_is_read_and_both_need_asking(instaflow: Path, tmp_path: Path) -> None:
    both = Checkpoint.open(instaflow)
    assert [both.variant_of(part) for part in ("unet", "vae", "text_encoder")] == [None] * 3
    half = Path(shutil.copytree(instaflow, tmp_path / "half"))
    for path in half.rglob("*.safetensors*"):
        if ".fp16" not in path.name:
            path.unlink()
    alone = Checkpoint.open(half)
    assert [alone.variant_of(part) for part in ("unet", "vae", "text_encoder")] == ["fp16"] * 3
    assert alone.hash == Checkpoint.open(instaflow, variant="fp16").hash != both.hash
    assert {t.dtype for t in alone.stored_tensors("unet").values()} == {"F16"}
    with pytest.raises(UnknownNameError, match="variant 'int8' is not known; known: fp16"):
        Checkpoint.open(instaflow, variant="int8")


def test_a_half_precision_shard_that_is_gone_is_named(instaflow: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(instaflow, tmp_path / "gone"))
    lost = Checkpoint.open(folder, variant="fp16").weight_files("unet")[-1]
    lost.unlink()
    assert Checkpoint.open(folder).variant_of("unet") is None
    with pytest.raises(CheckpointError, match=f"expected the file {lost.name}, found none"):
        Checkpoint.open(folder, variant="fp16")


@pytest.mark.parametrize("name", ["RectifiedFlowPipeline", "InstaFlowPipeline", "StableDiffusionPipeline"])
def test_the_pipelines_class_says_what_the_folder_is(name: str, instaflow: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(instaflow, tmp_path / "named"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.kind == ("diffusion" if name == "StableDiffusionPipeline" else "one-step")
    if checkpoint.kind == "diffusion":
        with pytest.raises(ExportError, match="expected a one-step model, got kind 'diffusion'"):
            load_components(checkpoint)
        with pytest.raises(CheckpointError, match="of 25 steps"):
            Generator.open(folder)


def test_the_published_autoencoders_old_names_and_the_text_encoders_old_buffer_are_read(
    instaflow: Path, tmp_path: Path
) -> None:
    """Stable Diffusion 1.5's vae has query, key, value, proj_attn; its text encoder stores position_ids."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(instaflow, tmp_path / "old"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    save_file(renamed, path)
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    assert "text_model.embeddings.token_embedding.weight" in tensors  # the names of the hub's file
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    ids, noise = np.arange(77)[None], np.random.default_rng(1).standard_normal((1, 4, 8, 8), np.float32)
    inputs = {"input_ids": ids, "noise": noise}
    old_image, new_image = (
        load_components(Checkpoint.open(f))["pipeline"].run(inputs)["image"] for f in (folder, instaflow)
    )
    np.testing.assert_array_equal(old_image, new_image)


# --- the builder ------------------------------------------------------------------------------------------


def test_the_full_shapes_are_the_published_ones() -> None:
    """Parameter counts of the model cards: UNet 859.5 M (865.9 M for 2.x), CLIP ViT-L/14's text 123.1 M."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    counts = {"sd15": (859_520_964, 83_653_863, 123_060_480), "sd21": (865_910_724, 83_653_863, 340_387_840)}
    for family, expected in counts.items():
        configs = random.configs(family, "full")
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(configs["unet"])
            vae = diffusers.AutoencoderKL.from_config(configs["vae"])
            text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        found = tuple(sum(p.numel() for p in model.parameters()) for model in (unet, vae, text))
        assert found == expected


@pytest.mark.parametrize(("size", "pad"), [(1190, "<|endoftext|>"), (49408, "!")])
def test_the_vocabulary_has_clips_size_and_form(size: int, pad: str, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from edgeflow.tokenizer import ClipTokenizer
    from edgeflow.training.random_vocabulary import write_tokenizer

    write_tokenizer(tmp_path / "tokenizer", size, pad=pad)
    ours, theirs = (
        ClipTokenizer.from_folder(tmp_path / "tokenizer"),
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    assert ours.vocab_size == len(theirs) == size
    assert (ours.start_id, ours.end_id) == (size - 2, size - 1)
    for prompt in ("a red bicycle, 2 wheels", "naïve café ☕", ""):
        expected = theirs(prompt, padding="max_length", truncation=True, max_length=77).input_ids
        assert ours.encode(prompt)[0].tolist() == expected
    assert len(set(ours.encode("abcd abc ab a")[0].tolist())) > 5


def test_activations_keep_a_trained_models_range(tmp_path: Path) -> None:
    lines = random.build_random_checkpoint(tmp_path / "c", check=True)
    found = {line.split()[0]: (float(line.split()[2]), float(line.split()[4])) for line in lines}
    assert len(found) > 50
    assert max(largest for _, largest in found.values()) < 100 < 65504
    assert found["unet.conv_out"][0] == pytest.approx(2**0.5, rel=0.15)
    assert found["vae.decoder.conv_out"][0] == pytest.approx(0.5, rel=0.15)
    assert all(std > 0.1 for std, _ in found.values())


def test_the_same_arguments_give_the_same_bytes(instaflow: Path, tmp_path: Path) -> None:
    assert random.main(["-o", str(tmp_path / "again"), "--files", "both", "--max-shard-size", "4MB"]) == 0
    names = sorted(p.relative_to(instaflow) for p in instaflow.rglob("*") if p.is_file())
    again = tmp_path / "again"
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    changed = [n for n in names if (instaflow / n).read_bytes() != (again / n).read_bytes()]
    assert changed == [Path("model_index.json")]  # rewritten by the fixture
    assert random.main(["-o", str(again)]) == 2


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_hub_repository_of_half_precision_alone_is_fetched_whole(
    variant: str | None, instaflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = [p.relative_to(instaflow).as_posix() for p in instaflow.rglob("*") if p.is_file()]
    bare = [name for name in files if (name.endswith(".json") and "index" not in name) or ".fp16" in name]
    bare += ["model_index.json", *(name for name in files if name.startswith("tokenizer/"))]
    fetched: set[str] = set()

    def snapshot_download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for name in filter_repo_objects(bare, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            fetched.add(name)
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(instaflow / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = Checkpoint.open("someone/half", variant=variant)
    assert checkpoint.hash == Checkpoint.open(instaflow, variant="fp16").hash
    assert {".fp16" in name for name in fetched if name.endswith(".safetensors")} == {True}


def test_offline_and_absent_is_one_plain_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open("someone/absent-model")
    message = str(caught.value)
    assert "\n" not in message and "HF_HUB_OFFLINE is set" in message
    assert message.endswith("fetch it once with: hf download someone/absent-model")


def test_a_truncated_half_precision_file_is_named(instaflow: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(instaflow, tmp_path / "cut"))
    path = folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    path.write_bytes(path.read_bytes()[: 8 + length + 100])
    with pytest.raises(CheckpointError, match=r"fp16\.safetensors: the safetensors file is truncated"):
        Checkpoint.open(folder, variant="fp16")
