"""Schemes, recipes and quantized checkpoints; the arithmetic is held against NumPy's."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeflow.checkpoint import Checkpoint
from edgeflow.components import load_components
from edgeflow.errors import CheckpointError, ConfigError, EdgeflowError, UnknownNameError, UsageError
from edgeflow.inspect import describe
from edgeflow.quantization import recipe as recipes
from edgeflow.quantization.apply import load_integers, pack, quantize_checkpoint, unpack
from edgeflow.quantization.layers import dequantize
from edgeflow.quantization.schemes import SCHEMES, palettize, quantize

RULES = [{"component": "unet", "pattern": "*", "scheme": "w4g32", "fallback": "w8"}]


def recipe(rules: list[dict[str, Any]], **more: Any) -> recipes.Recipe:
    return recipes.parse_recipe({"schema": 1, "name": "test", "rules": rules, **more}, "test")


def spread(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, size in enumerate(shape):
        blocks = blocks.repeat(size // blocks.shape[axis], axis)
    return blocks


# --- schemes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(8, 64), (5, 64, 3, 3), (4, 32, 1, 1)])
def test_rounding_is_to_the_nearest_of_the_blocks_own_grid(name: str, shape: tuple[int, ...]) -> None:
    how = SCHEMES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
    q, scale, zero = (None if t is None else t.numpy() for t in quantize(weight, how))
    assert q is not None and scale is not None
    assert q.dtype == np.int8 and how.quant_min <= q.min() and q.max() <= how.quant_max
    groups = 1 if how.group is None else shape[1] // how.group
    assert scale.shape == ((shape[0], groups, *((1,) * len(shape[2:]) if how.group is None else shape[2:])))
    assert (zero is not None) == how.zero_point
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    wide = spread(scale, shape)
    shift = 0 if zero is None else spread(zero.astype(np.float32), shape)
    expected = np.clip(np.rint(weight.numpy() / wide) + shift, how.quant_min, how.quant_max)
    assert (
        np.abs(q - expected).max() <= 1 and (q != expected).mean() < 0.01
    )  # ties and one rounding of 1/scale
    largest = np.abs(weight.numpy()).reshape(shape[0], -1).max()
    assert np.abs((q - shift) * wide - weight.numpy()).max() <= largest / how.quant_max
    got = dequantize(
        torch.tensor(q), torch.tensor(scale), None if zero is None else torch.tensor(zero), how.bits
    )
    np.testing.assert_array_equal(got.numpy(), (q - shift).astype(np.float32) * wide)


def test_a_row_of_zeros_stays_zero() -> None:
    q, scale, _ = quantize(torch.zeros(3, 32), SCHEMES["w8"])
    assert not q.any() and (scale > 0).all() and torch.isfinite(scale.half()).all()


def test_packing_keeps_every_int4() -> None:
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 4).reshape(3, 64, 1, 1)
    packed = pack(q)
    assert packed.shape == (3, 32, 1, 1) and packed.dtype == torch.uint8
    assert int(packed[0, 0, 0, 0]) == (-8 & 15) | ((-7 & 15) << 4)
    assert torch.equal(unpack(packed), q)


def test_a_palette_is_the_best_of_all_cuts_on_a_case_small_enough_to_try_them() -> None:
    """Optimal 1-D clusters are runs of the sorted values: every way to cut 12 values into 4 runs."""
    values = np.array([-3.0, -2.9, -2.7, -1.0, -0.9, -0.85, 0.4, 0.5, 0.45, 2.0, 2.2, 2.1])
    runs = np.sort(values)
    best = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(runs, cuts))
        for cuts in itertools.combinations(range(1, 12), 3)
    )
    indices, table = palettize(torch.tensor(values, dtype=torch.float32).reshape(3, 4), 2)
    assert indices.shape == (3, 4) and indices.dtype == torch.uint8 and table.shape == (4,)
    error = float((table[indices.long()].numpy().reshape(-1).astype(np.float64) - values).__pow__(2).sum())
    assert abs(error - best) < 1e-3
    exact = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0)).float() / 8 - 1
    indices, table = palettize(exact, 4)
    assert torch.equal(table[indices.long()], exact)


@pytest.mark.parametrize(("bits", "optimum_db"), [(4, 20.22), (6, 31.89)])
def test_a_palette_of_gaussian_weights_is_as_good_as_the_best_known(bits: int, optimum_db: float) -> None:
    """The optimum of 16 and of 64 levels for N(0, 1) (Max 1960, IRE Trans. Inf. Theory 6, and its
    continuation) is 20.22 and 31.89 dB; started from quantiles, 64 levels end 2.6 dB below."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    indices, table = palettize(weight, bits)
    error = (table[indices.long()] - weight).square().mean()
    assert 10 * torch.log10(weight.square().mean() / error).item() == pytest.approx(optimum_db, abs=0.15)


