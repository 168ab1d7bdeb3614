"""LoRAs, grafts and decoders: what is added is worked out here from the files' own tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.cli import main  # noqa: E402
from edgeflow.components import load_components  # noqa: E402
from edgeflow.derive import Changes, derive, derived  # noqa: E402
from edgeflow.errors import CheckpointError, UsageError  # noqa: E402
from edgeflow.loading import load_modules  # noqa: E402
from edgeflow.lora import Lora  # noqa: E402
from edgeflow.training.random_checkpoint import build_random_checkpoint  # noqa: E402

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
#: Module → the same in kohya's spelling. Convolutions, feed-forward, both parts.
UNET = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.0.proj"]
UNET += ["mid_block.attentions.0.proj_in"]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"]
RANK, ALPHA = 4, 2.0


def stored(folder: Path, part: str) -> dict[str, Any]:
    """The part's tensors by their module names."""
    files = Checkpoint.open(folder).weight_files(part)
    tensors = {k: v for path in files for k, v in load_file(path).items()}
    return {k.removeprefix("text_model."): v.float() for k, v in tensors.items()}


def matrices(folder: Path, seed: int = 0) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(part, module) → B, A that fit the model."""
    draw = torch.Generator("cpu").manual_seed(seed)
    found = {}
    for part, modules in (("unet", UNET), ("text_encoder", TEXT)):
        weights = stored(folder, part)
        for module in modules:
            out, inner, *kernel = weights[f"{module}.weight"].shape
            ones = [1] * len(kernel)
            b = torch.randn(out, RANK, *ones, generator=draw) * 0.1
            found[part, module] = b, torch.randn(RANK, inner, *kernel, generator=draw) * 0.1
    return found


def kohya(pairs: dict[tuple[str, str], tuple[Any, Any]], path: Path) -> Path:
    tensors = {}
    for (part, module), (b, a) in pairs.items():
        prefix = "lora_unet_" if part == "unet" else "lora_te_text_model_"
        name = prefix + module.replace(".", "_")
        tensors |= {
            f"{name}.lora_up.weight": b.clone(),
            f"{name}.lora_down.weight": a,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    save_file(tensors, path)
    return path


def peft(pairs: dict[tuple[str, str], tuple[Any, Any]], path: Path, alpha: float | None = ALPHA) -> Path:
    tensors = {}
    for (part, module), (b, a) in pairs.items():
        name = f"{part}.{'text_model.' if part == 'text_encoder' else ''}{module}"
        tensors |= {f"{name}.lora_B.weight": b, f"{name}.lora_A.weight": a}
    record = {
        f"{p}.{k}": v for p in ("unet", "text_encoder") for k, v in (("r", RANK), ("lora_alpha", alpha))
    }
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(record)} if alpha else {})
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def old_diffusers(pairs: dict[tuple[str, str], tuple[Any, Any]], path: Path, alpha: None = None) -> Path:
    """diffusers before 0.22: attention processors and lora_linear_layer."""
    tensors = {}
    for (part, module), (b, a) in pairs.items():
        if part == "unet":
            attention, last = module.rsplit(".to_", 1)
            stem = f"unet.{attention}.processor.to_{last.removesuffix('.0')}_lora"
        else:
            stem = f"text_encoder.text_model.{module}.lora_linear_layer"
        tensors |= {f"{stem}.up.weight": b, f"{stem}.down.weight": a}
    save_file(tensors, path)
    return path


def expect_added(
    before: Path, after: Checkpoint, pairs: dict[tuple[str, str], tuple[Any, Any]], strength: float
) -> None:
    for part in ("unet", "text_encoder"):
        old, new = stored(before, part), stored(after.root, part)
        assert set(old) == set(new)
        for name, tensor in old.items():
            pair = pairs.get((part, name.removesuffix(".weight")))
            if pair is None:
                assert torch.equal(tensor, new[name]), name
            else:
                b, a = pair
                delta = torch.einsum("or,ri...->oi...", b.flatten(1), a)
                torch.testing.assert_close(new[name], tensor + strength * delta, atol=1e-6, rtol=1e-5)
                assert not torch.equal(new[name], tensor)


@pytest.mark.parametrize("form", ["kohya", "peft", "peft without alpha", "old diffusers"])
def test_a_lora_adds_scale_alpha_over_rank_times_b_a(form: str, instaflow: Path, tmp_path: Path) -> None:
    pairs = matrices(instaflow)
    if form == "old diffusers":
        pairs = {k: v for k, v in pairs.items() if ".to_" in k[1] or k[0] != "unet"}
    write = {"kohya": kohya, "peft": peft, "old diffusers": old_diffusers}.get(form)
    path = (
        write(pairs, tmp_path / "x.safetensors") if write else peft(pairs, tmp_path / "x.safetensors", None)
    )
    before = Checkpoint.open(instaflow)
    made = derive(before, Changes(loras=(Lora(path, 0.5),)), tmp_path / "out")
    assert made.unmatched == []
    expect_added(instaflow, made.checkpoint, pairs, 0.5 * (ALPHA / RANK if form in ("kohya", "peft") else 1))
    assert made.checkpoint.hash != before.hash
    assert (
        made.checkpoint.name == before.name and "LoRA x.safetensors at 0.5" in made.checkpoint.facts["origin"]
    )
    load_modules(made.checkpoint)  # every tensor is there for the libraries, too


def test_loras_add_up_and_half_precision_is_fused_in_full(instaflow: Path, tmp_path: Path) -> None:
    pairs = matrices(instaflow)
    path = kohya(pairs, tmp_path / "x.safetensors")
    half = Checkpoint.open(instaflow, variant="fp16")
    made = derive(half, Changes(loras=(Lora(path, 1.0), Lora(path, -0.25))), tmp_path / "out")
    assert {t.dtype for t in made.checkpoint.stored_tensors("unet").values()} == {"F32"}
    module = UNET[0]
    b, a = pairs["unet", module]
    (before,) = (t for t in [reader(half, f"{module}.weight")])
    torch.testing.assert_close(
        stored(made.checkpoint.root, "unet")[f"{module}.weight"], before + 0.75 * 0.5 * b @ a
    )


def reader(checkpoint: Checkpoint, name: str) -> Any:
    return {k: v for p in checkpoint.weight_files("unet") for k, v in load_file(p).items()}[name].float()


def test_what_does_not_match_is_listed_and_nothing_at_all_is_an_error(
    instaflow: Path, tmp_path: Path
) -> None:
    pairs = matrices(instaflow)
    odd = {("unet", "down_blocks.9.attentions.0.proj_in"): pairs["unet", UNET[0]]}
    b, a = pairs["unet", UNET[0]]
    wide = {("unet", UNET[0]): (torch.zeros(7, RANK), a)}
    checkpoint = Checkpoint.open(instaflow)
    path = peft({**pairs, **odd, **wide}, tmp_path / "x.safetensors")
    made = derive(checkpoint, Changes(loras=(Lora(path),)), tmp_path / "out")
    assert [line.split(": ")[1] for line in sorted(made.unmatched)] == [
        f"unet.{UNET[0]}",
        f"unet.{next(iter(odd))[1]}",
    ]
    path = peft(odd, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="none of 1 matches; the first is down_blocks"):
        derive(checkpoint, Changes(loras=(Lora(path),)), tmp_path / "none")
    save_file(
        {
            "lora_unet_x.lora_down.weight": a,
            "lora_unet_x.lora_up.weight": b.clone(),
            "lora_unet_x.dora_scale": b,
        },
        path,
    )
    with pytest.raises(CheckpointError, match="expected a LoRA, got a DoRA"):
        derive(checkpoint, Changes(loras=(Lora(path),)), tmp_path / "dora")
    save_file(
        {
            "lora_unet_x.lora_down.weight": a,
            "lora_unet_x.lora_up.weight": b.clone(),
            "lora_unet_x.hada_w1_a": b,
        },
        path,
    )
    with pytest.raises(CheckpointError, match=r"kohya's or diffusers' names: .*lora_unet_x\.hada_w1_a"):
        derive(checkpoint, Changes(loras=(Lora(path),)), tmp_path / "loha")
    for text, message in (("nowhere.safetensors", "found none"), (f"{path}:much", "the scale 'much'")):
        with pytest.raises(UsageError, match=message):
            Lora.parse(text)
    assert Lora.parse(f"{path}:0.8") == Lora(path, 0.8) and Lora.parse(str(path)) == Lora(path, 1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sd"
    build_random_checkpoint(folder, kind="diffusion", seed=1)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with every UNet tensor moved, and another text encoder and autoencoder."""
    folder = tmp_path_factory.mktemp("tuned") / "dreamy"
    build_random_checkpoint(folder, kind="diffusion", seed=2)
    draw = torch.Generator("cpu").manual_seed(5)
    moved = {k: t + 0.01 * torch.randn(t.shape, generator=draw) for k, t in stored(base, "unet").items()}
    save_file(moved, folder / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_graft_adds_the_fine_tunes_difference(
    instaflow: Path, base: Path, tuned: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(instaflow)
    made = derive(checkpoint, Changes(graft=str(tuned), base=str(base)), tmp_path / "out")
    assert made.unmatched == [] and made.checkpoint.kind == "one-step"
    one, old, new, got = (stored(f, "unet") for f in (instaflow, base, tuned, made.checkpoint.root))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, one[name] + new[name] - old[name], atol=1e-6, rtol=0)
    for part in ("text_encoder", "vae"):
        theirs, ours = stored(tuned, part), stored(made.checkpoint.root, part)
        assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert "grafted with dreamy over" in made.checkpoint.facts["origin"]
    load_modules(made.checkpoint)


def test_a_graft_that_does_not_fit_is_listed_or_refused(
    instaflow: Path, base: Path, tuned: Path, published: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(instaflow)
    other = published("sd21", "diffusion")  # the same convolutions, other attention
    with pytest.raises(CheckpointError):
        derive(checkpoint, Changes(graft=str(other), base=str(base)), tmp_path / "other")
    with pytest.raises(UsageError, match="--graft FINETUNED together with --base SD"):
        Changes(graft=str(tuned))
    made = derive(checkpoint, Changes(graft=str(tuned), base=str(other)), tmp_path / "partly")
    assert made.unmatched and all(line.startswith("graft: unet.") for line in made.unmatched)
    name = f"{BLOCK}.attn2.to_k.weight"  # of another width in the base: left as it was
    assert any(name in line for line in made.unmatched)
    assert torch.equal(stored(made.checkpoint.root, "unet")[name], stored(instaflow, "unet")[name])


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow AutoencoderTiny of TAESD's form: four levels, UNet-scale latents as they are."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("taesd") / "taesd"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderTiny(
            encoder_block_out_channels=(16,) * 4,
            decoder_block_out_channels=(16,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        ).save_pretrained(folder)
    return folder


def test_a_tiny_decoder_takes_latents_at_its_own_scale(instaflow: Path, taesd: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    checkpoint = Checkpoint.open(instaflow)
    ids, noise = np.arange(77)[None], np.random.default_rng(1).standard_normal((1, 4, 8, 8), np.float32)
    with derived(checkpoint, Changes(decoder=str(taesd))) as made:
        root = made.checkpoint.root
        assert made.checkpoint.latent_scale == 1.0 and checkpoint.latent_scale == 0.18215
        actual = load_components(made.checkpoint)["pipeline"].run({"input_ids": ids, "noise": noise})["image"]
    assert not root.exists()
    text, unet, _ = load_modules(checkpoint)
    with torch.no_grad():
        x0 = torch.from_numpy(noise)
        x1 = x0 + unet(x0, 1000.0, text(torch.from_numpy(ids)).last_hidden_state).sample
        image = AutoencoderTiny.from_pretrained(taesd).decode(x1).sample  # not divided by 0.18215
    np.testing.assert_allclose(actual, (image / 2 + 0.5).clamp(0, 1).numpy(), atol=3e-5)


def test_a_quantized_model_keeps_its_recipe_behind_another_decoder(
    instaflow: Path, taesd: Path, tmp_path: Path
) -> None:
    """The same integers in UNet and text encoder, and a float decoder; adding to integers is refused."""
    from edgeflow.quantization.apply import quantize_checkpoint
    from edgeflow.quantization.recipe import read_recipe

    quantize_checkpoint(Checkpoint.open(instaflow), read_recipe("w8"), tmp_path / "w8")
    model = Checkpoint.open(tmp_path / "w8")
    made = derive(model, Changes(decoder=str(taesd)), tmp_path / "made").checkpoint
    for part in ("text_encoder", "unet"):
        assert made.quantized_layers(part) == model.quantized_layers(part) != {}
    assert model.quantized_layers("vae") and not made.quantized_layers("vae")
    assert made.quantization is not None and model.quantization is not None
    rules = [r for r in model.quantization["recipe"]["rules"] if r["component"] != "decoder"]
    assert made.quantization["recipe"]["rules"] == rules != []
    whole, tiny = (load_components(c, names=("unet",))["unet"] for c in (model, made))
    inputs = {name: t.numpy() for name, t in whole.example.items()}
    np.testing.assert_array_equal(tiny.run(inputs)["velocity"], whole.run(inputs)["velocity"])
    assert load_components(made)["pipeline"].example  # the whole still fits together
    with pytest.raises(UsageError, match="--graft: w8: expected float weights, got quantized ones"):
        derive(model, Changes(graft=str(instaflow), base=str(instaflow)), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_decoder_of_other_latents_or_none_at_all_is_refused(
    instaflow: Path, taesd: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderTiny

    checkpoint = Checkpoint.open(instaflow)
    wide = tmp_path / "wide"
    AutoencoderTiny(latent_channels=8, decoder_block_out_channels=(8,) * 4).save_pretrained(wide)
    for decoder, message in (
        (str(wide), "latent_channels: expected the UNet's in_channels 4, got 8"),
        (str(instaflow / "unet"), "class 'UNet2DConditionModel' is not known"),
    ):
        with pytest.raises(CheckpointError, match=message):
            derive(checkpoint, Changes(decoder=decoder), tmp_path / f"out-{len(decoder)}")
    with pytest.raises(UsageError, match="--decoder: nowhere: expected the folder of an autoencoder"):
        derive(checkpoint, Changes(decoder="nowhere"), tmp_path / "nowhere")


@pytest.mark.slow  # an export and its parity at four levels of UNet: half a minute
def test_a_changed_checkpoint_is_exported_with_its_parity(
    instaflow: Path, taesd: Path, tmp_path: Path
) -> None:
    from edgeflow.bundle import Bundle

    lora = kohya(matrices(instaflow), tmp_path / "style.safetensors")
    asked = ["export", str(instaflow), "--to", "onnx", "--lora", f"{lora}:0.5", "--decoder", str(taesd)]
    assert main([*asked, "-o", str(tmp_path / "bundles")]) == 0
    model = Bundle.open(tmp_path / "bundles/onnx-pipeline-fp32").manifest.model
    assert model["latent_scale"] == 1.0 and "LoRA style.safetensors at 0.5" in model["origin"]


def test_generate_draws_the_changed_checkpoint(instaflow: Path, tmp_path: Path) -> None:
    lora = kohya(matrices(instaflow), tmp_path / "style.safetensors")
    for name, extra in (("plain", []), ("none", ["--lora", f"{lora}:0"]), ("fused", ["--lora", f"{lora}:3"])):
        asked = ["generate", str(instaflow), "a red bicycle", "-o", str(tmp_path / f"{name}.png")]
        assert main([*asked, *extra]) == 0
    from PIL import Image

    pixels = {n: np.asarray(Image.open(tmp_path / f"{n}.png"), int) for n in ("plain", "none", "fused")}
    assert np.abs(pixels["plain"] - pixels["none"]).max() <= 1
    assert np.abs(pixels["plain"] - pixels["fused"]).max() > 10
