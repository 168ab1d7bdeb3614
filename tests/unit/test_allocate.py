"""Bits under a budget: the integer program against every allocation there is, the search on real layers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli.quantize import command
from edgeflow.components import load_components
from edgeflow.errors import ConfigError, UsageError
from edgeflow.noise import gaussian_noise
from edgeflow.quantization.allocate import (
    MIB,
    Allocator,
    integer_bits,
    recipe_of,
    stored_bytes,
)
from edgeflow.quantization.apply import quantize_checkpoint
from edgeflow.quantization.goal import parse_drop
from edgeflow.quantization.recipe import parse_recipe, plan
from edgeflow.quantization.sensitivity import LayerErrors, Painter, Sensitivity
from edgeflow.tokenizer import ClipTokenizer

SHAPES = [(64, 64), (32, 96, 3, 3), (16, 40), (128, 32), (48, 160), (8, 8, 3, 3)]


def made_up(seed: int) -> Sensitivity:
    """Six layers with errors of several magnitudes; two of them do not divide into groups."""
    draw = np.random.default_rng(seed)
    layers = []
    for i, shape in enumerate(SHAPES):
        scale = 10 ** draw.uniform(-5, -2)
        errors = {"w8": scale * draw.uniform(0.001, 0.02)}
        if shape[1] % 32 == 0:
            errors |= {"w4g32": scale, "w4g32z": scale * draw.uniform(0.4, 1.1)}
        layers.append(LayerErrors("unet", f"layer.{i}", shape, errors))
    return Sensitivity("made up", "0" * 64, ("a",), (0,), 1000, tuple(layers))


def every(sensitivity: Sensitivity) -> list[tuple[int, int, float]]:
    """(bytes, integer bits, error) of every allocation."""
    choices = [
        [
            (stored_bytes(x.shape, s), integer_bits(s) * math.prod(x.shape), e)
            for s, e in {"float": 0.0, **x.errors}.items()
        ]
        for x in sensitivity.layers
    ]
    columns = (zip(*taken, strict=True) for taken in itertools.product(*choices))
    return [(sum(b) + 2 * sensitivity.float_values, sum(n), sum(e)) for b, n, e in columns]


@pytest.mark.parametrize("seed", range(4))
def test_the_integer_program_finds_what_trying_everything_finds(seed: int) -> None:
    sensitivity = made_up(seed)
    allocator, all_of_them = Allocator(sensitivity), every(sensitivity)
    values = sum(math.prod(shape) for shape in SHAPES)
    assert allocator.least_bytes == min(b for b, _, _ in all_of_them)
    assert allocator.most_bytes == max(b for b, _, _ in all_of_them)
    for part in (0.0, 0.03, 0.2, 0.5, 1.0):
        budget = int(allocator.least_bytes + part * (allocator.most_bytes - allocator.least_bytes))
        found = allocator.under_bytes(budget)
        assert found.bytes <= budget
        assert found.error == pytest.approx(
            min(e for b, _, e in all_of_them if b <= budget), rel=1e-5, abs=1e-12
        )
        bits = 6 + 6 * part
        found = allocator.under_bits(bits)
        assert found.average_bits <= bits
        best = min(e for _, n, e in all_of_them if n <= bits * values)
        assert found.error == pytest.approx(best, rel=1e-5, abs=1e-12)
        error = 10 ** (-5 + 3 * part)
        found = allocator.under_error(error)
        assert found.error <= error
        assert found.bytes == min(b for b, _, e in all_of_them if e <= error)


def test_bytes_are_those_of_the_stored_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The theory against the safetensors of a quantized checkpoint, layer by layer."""
    rules = [
        {"component": "text_encoder", "pattern": "*", "scheme": "w4g32z", "fallback": "w8"},
        {"component": "unet", "pattern": "*", "scheme": "w4g32", "fallback": "w8"},
        {"component": "decoder", "pattern": "*", "scheme": "w8"},
    ]
    recipe = parse_recipe({"schema": 1, "name": "all", "rules": rules}, "all")
    report = quantize_checkpoint(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "q")
    assert {layer.scheme for layer in report.layers} == {"w8", "w4g32", "w4g32z"}
    for layer in report.layers:
        assert stored_bytes(layer.shape, layer.scheme) == layer.bytes_after


def test_a_budget_that_cannot_be_held_says_the_least_that_can() -> None:
    allocator = Allocator(made_up(0))
    least = allocator.least_bytes
    with pytest.raises(UsageError, match=r"budget: 0\.01 MiB: expected 0\.\d\d MiB or more") as caught:
        allocator.under_bytes(int(0.01 * MIB))
    said = float(str(caught.value).split("expected ")[1].split(" ")[0])
    assert allocator.under_bytes(int(said * MIB)).bytes >= least
    with pytest.raises(UsageError, match=r"average bits: 2: expected \d\.\d+ or more"):
        allocator.under_bits(2)
    assert set(allocator.under_bytes(2**40).schemes) == {"float"}


