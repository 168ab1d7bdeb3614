"""Quantization-aware distillation: the fake quantization, and that its integers are the ones that ship."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.components import load_components
from edgeflow.errors import ConfigError, DataError, UsageError
from edgeflow.loading import load_part
from edgeflow.quantization.fake import (
    GAIN,
    FakeQuantized,
    fake_quantize,
    fake_quantize_layer,
    fitted,
    float_state,
    round_with,
)
from edgeflow.quantization.layers import dequantize
from edgeflow.quantization.recipe import Recipe, parse_recipe, read_recipe
from edgeflow.quantization.schemes import SCHEMES, quantize
from edgeflow.training.gradient_noise import agreement
from edgeflow.training.loop import start_run, train
from edgeflow.training.pair_shards import Shard, shard_path, write_shard
from edgeflow.training.presets import PRESETS
from edgeflow.training.qat import QatObjective
from edgeflow.training.qat_inputs import captions_of_pairs
from edgeflow.training.run import Request, run_stage

SHAPES = [(8, 64), (6, 64, 3, 3), (4, 32, 1, 1)]
CAPTIONS = ["red apple, twemoji style", "sailboat, fluent flat style"]


def a_weight(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(**loop: Any) -> Any:
    preset = PRESETS["tiny"]["qat"]
    return dataclasses.replace(preset, loop=dataclasses.replace(preset.loop, **loop))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_seen_as_it_will_be_stored(name: str, shape: tuple[int, ...]) -> None:
    """Bit for bit: round to nearest with the weight's own scale, and torchao's own fake quantization."""
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    how, weight = SCHEMES[name], a_weight(shape)
    q, scale, zero = quantize(weight, how)
    expected = dequantize(q, scale, zero, how.bits)
    with torch.autocast("cpu", torch.bfloat16):
        seen = fake_quantize(weight, name, None, None, None)
    assert seen.dtype == torch.float32 and torch.equal(seen, expected)
    block = how.block(shape)
    point = torch.zeros_like(scale) if zero is None else zero.float()
    theirs = _fake_quantize_affine(weight, block, scale, point, torch.int8, how.quant_min, how.quant_max)
    assert torch.equal(seen, theirs)
    if len(shape) == 4:
        last = fake_quantize(weight.to(memory_format=torch.channels_last), name, None, None, None)
        assert torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_learned_scale_has_the_gradient_of_lsq(name: str) -> None:
    """Against autograd through round(w/s) clipped, times s, with a straight-through rounding."""
    how, shape = SCHEMES[name], (4, 64, 3, 3)
    weight = a_weight(shape).requires_grad_()
    start, zero = fitted(weight.detach(), how)
    shift = (0.02 * torch.randn(start.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    towards = a_weight(shape, seed=3)
    (fake_quantize(weight, name, start, shift, zero) * towards).sum().backward()
    w, p = (t.detach().clone().requires_grad_() for t in (weight, shift))
    exact = start * torch.exp(GAIN * p)
    scale = exact + (exact.half().float() - exact).detach()
    wide = scale.repeat_interleave(shape[1] // scale.shape[1], 1)
    offset = 0 if zero is None else zero.float().repeat_interleave(shape[1] // zero.shape[1], 1)
    steps = w / wide
    level = steps + (torch.round(steps) - steps).detach() + offset
    reference = (level.clamp(how.quant_min, how.quant_max) - offset) * wide
    (reference * towards).sum().backward()
    torch.testing.assert_close(weight.grad, w.grad)
    torch.testing.assert_close(shift.grad, p.grad, rtol=1e-3, atol=1e-5)
    assert shift.grad is not None and shift.grad.abs().min() > 0


@pytest.mark.parametrize("name", SCHEMES)
def test_fitted_scales_are_never_worse_than_covering_ones(name: str) -> None:
    how, weight = SCHEMES[name], a_weight((16, 64))
    q, scale, zero = quantize(weight, how)
    covering = (dequantize(q, scale, zero, how.bits) - weight).square().sum()
    scale, zero = fitted(weight, how)
    error = (dequantize(round_with(weight, scale, zero, how), scale, zero, how.bits) - weight).square().sum()
    assert error <= covering and (how.bits == 8 or error < 0.98 * covering)
    assert torch.equal(scale, scale.half().float())


@pytest.mark.parametrize("learned", [True, False])
def test_the_op_keeps_what_compilers_expect_of_one(learned: bool) -> None:
    """Schema, gradient, shapes without data, and the same results through AOT autograd."""
    layer: Any = nn.Conv2d(32, 4, 3)
    fake_quantize_layer(layer, "w4g32", learned=learned)
    arguments = (layer.weight, "w4g32", layer.scale_start, layer.scale_shift, layer.scale_zero)
    torch.library.opcheck(fake_quantize, arguments)


def test_layers_compile_whole_and_keep_their_names() -> None:
    net = nn.Sequential(nn.Conv2d(32, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 4))
    names = set(net.state_dict())
    fake_quantize_layer(net[0], "w4g32", learned=True)
    fake_quantize_layer(net[2], "w8", learned=False)
    assert set(float_state(net)) == names
    x = torch.randn(2, 32, 4, 4)
    whole = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x), net(x))
    whole(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("scales", ["learned", "weights"])
def test_the_integers_it_learns_are_the_integers_that_ship(
    scales: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Every dequantized weight of the written checkpoint is bit for bit what the averaged module ran with."""
    source, recipe = Checkpoint.open(tiny_checkpoint), read_recipe("w4g32")
    cfg = dataclasses.replace(config(steps=3, batch_size=2), scales=scales, perceptual_weight=0.0)
    objective = QatObjective(cfg, source, recipe, CAPTIONS, torch.device("cpu"))
    before = {name: p.clone() for name, p in objective.trained.named_parameters()}
    start_run(tmp_path / "run", {}, resume=False)
    train(objective, cfg.loop, tmp_path / "run", torch.device("cpu"), False)
    assert all(not torch.equal(p, before[n]) for n, p in objective.trained.named_parameters() if "time" in n)
    written = Checkpoint.open(tmp_path / "run" / "checkpoint")
    checked = 0
    for component, part in (("text_encoder", "text_encoder"), ("unet", "unet"), ("decoder", "vae")):
        prefix = "decoder." if part == "vae" else ""
        module, averaged = load_part(written, part), objective.averaged[component]
        for inner in objective.layers[component].values():
            layer = averaged.get_submodule(inner)
            assert isinstance(layer, FakeQuantized)
            assert torch.equal(module.get_submodule(prefix + inner).weight, layer.seen_weight()), inner
            checked += 1
        stored = module.state_dict()
        for name, tensor in float_state(averaged).items():  # what stays float is trained too
            if name.endswith("bias"):
                assert torch.equal(stored[prefix + name], tensor), name
    assert (
        checked == sum(len(written.quantized_layers(part)) for part in ("text_encoder", "unet", "vae")) > 50
    )
    assert written.quantization is not None
    assert written.quantization["source"] == {"name": "tiny", "hash": source.hash}
    assert written.quantization["recipe"]["rules"] == recipe.raw["rules"]
    assert "qat" in written.quantization["recipe"]["found_by"]
    assert load_components(written)["pipeline"].module is not None