# --- recipes --------------------------------------------------------------------------------------------


def test_shipped_recipes_are_read_by_name() -> None:
    assert set(recipes.builtin_recipes()) >= {"w8", "w4g32"}
    for name in recipes.builtin_recipes():
        assert "measured" not in recipes.read_recipe(name).raw  # figures are a model's, and stand in the docs
        assert recipes.read_recipe(name).name == name


def test_the_first_rule_wins_and_the_rest_stays_float() -> None:
    rules = [
        {"component": "unet", "pattern": "a.*", "scheme": "float"},
        {"component": "unet", "pattern": "*", "scheme": "w8"},
    ]
    layers = {"unet": {"a.b": (4, 4), "c": (4, 4)}, "decoder": {"c": (4, 4)}}
    assert recipes.plan(recipe(rules), layers).schemes == {
        "unet": {"a.b": "float", "c": "w8"},
        "decoder": {"c": "float"},
    }


def test_a_pattern_without_a_layer_is_an_error_or_a_line_of_the_report() -> None:
    rule = {"component": "unet", "pattern": "nowhere*", "scheme": "w8"}
    with pytest.raises(ConfigError, match=r"unet: pattern 'nowhere\*' gives no layer"):
        recipes.plan(recipe([rule]), {"unet": {"a": (4, 4)}})
    plan = recipes.plan(recipe([{**rule, "unmatched": "report"}]), {"unet": {"a": (4, 4)}})
    assert len(plan.notes) == 1 and "nowhere" in plan.notes[0]


def test_a_rule_that_earlier_rules_leave_nothing_is_an_error() -> None:
    rules = [
        {"component": "unet", "pattern": "*", "scheme": "w8"},
        {"component": "unet", "pattern": "a", "scheme": "float"},
    ]
    with pytest.raises(ConfigError, match="'a' gives no layer"):
        recipes.plan(recipe(rules), {"unet": {"a": (4, 4)}})


def test_a_layer_that_does_not_divide_is_an_error_or_falls_back() -> None:
    layers = {"unet": {"odd": (4, 40), "even": (4, 64)}}
    rule = {"component": "unet", "pattern": "*", "scheme": "w4g32"}
    with pytest.raises(ConfigError, match=r"unet: odd: 40 input channels .* groups of 32.*no fallback"):
        recipes.plan(recipe([rule]), layers)
    with pytest.raises(ConfigError, match="no fallback"):  # a fallback that does not divide either is none
        recipes.plan(recipe([{**rule, "fallback": "w4g32z"}]), layers)
    plan = recipes.plan(recipe([{**rule, "fallback": "w8"}]), layers)
    assert plan.schemes["unet"] == {"odd": "w8", "even": "w4g32"}
    assert len(plan.notes) == 1 and "odd" in plan.notes[0] and "w8 instead" in plan.notes[0]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "a JSON object, got a list"),
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"schema": 1, "name": "", "rules": []}, "name: .*rules: "),
        ({"schema": 1, "name": "a", "rules": [{}]}, "component None is not known.*scheme None.*pattern"),
        ({"schema": 1, "name": "a", "rules": [{**RULES[0], "scheme": "w3"}]}, "'w3' is not known; known: w8"),
        ({"schema": 1, "name": "a", "rules": [{**RULES[0], "component": "vae"}]}, "'vae' is not known"),
        ({"schema": 1, "name": "a", "rules": [{**RULES[0], "color": 1}]}, "key 'color' is not known"),
        ({"schema": 1, "name": "a", "rules": RULES, "gates": {"kid": 1}}, "gates: expected numbers"),
        ({"schema": 1, "name": "a", "rules": RULES, "more": 1}, "key 'more' is not known"),
    ],
)
def test_everything_wrong_in_a_recipe_is_said_at_once(raw: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipes.parse_recipe(raw, "here")


def test_an_unknown_recipe_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="w4g32, w6, w8"):
        recipes.read_recipe("w5")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ConfigError, match="expected JSON"):
        recipes.read_recipe(tmp_path / "r.json")


# --- checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("quantized") / "q"
    quantize_checkpoint(Checkpoint.open(tiny_checkpoint), recipes.read_recipe("w4g32"), out)
    return Checkpoint.open(out)


def test_a_quantized_checkpoint_says_what_it_is(quantized: Checkpoint, tiny_checkpoint: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint)
    shipped = json.loads((recipes.RECIPES / "w4g32.json").read_text())
    assert quantized.quantization == {"recipe": shipped, "source": {"name": "tiny", "hash": source.hash}}
    assert quantized.hash != source.hash
    facts = describe(quantized.root)
    assert facts["parameters"] == describe(tiny_checkpoint)["parameters"]
    assert facts["quantization"]["recipe"]["name"] == "w4g32"
    assert {"int4", "int8"} <= set(next(p for p in facts["parts"] if p["name"] == "unet")["dtypes"])
    assert facts["bytes"] < 0.6 * describe(tiny_checkpoint)["bytes"]


