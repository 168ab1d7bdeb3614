"""One file in LDM names: it must open as the folder whose tensors it holds."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.components import load_components  # noqa: E402
from edgeflow.errors import CheckpointError, UnknownNameError, UsageError  # noqa: E402

Tensors = dict[str, "torch.Tensor"]


def unet_name(name: str) -> str:
    """diffusers' name → CompVis' (latent-diffusion, openaimodel.py: blocks numbered through)."""
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    fixed |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    for ours, theirs in fixed.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = found.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{inner(rest)}"
    side, block, kind, index, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()  # type: ignore[union-attr]
    i, j = int(block), int(index)
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{3 * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{3 * i + j + 1}.{int(kind == 'attentions')}.{inner(rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
    return f"output_blocks.{3 * i + j}.{int(kind == 'attentions')}.{inner(rest)}"


def inner(rest: str) -> str:
    names = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    names |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    head, _, tail = rest.partition(".")
    return f"{names[head]}.{tail}" if head in names else rest


def vae_name(name: str, levels: int = 4) -> str:
    if found := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
        coder, side, block, kind, index, rest = found.groups()
        level = int(block) if side == "down" else levels - 1 - int(block)
        what = f"block.{index}" if kind == "resnets" else f"{side}sample"
        name = f"{coder}.{side}.{level}.{what}.{rest}"
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for ours, theirs in attention.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def whole(folder: Path) -> Tensors:
    """The folder's tensors by the names of one file."""
    from safetensors.torch import load_file

    checkpoint = Checkpoint.open(folder)
    parts = {
        part: {k: v for path in checkpoint.weight_files(part) for k, v in load_file(path).items()}
        for part in ("unet", "vae", "text_encoder")
    }
    tensors = {f"model.diffusion_model.{unet_name(k)}": v for k, v in parts["unet"].items()}
    for name, tensor in parts["vae"].items():
        theirs = vae_name(name)
        attention = ".attn_1." in theirs and theirs.endswith("weight") and ".norm." not in theirs
        tensors[f"first_stage_model.{theirs}"] = tensor[:, :, None, None] if attention else tensor
    return tensors | {f"cond_stage_model.transformer.{k}": v for k, v in parts["text_encoder"].items()}


@pytest.fixture(scope="module")
def single(instaflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    tensors = whole(instaflow)
    assert len(tensors) == sum(
        len(Checkpoint.open(instaflow).stored_tensors(p)) for p in ("unet", "vae", "text_encoder")
    )
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "single-file"


def test_one_file_opens_as_the_folder_it_was_made_from(single: Path, instaflow: Path, cache: Path) -> None:
    checkpoint = Checkpoint.open(single, config=instaflow)
    assert (checkpoint.name, checkpoint.kind) == ("model", "one-step")
    parts = [load_components(Checkpoint.open(instaflow)), load_components(checkpoint)]
    for name in ("text_encoder", "unet", "decoder"):
        ours, theirs = (p[name].module.state_dict() for p in parts)
        assert set(ours) == set(theirs) and len(ours) > 30
        assert [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])] == []
    (folder,) = cache.iterdir()
    before = folder.stat().st_mtime_ns
    assert Checkpoint.open(single, config=instaflow).root == folder  # unpacked once
    assert folder.stat().st_mtime_ns == before
    os.utime(single)
    assert Checkpoint.open(single, config=instaflow).root != folder  # another file, another folder


def test_a_config_of_many_steps_makes_a_many_step_model(single: Path, published: Callable[..., Path]) -> None:
    assert Checkpoint.open(single, config=published(kind="diffusion")).kind == "diffusion"


def test_a_single_file_that_will_not_do_is_refused(
    single: Path, instaflow: Path, published: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match=r"its \w+ cannot be read by the config of|are missing"):
        Checkpoint.open(single, config=published("sd21"))
    save_file({"lora_unet.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="expected a whole Stable Diffusion in one file, got none of"):
        Checkpoint.open(tmp_path / "lora.safetensors", config=instaflow)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(cut, config=instaflow)
    other = Path(shutil.copytree(instaflow, tmp_path / "flux"))
    (other / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match="'FluxPipeline' is not known"):
        Checkpoint.open(single, config=other)
    with pytest.raises(UnknownNameError, match="--config"):
        Checkpoint.open(single, config="nowhere")
    with pytest.raises(UsageError, match="expected a single safetensors file to go with it"):
        Checkpoint.open(instaflow, config=instaflow)
    assert not cache.exists() or not any(cache.iterdir())


def test_without_a_config_and_offline_the_sentence_says_what_to_give(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(single)
    message = str(caught.value)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in message and "\n" not in message
    assert message.endswith("give a diffusers folder that has them with --config")