def test_training_brings_the_latents_nearer(
    tiny_checkpoint: Path, tmp_path: Path, int4_recipe: Recipe
) -> None:
    """The loss on noise that no step has seen, before and after."""
    source = Checkpoint.open(tiny_checkpoint)
    cfg = dataclasses.replace(
        config(steps=8, batch_size=4, warmup_steps=0), perceptual_weight=0.0, picture_weight=0.0
    )
    objective = QatObjective(cfg, source, int4_recipe, CAPTIONS, torch.device("cpu"))

    @torch.no_grad()
    def loss() -> float:
        torch.manual_seed(99)
        return objective.loss()["loss"].item()

    before = loss()
    torch.manual_seed(0)
    start_run(tmp_path / "run", {}, resume=False)
    train(objective, cfg.loop, tmp_path / "run", torch.device("cpu"), False)
    assert loss() < 0.95 * before


def test_it_may_begin_at_the_integers_of_gptq(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Before the first step the layers run with the integers that ``edgeflow quantize`` writes."""
    from edgeflow.quantization.apply import load_integers, quantize_checkpoint
    from edgeflow.quantization.calibration import SEED, Calibration

    source, recipe = Checkpoint.open(tiny_checkpoint), read_recipe("w4g32")
    calibration = Calibration(tuple(CAPTIONS), 4, SEED)
    found = dataclasses.replace(recipe, rounding="gptq")
    quantize_checkpoint(source, found, tmp_path / "gptq", calibration=calibration)
    written = Checkpoint.open(tmp_path / "gptq")
    cfg = dataclasses.replace(config(batch_size=2), start="gptq", start_pictures=4, perceptual_weight=0.0)
    objective = QatObjective(cfg, source, recipe, CAPTIONS, torch.device("cpu"))
    checked = 0
    for component, part in (("text_encoder", "text_encoder"), ("unet", "unet"), ("decoder", "vae")):
        stored = load_integers(written, part)
        for name, inner in objective.layers[component].items():
            layer: Any = objective.trained[component].get_submodule(inner)
            if isinstance(layer, nn.Embedding):  # rounded to nearest by GPTQ, to fitted scales here
                continue
            q, scale, _ = layer.integers()
            assert np.array_equal(q.numpy(), stored[name]["q"]), name
            assert np.array_equal(scale.numpy(), stored[name]["scale"].astype(np.float32)), name
            checked += 1
    assert checked > 50
    biases = objective.trained["unet"].state_dict()
    assert torch.equal(biases["conv_out.bias"], load_part(written, "unet").state_dict()["conv_out.bias"])


def test_what_is_wrong_is_said_before_anything_is_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ask = Request("qat", "tiny", tmp_path / "out", source=tiny_checkpoint)
    with pytest.raises(UsageError, match=r"needs --recipe NAME\|FILE, captions: --pairs DIR"):
        run_stage(ask)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    ask = dataclasses.replace(ask, prompts=tmp_path / "prompts.txt", recipe="w4g32")
    with pytest.raises(ConfigError, match="scales: expected learned or weights, got 'both'"):
        run_stage(dataclasses.replace(ask, overrides=("scales=both",)))
    with pytest.raises(ConfigError, match="start: expected float or gptq, got 'middle'"):
        run_stage(dataclasses.replace(ask, overrides=("start=middle",)))
    with pytest.raises(ConfigError, match="start: gptq: expected scales to be learned, got 'weights'"):
        run_stage(dataclasses.replace(ask, overrides=("start=gptq", "scales=weights")))
    still = {
        "schema": 1,
        "name": "still",
        "rules": [{"component": "unet", "pattern": "*", "scheme": "float"}],
    }
    (tmp_path / "still.json").write_text(json.dumps(still))
    assert parse_recipe(still, "still").name == "still"
    with pytest.raises(ConfigError, match="still: expected a recipe that quantizes a layer, got none"):
        run_stage(dataclasses.replace(ask, recipe=str(tmp_path / "still.json")))
    assert not (tmp_path / "out").exists()


def test_gradients_of_equal_batches_are_equal_and_of_others_alike(tiny_checkpoint: Path) -> None:
    """The same batch twice has a cosine of 1, two batches have less."""
    cfg = config(batch_size=2)
    objective = QatObjective(
        cfg, Checkpoint.open(tiny_checkpoint), read_recipe("w4g32"), CAPTIONS, torch.device("cpu")
    )
    found = agreement(objective, 2)
    assert objective.config == cfg and list(found) == ["latent", "picture", "perceptual"]
    assert found["latent"]["decoder"] == (0.0, 0.0)  # latents say nothing of it
    assert all(found[t]["unet"][0] > 0 and -1 < found[t]["unet"][1] < 0.999 for t in found)
    fixed = torch.randn(2, *objective.shape)
    objective.draw.normal = lambda *shape: fixed  # type: ignore[method-assign]
    objective.draw.index = lambda count: torch.tensor([0, 1])  # type: ignore[method-assign]
    same = agreement(objective, 2)
    assert all(same[t]["unet"][1] > 0.9999 for t in same)


def test_captions(tmp_path: Path) -> None:
    latents = np.zeros((3, 4, 8, 8), np.float16)
    shard = Shard(np.arange(3), ["y", "x", "y"], latents)
    write_shard(shard_path(tmp_path, 0), 0, shard, np.ones(3, np.float32))
    (tmp_path / "pairs.json").write_text("{}")
    assert captions_of_pairs(tmp_path) == ["x", "y"]
    with pytest.raises(DataError, match="nowhere"):
        captions_of_pairs(tmp_path / "nowhere")