def test_modules_hold_the_files_integers(quantized: Checkpoint, tiny_checkpoint: Path) -> None:
    """A convolution by hand: the file's integers times their scales, against the module's weight."""
    component = load_components(quantized)["unet"]
    layers = load_integers(quantized, "unet")
    name = next(n for n, layer in layers.items() if layer["q"].ndim == 4 and layer["scale"].shape[1] > 1)
    layer, module = layers[name], component.module.unet.get_submodule(name)
    expected = layer["q"].astype(np.float32) * spread(layer["scale"].astype(np.float32), layer["q"].shape)
    np.testing.assert_array_equal(module.weight.numpy(), expected)
    original = load_file(tiny_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")[
        f"{name}.weight"
    ].float()
    error = np.square(expected - original.numpy()).sum() / np.square(original.numpy()).sum()
    assert 0 < error < 10**-1.5  # int4: some 20 dB


def test_equal_inputs_give_equal_bytes(quantized: Checkpoint, tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(Checkpoint.open(tiny_checkpoint), recipes.read_recipe("w4g32"), tmp_path / "again")
    first = {p.relative_to(quantized.root): p.read_bytes() for p in quantized.root.rglob("*") if p.is_file()}
    second = {
        p.relative_to(tmp_path / "again"): p.read_bytes()
        for p in (tmp_path / "again").rglob("*")
        if p.is_file()
    }
    assert first == second


def test_the_recipe_is_in_the_hash(quantized: Checkpoint, tmp_path: Path) -> None:
    other = Path(shutil.copytree(quantized.root, tmp_path / "q"))
    facts = json.loads((other / "edgeflow.json").read_text())
    facts["quantization"]["recipe"]["found_by"] = "another way"
    (other / "edgeflow.json").write_text(json.dumps(facts))
    assert Checkpoint.open(other).hash != quantized.hash


def _spoil(name: str, root: Path) -> None:
    """One of the ways in which a quantized checkpoint can be broken."""
    file = root / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, facts = load_file(file), json.loads((root / "edgeflow.json").read_text())
    if name == "scale lost":
        del tensors["conv_in.weight_scale"]
    elif name == "integers lost":
        del tensors["conv_in.weight_q"]
    elif name == "scale of another shape":
        tensors["conv_in.weight_scale"] = tensors["conv_in.weight_scale"][:-1].contiguous()
    elif name == "scale of another dtype":
        tensors["conv_in.weight_scale"] = tensors["conv_in.weight_scale"].float()
    elif name == "both":
        tensors["conv_in.weight"] = tensors["conv_in.weight_q"].float()
    elif name == "no recipe":
        del facts["quantization"]
    elif name == "broken recipe":
        facts["quantization"]["recipe"]["rules"] = []
    save_file(tensors, file)
    (root / "edgeflow.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scale lost", "'conv_in': expected the tensor conv_in.weight_scale, found none"),
        ("integers lost", "'conv_in': expected the tensor conv_in.weight_q, found none"),
        ("scale of another shape", "a scale that divides"),
        ("scale of another dtype", "scale in F16.* got I8, F32"),
        ("both", "integers or a float weight, got both"),
        ("no recipe", "expected a recipe for"),
        ("broken recipe", "rules: expected a list of rules"),
    ],
)
def test_opening_finds_what_is_broken(quantized: Checkpoint, tmp_path: Path, name: str, said: str) -> None:
    root = Path(shutil.copytree(quantized.root, tmp_path / "q"))
    _spoil(name, root)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(root)


def test_what_cannot_be_quantized_is_refused(
    quantized: Checkpoint, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shipped, out = recipes.read_recipe("w8"), tmp_path / "out"
    with pytest.raises(UsageError, match="a float checkpoint, got one quantized by 'w4g32'"):
        quantize_checkpoint(quantized, shipped, out)
    wrong = copy.deepcopy(RULES)
    wrong[0]["pattern"] = "nowhere"
    with pytest.raises(ConfigError, match="nowhere"):
        quantize_checkpoint(Checkpoint.open(tiny_checkpoint), recipe(wrong), out)
    assert list(tmp_path.iterdir()) == []


def test_training_from_integers_is_refused(quantized: Checkpoint) -> None:
    from edgeflow.training.models import load_autoencoder, load_parts

    for load in (load_parts, load_autoencoder):
        with pytest.raises(EdgeflowError, match="float weights to train from"):
            load(quantized.root)