def test_a_found_recipe_names_every_layer_literally() -> None:
    sensitivity = made_up(1)
    strange = LayerErrors("decoder", "a[0].*?", (4, 4), {"w8": 1e-9})
    sensitivity = Sensitivity(**{**vars(sensitivity), "layers": (*sensitivity.layers, strange)})
    chosen = Allocator(sensitivity).under_bits(9)
    recipe = recipe_of(chosen, sensitivity, "found", "a test", {})
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer in sensitivity.layers:
        shapes.setdefault(layer.component, {})[layer.layer] = layer.shape
    assert plan(recipe, shapes).schemes == chosen.plan(sensitivity)


def test_sensitivities_are_read_as_they_were_written(tmp_path: Path) -> None:
    made_up(2).write(tmp_path / "s.json")
    assert Sensitivity.read(tmp_path / "s.json") == made_up(2)
    (tmp_path / "s.json").write_text('{"schema": 1}')
    with pytest.raises(ConfigError, match=r"s\.json: expected what a search has written"):
        Sensitivity.read(tmp_path / "s.json")


def test_drops_are_parsed() -> None:
    assert parse_drop("worst_psnr=28.5") == ("worst_psnr", 28.5)
    assert parse_drop("feature=0.02") == ("feature", 0.02)
    for wrong in ("psnr", "kid=1", "psnr=x", "psnr=nan", "feature=-1"):
        with pytest.raises(UsageError, match=r"expected a metric and its limit; known: psnr=DB, .*DISTANCE"):
            parse_drop(wrong)


# --- the search -----------------------------------------------------------------------------------------


def test_errors_at_the_picture_are_those_of_the_quantized_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """One layer of each component, through a written checkpoint and the export-ready pipeline."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    prompts = checkpoint.generation.prompts[:2]
    painter = Painter(checkpoint, prompts, (0, 1))
    for component, pattern in (
        ("text_encoder", "encoder.layers.0.mlp.fc1"),
        ("unet", "mid_block.resnets.0.conv1"),
        ("decoder", "decoder.layers.0"),
    ):
        rule = {"component": component, "pattern": pattern, "scheme": "w8"}
        recipe = parse_recipe({"schema": 1, "name": "one", "rules": [rule]}, "one")
        quantize_checkpoint(checkpoint, recipe, tmp_path / component)
        there = load_components(Checkpoint.open(tmp_path / component))["pipeline"].module
        tokenizer = ClipTokenizer.from_folder(checkpoint.generation.tokenizer_dir)
        errors = []
        for i, prompt in enumerate(prompts):
            noise = torch.from_numpy(gaussian_noise(i, (1, *checkpoint.generation.latent_shape)))
            drawn = there(torch.from_numpy(tokenizer.encode(prompt)).int(), noise)
            errors.append((drawn[0] - painter.pictures[i]).double().square().mean().item())
        found = painter.error({component: {pattern: "w8"}})
        assert found.min() > 0
        torch.testing.assert_close(found, torch.tensor(errors, dtype=torch.float64), rtol=0.02, atol=1e-12)
    assert not painter.error({}).any()


def run(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def searched(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("searched")
    arguments = ("--average-bits", 4.5, "--num-prompts", 2, "-o", out / "q", "--search", out / "search")
    result = run(tiny_checkpoint, *arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "fresh noise" in result.stdout and "→" in result.stdout
    return out


def test_a_search_writes_the_recipe_and_the_curve(searched: Path, tiny_checkpoint: Path) -> None:
    recipe = json.loads((searched / "search" / "recipe.json").read_text())
    curve = json.loads((searched / "search" / "curve.json").read_text())
    quantized = Checkpoint.open(searched / "q")
    assert quantized.quantization is not None and quantized.quantization["recipe"] == recipe
    assert len({rule["scheme"] for rule in recipe["rules"]}) > 1
    chosen = [p for p in curve if p["chosen"]]
    assert len(chosen) == 1 and chosen[0]["average_bits"] <= 4.5
    assert recipe["measured"]["psnr_db"] == chosen[0]["psnr_db"]
    sizes = [p["size_mib"] for p in curve]
    assert sizes == sorted(sizes) and len(curve) > 4
    assert curve[-1]["psnr_db"] > curve[0]["psnr_db"] + 10  # 8 bits against 4


def test_a_search_from_its_sensitivity_gives_the_same_recipe(
    searched: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    given = searched / "search" / "sensitivity.json"
    arguments = ("--average-bits", 4.5, "--sensitivity", given, "--search", tmp_path / "search")
    assert run(tiny_checkpoint, *arguments, "-o", tmp_path / "q").exit_code == 0
    for name in ("curve.json", "sensitivity.json"):
        assert (tmp_path / "search" / name).read_bytes() == (searched / "search" / name).read_bytes()


def test_the_smallest_that_holds_a_limit(searched: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The limit holds as drawn on fresh noise, and not by staying float."""
    curve = json.loads((searched / "search" / "curve.json").read_text())
    limit = sum(p["fresh_worst_psnr_db"] for p in (curve[0], curve[-1])) / 2
    given = searched / "search" / "sensitivity.json"
    arguments = ("--max-drop", f"worst_psnr={limit}", "--sensitivity", given, "--search", tmp_path / "search")
    result = run(tiny_checkpoint, *arguments, "-o", tmp_path / "q")
    assert result.exit_code == 0, result.output + str(result.exception)
    (chosen,) = (p for p in json.loads((tmp_path / "search" / "curve.json").read_text()) if p["chosen"])
    assert chosen["fresh_worst_psnr_db"] >= limit
    assert curve[0]["size_mib"] < chosen["size_mib"] < curve[-1]["size_mib"]


