"""Checkpoints, held against safetensors, diffusers and the hub's own file filter."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from edgeflow import checkpoint as checkpoints
from edgeflow.checkpoint import Checkpoint, resolve
from edgeflow.errors import CheckpointError, UnknownNameError, UsageError
from edgeflow.weights import read_safetensors_header

UNET = "unet/diffusion_pytorch_model.safetensors"


def edit(path: Path, **values: object) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# --- what a good checkpoint says --------------------------------------------------------------------------


def test_headers_say_what_safetensors_itself_reads(tiny_checkpoint: Path) -> None:
    from safetensors import safe_open

    checkpoint = Checkpoint.open(tiny_checkpoint)
    for part in ("text_encoder", "unet", "vae"):
        stored = checkpoint.stored_tensors(part)
        (path,) = checkpoint.weight_files(part)
        with safe_open(path, "pt") as file:
            keys = file.keys()
            assert set(stored) == set(keys)
            for key in keys:
                tensor = file.get_slice(key)
                assert (list(stored[key].shape), stored[key].dtype) == (
                    tensor.get_shape(),
                    tensor.get_dtype(),
                )
            assert checkpoint.num_parameters(part) == sum(file.get_tensor(key).numel() for key in keys)


def test_generation_agrees_with_what_the_models_compute(tiny_checkpoint: Path) -> None:
    import torch
    from diffusers import AutoencoderTiny
    from transformers import CLIPTokenizer

    spec = Checkpoint.open(tiny_checkpoint).generation
    vae = AutoencoderTiny.from_pretrained(tiny_checkpoint / "vae")
    with torch.no_grad():
        image = vae.decode(torch.zeros(1, *spec.latent_shape)).sample
    assert image.shape == (1, 3, spec.picture_size, spec.picture_size)
    assert spec.latent_scale == vae.config.scaling_factor
    assert spec.max_tokens == CLIPTokenizer.from_pretrained(spec.tokenizer_dir).model_max_length
    assert (spec.steps, spec.timestep) == (1, 1000.0)


@pytest.mark.parametrize("scale", [0.18215, 0.9])
def test_an_autoencoder_kl_gives_its_own_size_and_scale(own_checkpoint: Path, scale: float) -> None:
    import torch
    from diffusers import AutoencoderKL

    shutil.rmtree(own_checkpoint / "vae")
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=scale,
    )
    vae.save_pretrained(own_checkpoint / "vae")
    edit(own_checkpoint / "edgeflow.json", picture_size=16)
    if scale == 0.18215:  # Stable Diffusion 1.x leaves it out, and diffusers fills it in
        edit(own_checkpoint / "vae" / "config.json", scaling_factor=None)
    spec = Checkpoint.open(own_checkpoint).generation
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, *spec.latent_shape)).sample.shape[-1] == spec.picture_size == 16
    assert (
        spec.latent_scale
        == scale
        == AutoencoderKL.from_pretrained(own_checkpoint / "vae").config.scaling_factor
    )


def test_a_published_folder_is_read_from_its_pipeline_class(own_checkpoint: Path) -> None:
    (own_checkpoint / "edgeflow.json").unlink()
    edit(own_checkpoint / "model_index.json", _class_name="RectifiedFlowPipeline")
    (own_checkpoint / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\n# InstaFlow\n")
    published = Checkpoint.open(own_checkpoint)
    assert (published.kind, published.facts["steps"], published.facts["guidance"]) == ("one-step", 1, 0.0)
    assert published.facts["licence"] == "cc-by-nc-4.0"
    edit(own_checkpoint / "model_index.json", _name_or_path="XCLIU/2_rectified_flow_from_sd_1_5")
    assert Checkpoint.open(own_checkpoint).kind == "rectified-flow"  # the same class, and not one step
    edit(own_checkpoint / "model_index.json", _class_name="StableDiffusionPipeline")
    assert Checkpoint.open(own_checkpoint).kind == "diffusion"
    edit(own_checkpoint / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(
        CheckpointError, match="pipeline 'FluxPipeline' is not known; known: InstaFlowPipeline"
    ):
        Checkpoint.open(own_checkpoint)


def test_an_autoencoder_alone_opens_and_draws_nothing(own_checkpoint: Path) -> None:
    for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(own_checkpoint / part)
    edit(own_checkpoint / "edgeflow.json", kind="autoencoder")
    checkpoint = Checkpoint.open(own_checkpoint)
    assert checkpoint.parts == ("vae",) and len(checkpoint.hash) == 64
    with pytest.raises(CheckpointError, match="got an autoencoder alone"):
        _ = checkpoint.generation


def test_shards_count_together_and_must_all_be_there(own_checkpoint: Path) -> None:
    from diffusers import UNet2DConditionModel

    whole = Checkpoint.open(own_checkpoint).num_parameters("unet")
    unet = UNet2DConditionModel.from_pretrained(own_checkpoint / "unet")
    shutil.rmtree(own_checkpoint / "unet")
    unet.save_pretrained(own_checkpoint / "unet", max_shard_size="1MB")
    checkpoint = Checkpoint.open(own_checkpoint)
    shards = checkpoint.weight_files("unet")
    assert len(shards) > 2 and checkpoint.num_parameters("unet") == whole
    before = checkpoint.hash
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"\x7f")
    assert Checkpoint.open(own_checkpoint).hash != before
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"expected the file {shards[1].name}, found none"):
        Checkpoint.open(own_checkpoint)


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", 3, "x.bin"])
def test_a_shard_outside_its_folder_is_refused(own_checkpoint: Path, name: object) -> None:
    (own_checkpoint / UNET).unlink()
    index = own_checkpoint / f"{UNET}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(CheckpointError, match="expected names of safetensors files"):
        Checkpoint.open(own_checkpoint)


def test_a_tensor_must_be_in_the_shard_that_the_index_says(own_checkpoint: Path) -> None:
    path = own_checkpoint / UNET
    shard = path.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    path.rename(shard)
    index = own_checkpoint / f"{UNET}.index.json"
    names = dict.fromkeys(read_safetensors_header(shard), shard.name)
    index.write_text(json.dumps({"weight_map": names}))
    assert Checkpoint.open(own_checkpoint).num_parameters("unet") > 0
    index.write_text(json.dumps({"weight_map": {**names, "lost.weight": shard.name}}))
    with pytest.raises(
        CheckpointError, match=r"tensor 'lost.weight' is not in diffusion_pytorch_model-00001"
    ):
        Checkpoint.open(own_checkpoint)


# --- the hash -----------------------------------------------------------------------------------------------


def test_the_hash_is_the_same_wherever_the_folder_lies_and_through_links(
    tiny_checkpoint: Path, own_checkpoint: Path, tmp_path: Path
) -> None:
    expected = Checkpoint.open(tiny_checkpoint).hash
    assert Checkpoint.open(own_checkpoint).hash == expected
    snapshot = tmp_path / "snapshot"  # the hub's cache: folders of links to blobs
    for path in sorted(p for p in own_checkpoint.rglob("*") if p.is_file()):
        link = snapshot / path.relative_to(own_checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert Checkpoint.open(snapshot).hash == expected
    (tmp_path / "linked").symlink_to(snapshot, target_is_directory=True)
    linked = Checkpoint.open(tmp_path / "linked")
    assert (linked.hash, linked.name) == (expected, "linked")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda root: flip_last_byte(root / UNET), True),
        (lambda root: (root / "tokenizer/merges.txt").open("a").write("q q\n"), True),
        (lambda root: edit(root / "vae/config.json", scaling_factor=2.0), True),
        (lambda root: edit(root / "edgeflow.json", guidance=0.5), True),
        (lambda root: edit(root / "edgeflow.json", kind="rectified-flow", steps=2), True),
        (lambda root: edit(root / "edgeflow.json", licence="MIT", origin="elsewhere"), False),
        (lambda root: (root / "README.md").write_text("card"), False),
        (lambda root: (root / "unet/diffusion_pytorch_model.bin").write_bytes(b"unread"), False),
        (lambda root: edit(root / "scheduler/scheduler_config.json", beta_end=0.5), False),
    ],
)
def test_the_hash_changes_with_the_picture_and_with_nothing_else(
    own_checkpoint: Path, change: object, counts: bool
) -> None:
    before = Checkpoint.open(own_checkpoint).hash
    change(own_checkpoint)  # type: ignore[operator]
    assert (Checkpoint.open(own_checkpoint).hash != before) is counts


def test_the_scheduler_counts_for_a_many_step_model(own_checkpoint: Path) -> None:
    edit(own_checkpoint / "edgeflow.json", kind="diffusion", steps=25)
    before = Checkpoint.open(own_checkpoint).hash
    edit(own_checkpoint / "scheduler/scheduler_config.json", beta_end=0.5)
    assert Checkpoint.open(own_checkpoint).hash != before


# --- bad checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "tokenizer"])
def test_a_missing_part_is_named(own_checkpoint: Path, part: str) -> None:
    shutil.rmtree(own_checkpoint / part)
    with pytest.raises(CheckpointError, match=f"part '{part}' is missing; expected: text_encoder, unet"):
        Checkpoint.open(own_checkpoint)


def pickle_unet(root: Path) -> None:
    (root / UNET).rename(root / "unet/diffusion_pytorch_model.bin")


def brain_precision_only(root: Path) -> None:
    (root / UNET).rename(root / "unet/diffusion_pytorch_model.bf16.safetensors")


def empty_weights(root: Path) -> None:
    header = b'{"__metadata__":{}}'
    (root / UNET).write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickle_unet, "got the pickle diffusion_pytorch_model.bin, which is refused"),
        (brain_precision_only, "expected weights in .*, got diffusion_pytorch_model.bf16.safetensors"),
        (lambda root: (root / UNET).unlink(), "expected weights in .*, got none"),
        (empty_weights, "got a file without a tensor"),
        (lambda root: (root / "unet/config.json").unlink(), "expected the file config.json, found none"),
        (lambda root: (root / "unet/config.json").write_text("{"), "expected JSON"),
        (lambda root: (root / "unet/config.json").write_text("[]"), "expected a JSON object, got a list"),
        (lambda root: (root / "unet/config.json").write_bytes(b"\xff"), "expected JSON"),
        (lambda root: edit(root / "unet/config.json", _class_name="FluxTransformer2DModel"), "is not known"),
        (lambda root: (root / "model_index.json").unlink(), "expected the file model_index.json"),
        (
            lambda root: (root / "tokenizer/tokenizer_config.json").unlink(),
            "expected the file tokenizer_config",
        ),
        (lambda root: edit(root / "edgeflow.json", schema=2), "expected schema 1, got 2"),
        (lambda root: edit(root / "edgeflow.json", kind="gan"), "kind 'gan' is not known; known: one-step"),
        (lambda root: edit(root / "edgeflow.json", steps=4), "steps: expected 1, got 4"),
        (
            lambda root: edit(root / "edgeflow.json", steps="1", prompts=[], licence=""),
            "steps: expected 1, got '1'; licence: expected a text, got ''; prompts: expected a list of texts",
        ),
    ],
)
def test_opening_refuses_in_one_sentence(own_checkpoint: Path, change: object, message: str) -> None:
    change(own_checkpoint)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(own_checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vae", {"latent_channels": 8}, "latent_channels: expected the UNet's in_channels 4, got 8"),
        ("unet", {"out_channels": 8}, "out_channels: expected the UNet's in_channels 4, got 8"),
        ("unet", {"cross_attention_dim": 768}, "expected the text encoder's hidden_size 32, got 768"),
        ("unet", {"sample_size": None}, "sample_size: expected a positive integer, got None"),
        ("unet", {"sample_size": [8, 8]}, r"sample_size: expected a positive integer, got \[8, 8\]"),
        ("unet", {"sample_size": 16}, r"picture_size: expected 64 \(latent side 16 × 4\), got 32"),
        ("text_encoder", {"max_position_embeddings": 77}, "max_position_embeddings 77, got 16"),
        ("vae", {"decoder_block_out_channels": None}, "does not list its levels"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    own_checkpoint: Path, part: str, values: dict[str, object], message: str
) -> None:
    edit(own_checkpoint / part / "config.json", **values)
    checkpoint = Checkpoint.open(own_checkpoint)
    with pytest.raises(CheckpointError, match=message):
        _ = checkpoint.generation


# --- safetensors headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 100, -1000, -1])
def test_a_file_cut_anywhere_is_truncated(own_checkpoint: Path, keep: int) -> None:
    path = own_checkpoint / UNET
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"weights: .*truncated"):
        Checkpoint.open(own_checkpoint)


def header_file(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "expected a safetensors header"),
        ({"a": 3}, "expected a safetensors header"),
        ({"a": {**GOOD, "dtype": "Q7"}}, "the dtype 'Q7'"),
        ({"a": {**GOOD, "shape": [-2]}}, "the shape"),
        ({"a": {**GOOD, "shape": [3]}}, "expected 12 bytes from byte 0, got bytes 0 to 8"),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [4, 8]}}, "expected 4 bytes from byte 0"),
        ({"a": GOOD, "b": GOOD}, "expected 8 bytes from byte 8, got bytes 0 to 8"),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}}, "longer than its header says"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(
    tmp_path: Path, header: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(header_file(tmp_path / "x.safetensors", header))
    assert read_safetensors_header(header_file(tmp_path / "y.safetensors", {"a": GOOD}))["a"].shape == (2,)


def test_a_folder_in_place_of_weights_is_one_sentence(own_checkpoint: Path) -> None:
    (own_checkpoint / UNET).unlink()
    (own_checkpoint / UNET).mkdir()
    with pytest.raises(CheckpointError, match="expected weights in"):
        Checkpoint.open(own_checkpoint)


# --- names --------------------------------------------------------------------------------------------------


def test_a_builtin_name_comes_before_a_folder_of_that_name(
    own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    shutil.copytree(own_checkpoint, models / "emoji")
    monkeypatch.setattr(checkpoints, "MODELS", models)
    monkeypatch.chdir(own_checkpoint.parent)
    shutil.copytree(own_checkpoint, tmp_path / "emoji")
    assert resolve("emoji") == (models / "emoji", "emoji")
    assert resolve("./emoji") == (Path("emoji"), "emoji")
    with pytest.raises(UnknownNameError, match=r"model .emojy. is not known; known: .*emoji"):
        resolve("emojy")


def test_a_wrong_path_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "from_hub", lambda model, *_: pytest.fail(f"asked the hub for {model}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for wrong in ("runs/missing", "./missing", "../missing", "/missing", "a/b/c", "~/missing", "missing"):
        with pytest.raises(UnknownNameError):
            resolve(wrong)


@pytest.mark.parametrize(
    ("name", "what"), [("model.ckpt", "a pickle, which is refused"), ("m.onnx", "a single file")]
)
def test_a_single_file_is_no_checkpoint(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"expected a diffusers folder, got {what}"):
        resolve(str(tmp_path / name))


def test_a_hub_id_fetches_the_parts_and_no_more(
    own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    unwanted = ["v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/model.bin"]
    unwanted += ["safety_checker/model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    files = [p.relative_to(own_checkpoint).as_posix() for p in own_checkpoint.rglob("*") if p.is_file()]

    def snapshot_download(repo_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        wanted = set(
            filter_repo_objects(
                [*files, *unwanted], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        assert not wanted & set(unwanted)
        for name in wanted:
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(own_checkpoint / name, tmp_path / "hub" / name)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = Checkpoint.open("someone/flow")
    assert checkpoint.name == "someone/flow"
    assert checkpoint.hash == Checkpoint.open(own_checkpoint).hash


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open("someone/flow")
    assert str(caught.value).endswith("the hub could not give it: no connection")


def test_a_hub_id_without_the_hub_client_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"no folder of that name.*pip install 'edgeflow\[export\]'"):
        Checkpoint.open("someone/flow")
