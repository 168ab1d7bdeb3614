"""Components: what the rewrites must not change, held against diffusers' and transformers' own modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.components import (  # noqa: E402
    MASKED,
    AnchoredTimesteps,
    Component,
    load_components,
    with_picture,
)
from edgeflow.errors import CheckpointError, EdgeflowError, ExportError  # noqa: E402


@pytest.fixture(scope="module")
def components(tiny_checkpoint: Path) -> dict[str, Component]:
    return load_components(Checkpoint.open(tiny_checkpoint))


@pytest.fixture(scope="module")
def kl_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with Stable Diffusion's kind of autoencoder: KL, latents scaled by 0.18215."""
    from diffusers import AutoencoderKL

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("kl") / "kl"))
    shutil.rmtree(folder / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 64),
            latent_channels=4,
            sample_size=32,
            scaling_factor=0.18215,
        ).save_pretrained(folder / "vae")
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["vae"] = ["diffusers", "AutoencoderKL"]
    index.write_text(json.dumps(content))
    return folder


def inputs_of(component: Component, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {t.name: t.shape for t in component.spec.inputs}
    return {
        name: draw.integers(0, 500, shape)
        if name == "input_ids"
        else np.full(shape, 1000, np.float32)
        if name == "timestep"
        else draw.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def draw_with_diffusers(folder: Path, ids: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """One step by the book, from freshly loaded parts: x₁ = x₀ + v(x₀, 1000), decode(x₁ / scale)."""
    import diffusers
    from transformers import CLIPTextModel

    vae_class = json.loads((folder / "vae/config.json").read_text())["_class_name"]
    vae = getattr(diffusers, vae_class).from_pretrained(folder / "vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        hidden = text(torch.from_numpy(ids)).last_hidden_state
        x0 = torch.from_numpy(noise)
        x1 = x0 + unet(x0, 1000.0, hidden).sample
        image = vae.decode(x1 / vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1).numpy()


@pytest.mark.parametrize("name", ["text_encoder", "unet", "decoder", "pipeline"])
def test_rewrites_change_nothing(name: str, components: dict[str, Component]) -> None:
    component = components[name]
    (output,) = component.spec.outputs
    for seed in range(3):
        inputs = inputs_of(component, seed)
        ours, theirs = component.run(inputs)[output.name], component.run_original(inputs)[output.name]
        assert ours.shape == output.shape and ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert theirs.std() > 1e-3  # the outputs say something


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_the_pipeline_is_one_step_by_the_book(kind: str, tiny_checkpoint: Path, kl_checkpoint: Path) -> None:
    folder = {"tiny": tiny_checkpoint, "kl": kl_checkpoint}[kind]
    pipeline = load_components(Checkpoint.open(folder))["pipeline"]
    inputs = inputs_of(pipeline, 5)
    expected = draw_with_diffusers(folder, inputs["input_ids"], inputs["noise"])
    np.testing.assert_allclose(pipeline.run(inputs)["image"], expected, atol=2e-5)
    np.testing.assert_allclose(pipeline.run_original(inputs)["image"], expected, atol=1e-6)


def test_text_sees_only_what_came_before(components: dict[str, Component]) -> None:
    text = components["text_encoder"]
    ids = inputs_of(text, 0)["input_ids"]
    changed = ids.copy()
    changed[0, 9:] = (changed[0, 9:] + 7) % 500
    first = text.run({"input_ids": ids})["last_hidden_state"]
    second = text.run({"input_ids": changed})["last_hidden_state"]
    assert np.array_equal(first[:, :9], second[:, :9])
    assert np.abs(first[:, 9:] - second[:, 9:]).max() > 1e-2


def test_no_mask_is_out_of_float16s_range(components: dict[str, Component]) -> None:
    mask = dict(components["text_encoder"].module.named_buffers())["mask"]
    assert torch.isfinite(mask.half()).all() and mask.min() == MASKED
    assert torch.exp(torch.tensor(MASKED)) == 0


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_anchored_time_equals_diffusers_at_every_time(flip: bool, shift: int) -> None:
    from diffusers.models.embeddings import Timesteps

    original = Timesteps(64, flip, shift)
    times = torch.tensor([0.0, 1.0, 250.5, 999.0, 1000.0])
    torch.testing.assert_close(AnchoredTimesteps(original)(times), original(times), atol=2e-4, rtol=0)
    exact = AnchoredTimesteps(original)(times[-1:])
    torch.testing.assert_close(exact, original(times[-1:]), atol=0, rtol=0)


def test_anchored_time_is_exact_in_float16_where_the_plain_form_is_lost() -> None:
    from diffusers.models.embeddings import Timesteps

    original = Timesteps(64, True, 0)
    truth = original(torch.tensor([1000.0]))
    half = AnchoredTimesteps(original).half()(torch.tensor([1000.0], dtype=torch.float16))
    assert (half.float() - truth).abs().max() < 1e-3
    frequency = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(32) / 32).half()
    plain = torch.cos((1000 * frequency).half().float())
    assert (plain - truth[0, :32]).abs().max() > 0.05


def test_the_pipeline_carries_no_time(components: dict[str, Component]) -> None:
    whole = {name for name, _ in components["unet"].module.named_parameters()}
    folded = {name for name, _ in components["pipeline"].module.unet.named_parameters()}
    timed = {name for name in whole if "time_emb" in name}
    assert timed and not any("time_emb" in name for name in folded)
    assert {name.removeprefix("unet.") for name in whole - timed} == folded


def test_components_share_their_weights(components: dict[str, Component]) -> None:
    """A model is held in memory once, however many components are made of it."""
    whole = {p.data_ptr() for p in components["unet"].module.parameters()}
    folded = components["pipeline"].module.unet
    own = [n for n, p in folded.named_parameters() if p.data_ptr() not in whole]
    assert own and all(name.endswith("conv1.bias") for name in own)


def test_a_byte_picture_rounds(components: dict[str, Component]) -> None:
    plain, byte = components["pipeline"], with_picture(components["pipeline"], "uint8")
    inputs = inputs_of(plain, 2)
    expected = np.rint(plain.run(inputs)["image"] * 255).astype(np.uint8)
    assert np.array_equal(byte.run(inputs)["image"], expected)
    assert byte.run_original(inputs)["image"].dtype == np.uint8
    assert byte.spec.outputs[0].dtype == "uint8" and plain.spec.outputs[0].dtype == "float32"
    with pytest.raises(ValueError, match="uint8"):
        with_picture(plain, "uint16")


def test_inputs_are_called_by_name(components: dict[str, Component]) -> None:
    with pytest.raises(ValueError, match="noise"):
        components["pipeline"].run({"input_ids": np.zeros((1, 16))})


def test_half_weights_are_loaded_as_single(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "half"))
    for path in folder.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    for component in load_components(Checkpoint.open(folder)).values():
        assert {p.dtype for p in component.module.parameters()} == {torch.float32}


# --- what cannot be exported ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusion", "rectified-flow"])
def test_a_many_step_model_is_refused(kind: str, own_checkpoint: Path) -> None:
    facts = json.loads((own_checkpoint / "edgeflow.json").read_text())
    (own_checkpoint / "edgeflow.json").write_text(json.dumps({**facts, "kind": kind, "steps": 25}))
    with pytest.raises(ExportError, match=f"one-step model, got kind '{kind}'.*known kinds: one-step"):
        load_components(Checkpoint.open(own_checkpoint))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_tensor_that_is_missing_is_named(part: str, own_checkpoint: Path) -> None:
    """transformers and diffusers would draw random weights in its place and only warn."""
    from safetensors.torch import load_file, save_file

    (path,) = (own_checkpoint / part).glob("*.safetensors")
    tensors = load_file(path)
    lost = sorted(name for name in tensors if name.endswith("weight") and "encoder.layers.1" not in name)[-1]
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EdgeflowError, match=lost.rpartition(".")[0].rpartition(".")[2]):
        load_components(Checkpoint.open(own_checkpoint))


def test_weights_of_another_shape_are_refused(own_checkpoint: Path) -> None:
    path = own_checkpoint / "unet/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "block_out_channels": [32, 96]}))
    with pytest.raises(CheckpointError, match="unet"):
        load_components(Checkpoint.open(own_checkpoint))


@pytest.mark.parametrize(
    ("setting", "value"), [("resnet_time_scale_shift", "scale_shift"), ("time_embedding_type", "fourier")]
)
def test_a_unet_that_takes_time_otherwise_is_refused(setting: str, value: str, own_checkpoint: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((own_checkpoint / "unet/config.json").read_text())
    shutil.rmtree(own_checkpoint / "unet")
    UNet2DConditionModel.from_config({**config, setting: value}).save_pretrained(own_checkpoint / "unet")
    with pytest.raises(ExportError, match=f"unet: expected .* time embedding.*, got '{value}'"):
        load_components(Checkpoint.open(own_checkpoint))