def test_features_that_are_the_pixels_give_the_error_of_the_pixels(tiny_checkpoint: Path) -> None:
    """Three channels, and [-1, 1] in place of [0, 1]: twelve times the mean square."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    painter = Painter(checkpoint, checkpoint.generation.prompts[:2], (0, 1), lambda pictures: [pictures])
    errors = painter.errors({"unet": {"conv_in": "w8"}})
    assert errors["picture"].min() > 0
    torch.testing.assert_close(errors["feature"], 12 * errors["picture"])
    assert set(Painter(checkpoint, ("a",), (0,)).errors({})) == {"picture"}


def test_a_search_by_features_on_given_prompts(searched: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Layers are measured on the list's first prompts; the limit on the distance holds on fresh noise."""
    lines = [f"thing {i}" for i in range(64)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    asked = ("--calibration", tmp_path / "list.txt", "--num-prompts", 2)
    first = ("--average-bits", 5, "--error", "feature", "--search", tmp_path / "first")
    result = run(tiny_checkpoint, *first, *asked, "-o", tmp_path / "q")
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "predicted distance" in result.stdout
    sensitivity = Sensitivity.read(tmp_path / "first" / "sensitivity.json")
    assert sensitivity.error == "feature" and list(sensitivity.prompts) == lines[:2]
    curve = json.loads((tmp_path / "first" / "curve.json").read_text())
    assert curve[0]["feature"] > 5 * curve[-1]["feature"] > 0 and curve[0]["predicted_psnr_db"] is None
    limit = (curve[0]["fresh_feature"] + curve[-1]["fresh_feature"]) / 3
    given = ("--sensitivity", tmp_path / "first" / "sensitivity.json", "--search", tmp_path / "second")
    result = run(
        tiny_checkpoint, "--max-drop", f"feature={limit}", *given, *asked, "-o", tmp_path / "smallest"
    )
    assert result.exit_code == 0, result.output + str(result.exception)
    (chosen,) = (p for p in json.loads((tmp_path / "second" / "curve.json").read_text()) if p["chosen"])
    assert chosen["fresh_feature"] <= limit and curve[0]["size_mib"] < chosen["size_mib"]
    of_pixels = ("--sensitivity", searched / "search" / "sensitivity.json", "--error", "feature")
    result = run(tiny_checkpoint, "--average-bits", 5, *of_pixels, "-o", tmp_path / "other")
    assert "expected errors of the feature, as the goal is, got errors of the picture" in str(
        result.exception
    )


def test_what_is_wrong_is_said_before_anything_is_measured(
    searched: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "q")
    for arguments, said in (
        ((), "expected one of --recipe, --budget-mib, --average-bits, --max-drop, got none"),
        (("--budget-mib", 1, "--average-bits", 5), "got --budget-mib, --average-bits"),
        (("--recipe", "w8", "--num-prompts", 2), "--num-prompts: expected one of --budget-mib"),
        (("--max-drop", "kid=1"), "known: psnr=DB, worst_psnr=DB, feature=DISTANCE"),
        (("--max-drop", "feature=1", "--error", "picture"), "--error picture: expected feature"),
        (("--recipe", "w8", "--error", "feature"), "--error: expected one of --budget-mib"),
        (("--budget-mib", 1, "--num-prompts", 99), "expected 1 to 4, the model's own, got 99"),
    ):
        assert said in str(run(tiny_checkpoint, *arguments, *out).exception)
    given = ("--sensitivity", searched / "search" / "sensitivity.json")
    result = run(tiny_checkpoint, "--budget-mib", 0.1, *given, *out)
    assert "MiB or more, the least" in str(result.exception)
    result = run(tiny_checkpoint, "--budget-mib", 1, *given, "--num-prompts", 3, *out)
    assert "sensitivity: expected one of tiny" in str(result.exception)
    assert not (tmp_path / "q").exists()
