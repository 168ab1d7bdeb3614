"""Rounding that keeps a layer's output, held against brute force, PyTorch's own layers and plain rounding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.components import load_components
from edgeflow.errors import ConfigError, UnknownNameError, UsageError
from edgeflow.quantization import prompts as lists
from edgeflow.quantization import recipe as recipes
from edgeflow.quantization.apply import calibrated_recipe, quantize_checkpoint
from edgeflow.quantization.calibration import solve_layer
from edgeflow.quantization.gptq import Moments, Solution, solve
from edgeflow.quantization.layers import dequantize, quantize_activation
from edgeflow.quantization.schemes import SCHEMES, Scheme, activation_range, quantize
from edgeflow.runtimes import mil_quantize_ops

TINY = Scheme("tiny", 4, -8, 7, None, False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(solution: Solution, bits: int) -> Tensor:
    return dequantize(solution.q, solution.scale, solution.zero_point, bits)


def error(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    difference = (weight - other).flatten(1)
    return float(((difference @ moments) * difference).sum())


def correlated(columns: int, samples: int = 4096, seed: int = 1) -> Tensor:
    """Inputs (K, M) that a few directions explain, as activations do."""
    basis = random(columns, columns // 4 or 1, seed=seed)
    return basis @ random(basis.shape[1], samples, seed=seed + 1) + 0.3 * random(
        columns, samples, seed=seed + 2
    )


def test_on_a_case_small_enough_to_search_it_lies_between_rounding_and_the_best() -> None:
    nearest_total = found_total = best_total = 0.0
    for seed in range(8):
        weight, x = random(1, 6, seed=seed), correlated(6, seed=10 * seed + 1)
        own = x @ x.T / x.shape[1]
        found = solve(weight, TINY, Moments(own, own), damping=1e-6)
        scale = found.scale
        middle = torch.round(weight / scale)
        steps = torch.tensor(list(itertools.product((-2, -1, 0, 1, 2), repeat=6)))
        all_q = (middle + steps).clamp(-8, 7)
        differences = all_q * scale - weight
        best_total += float(((differences @ own) * differences).sum(1).min())
        nearest_total += error(weight, middle.clamp(-8, 7) * scale, own)
        found_total += error(weight, weight_of(found, 4), own)
    assert best_total <= found_total + 1e-6 and found_total < 0.5 * nearest_total
    assert found_total < 3 * best_total


def test_inputs_without_correlation_leave_plain_rounding() -> None:
    weight = random(4, 64)
    eye = torch.eye(64)
    found = solve(weight, SCHEMES["w8"], Moments(eye, eye))
    assert torch.equal(found.q.float(), torch.round(weight / found.scale).clamp(-127, 127))


def test_a_layer_makes_up_for_what_its_inputs_have_lost() -> None:
    """Inputs scaled by 0.8 on the way: the best weight is 1/0.8 times as large."""
    weight, x = random(8, 32), correlated(32)
    own = x @ x.T / x.shape[1]
    found = solve(weight, SCHEMES["w8"], Moments(0.8 * own, 0.64 * own), damping=1e-4)
    torch.testing.assert_close(weight_of(found, 8), weight / 0.8, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", [name for name, how in SCHEMES.items() if not how.activations])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_outputs_of_real_layers_keep_more_than_by_rounding(name: str, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        layer: Any = nn.Linear(64, 24, bias=False)
        x = correlated(64).T.contiguous()
    else:
        layer = nn.Conv2d(32, 16, 3, padding=1, stride=2)
        mixed = correlated(32, 16 * 12 * 12).reshape(32, 16, 12, 12).transpose(0, 1)
        x = nn.functional.avg_pool2d(mixed, 3, 1, 1).contiguous() + 0.5
    held_out, fed = x[: len(x) // 4], x[len(x) // 4 :]
    how = SCHEMES[name]
    solved = solve_layer(layer, name, "gptq", fed, fed)
    original = layer.weight.detach().clone()
    expected = layer(held_out)

    def loss(weight: Tensor, bias: Tensor | None) -> float:
        layer.weight.data = weight
        if bias is not None:
            layer.bias.data = bias
        with torch.no_grad():
            return float((layer(held_out) - expected).square().sum())

    plain = loss(dequantize(*quantize(original, how), how.bits), None)
    found = loss(weight_of(solved.solution, how.bits), solved.bias)
    assert 0 < found < 0.6 * plain
    scale = solved.solution.scale
    assert torch.equal(scale, scale.half().float()) and tuple(scale.shape) == how.scale_shape(original.shape)
    assert how.quant_min <= int(solved.solution.q.min()) and int(solved.solution.q.max()) <= how.quant_max
    assert (solved.solution.zero_point is not None) == how.zero_point


# --- activations ----------------------------------------------------------------------------------------


def test_the_op_is_pytorchs_own_fake_quantization() -> None:
    x = random(4, 5, 6, seed=3) * 3
    scale, zero = activation_range(x)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, 255)
    torch.testing.assert_close(quantize_activation(x, scale, zero), expected)
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1000.0])
    found = quantize_activation(ties, torch.tensor(1.0), torch.tensor(3, dtype=torch.uint8))
    assert found.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, 252.0]


def test_core_mls_operations_are_the_same_rounding() -> None:
    x = random(3, 7, seed=4)
    scale, zero = activation_range(x)
    q = mil_quantize_ops.quantize(x, scale, "uint8", zero)
    assert torch.equal(mil_quantize_ops.dequantize(q, scale, zero), quantize_activation(x, scale, zero))
    rows = torch.tensor([0.1, 0.2, 0.3])
    by_row = mil_quantize_ops.quantize(x, rows, "int8", axis=torch.tensor(0))
    expected = torch.stack([torch.round(r / s).clamp(-128, 127) for r, s in zip(x, rows, strict=True)])
    assert torch.equal(by_row, expected)


def test_a_range_gives_up_outliers_where_that_costs_less_and_keeps_zero() -> None:
    x = random(100_000, seed=5)
    x[7] = 40.0
    scale, zero = activation_range(x)
    assert 255 * float(scale) < 0.95 * float(x.max() - x.min()) and float(scale) == float(scale.half())
    whole = (x.max() - x.min()) / 255
    plain = torch.fake_quantize_per_tensor_affine(x, float(whole), round(float(-x.min() / whole)), 0, 255)
    assert (quantize_activation(x, scale, zero) - x).square().sum() < (plain - x).square().sum()
    for values in (torch.full((10,), 3.0), torch.full((10,), -3.0), torch.zeros(10)):
        grid = activation_range(values)
        assert float(quantize_activation(torch.zeros(1), *grid)) == 0
        torch.testing.assert_close(quantize_activation(values, *grid), values, atol=0.02, rtol=0)


@pytest.mark.parametrize("scheme", ["w8", "w8a8"])
def test_a_recipe_sets_no_gates_of_bundles(scheme: str) -> None:
    rule = {"component": "unet", "pattern": "*", "scheme": scheme}
    raw = {"schema": 1, "name": "a", "rules": [rule], "gates": {"lowering": 20}}
    with pytest.raises(ConfigError, match="gates: expected numbers for some of sqnr_db, psnr_db, got"):
        recipes.parse_recipe(raw, "here")


# --- checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    things = ("apple", "heart", "cat", "boat", "star", "tree", "sun", "moon", "face", "dog", "cup", "car")
    styles = ("noto", "twemoji", "fluent flat", "emojione", "openmoji", "fxemoji")
    path = tmp_path_factory.mktemp("captions") / "captions.txt"
    path.write_text("\n".join(f"{thing}, {style} style" for thing in things for style in styles) + "\n")
    return path


def quantized(
    source: Checkpoint, captions: Path, out: Path, method: str, recipe: recipes.Recipe | None = None
) -> Checkpoint:
    given = None if method == "nearest" else str(captions)
    recipe = recipe or recipes.read_recipe("w4g32")
    recipe, drawn = calibrated_recipe(source, recipe, method, given, 8)
    report = quantize_checkpoint(source, recipe, out, calibration=drawn)
    assert not [note for note in report.notes if "reach" in note]
    return Checkpoint.open(out)


def test_a_calibrated_checkpoint_is_nearer_says_how_and_repeats(
    tiny_checkpoint: Path, captions: Path, tmp_path: Path, int4_recipe: recipes.Recipe
) -> None:
    source = Checkpoint.open(tiny_checkpoint)
    models = {m: quantized(source, captions, tmp_path / m, m, int4_recipe) for m in ("nearest", "gptq")}
    recorded = models["gptq"].quantization["recipe"]["rounding"]  # type: ignore[index]
    assert recorded["method"] == "gptq" and recorded["prompts"] == "captions"
    assert (recorded["num_prompts"], recorded["pictures"], recorded["seed"]) == (72, 8, 1_000_000)
    assert "rounding" not in models["nearest"].quantization["recipe"]  # type: ignore[index]
    inputs = load_components(source)["pipeline"].example
    lost = {}
    for name, model in models.items():
        own, floats = load_components(model), load_components(source)
        pairs = []
        for seed in range(4):
            inputs["noise"] = random(*inputs["noise"].shape, seed=100 + seed)
            with torch.no_grad():
                pairs.append(floats["pipeline"].module(**inputs) - own["pipeline"].module(**inputs))
        lost[name] = float(torch.stack(pairs).square().sum())
    assert lost["gptq"] < 0.85 * lost["nearest"]
    again = quantized(source, captions, tmp_path / "again", "gptq", int4_recipe)
    for file in models["gptq"].root.rglob("*.safetensors"):
        assert file.read_bytes() == (again.root / file.relative_to(models["gptq"].root)).read_bytes()


def test_prompts_to_calibrate_on(tiny_checkpoint: Path, captions: Path, tmp_path: Path) -> None:
    tiny, recipe = Checkpoint.open(tiny_checkpoint), recipes.read_recipe("w8")
    assert "emoji" in lists.builtin_prompts()
    prompts, facts = lists.calibration_prompts(tiny, "emoji")
    assert len(prompts) == facts["num_prompts"] == 2048
    assert not set(Checkpoint.open("emoji").generation.prompts) & set(prompts)  # these are the gates'
    with pytest.raises(UsageError, match="expected --calibration with a text file"):
        calibrated_recipe(tiny, recipe, "gptq", None, 8)
    with pytest.raises(UnknownNameError, match="emoji"):
        calibrated_recipe(tiny, recipe, "gptq", "nowhere", 8)
    (tmp_path / "few.txt").write_text("red apple\n" * 100)
    with pytest.raises(UsageError, match="at least 64 different prompts, got 1"):
        calibrated_recipe(tiny, recipe, "gptq", str(tmp_path / "few.txt"), 8)
    with pytest.raises(UsageError, match="--rounding gptq to go with it"):
        calibrated_recipe(tiny, recipe, "nearest", str(captions), 8)
