"""A recipe applied to a checkpoint, and a quantized checkpoint's modules loaded again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgeflow import metrics
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, UsageError
from edgeflow.facts import FACTS
from edgeflow.quantization import recipe as recipes
from edgeflow.quantization.calibration import SEED, Calibration, Solved, solve_layers
from edgeflow.quantization.gptq import Solution
from edgeflow.quantization.layers import (
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    INTEGERS,
    PALETTE,
    SCALE,
    ZERO_POINT,
    dequantize,
    quantizable_layers,
    replace_weight,
)
from edgeflow.quantization.prompts import calibration_prompts
from edgeflow.quantization.recipe import NEAREST, Plan, Recipe, rounds_activations, with_rounding
from edgeflow.quantization.schemes import FLOAT, PALETTES, SCHEMES, palettize, quantize
from edgeflow.staging import staged_folder

#: A recipe's component → the checkpoint's part, and where in the part its layers lie.
PLACES = {
    "text_encoder": ("text_encoder", ("",)),
    "unet": ("unet", ("",)),
    "decoder": ("vae", ("decoder.", "post_quant_conv")),
}
#: transformers wraps CLIP's text model in a module of this name in some versions and not in others.
_WRAPPER = "text_model."


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. Bytes are those of its weight, before and after, in the checkpoint."""

    component: str
    layer: str
    scheme: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    weight_sqnr_db: float | None  # float weight ↔ dequantized; None where it stays float


@dataclass(frozen=True)
class Trained:
    """What training made of a checkpoint: by part its float weights as the part's state dict names them
    (those absent stay the checkpoint's), and by component and layer the integers (q, scale, zero point)."""

    weights: Mapping[str, Mapping[str, Tensor]]
    integers: Mapping[str, Mapping[str, tuple[Tensor, Tensor, Tensor | None]]]

    def solved(self) -> dict[tuple[str, str], Solved]:
        """(component, layer) → its integers."""
        return {
            (component, name): Solved(Solution(*given))
            for component, layers in self.integers.items()
            for name, given in layers.items()
        }


@dataclass(frozen=True)
class QuantizationReport:
    """What a recipe did to a checkpoint."""

    recipe: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]  # fallbacks, rules that no layer took, and what stays float by design

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    *,
    calibration: Calibration | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda step: None,
    trained: Trained | None = None,
) -> QuantizationReport:
    """Write the quantized checkpoint at ``out``: integers and scales for the layers that the recipe names.

    A recipe that rounds activations, or not to the nearest, takes ``calibration``, as calibrated_recipe
    gives it with the recipe; a layer that the calibration does not reach is rounded to nearest
    and noted. With ``trained`` its weights and integers are written in place of the checkpoint's rounded
    ones. Everything else keeps the dtype it is stored in; edgeflow.json gets the recipe verbatim and the
    float checkpoint's name and hash. Equal inputs give equal bytes, with calibration on the same machine with
    as many threads. Raises UsageError for a checkpoint that is quantized already, ExportError for one that
    edgeflow cannot export, ConfigError for a recipe that does not fit it, OutputExistsError.
    """
    from edgeflow.components import check_exportable
    from edgeflow.loading import load_part

    if checkpoint.quantization is not None:
        name = checkpoint.quantization["recipe"]["name"]
        raise UsageError(
            f"quantize: {checkpoint.name}: expected a float checkpoint, got one quantized by {name!r}"
        )
    check_exportable(checkpoint)
    with staged_folder(out, force=force) as stage:
        progress("loading the checkpoint")
        modules = {part: load_part(checkpoint, part) for part, _ in PLACES.values()}
        for part, weights in trained.weights.items() if trained else ():
            if modules[part].load_state_dict(weights, strict=False).unexpected_keys:
                raise ValueError(f"trained weights of {part} are not the checkpoint's")
        plan = plan_for(recipe, modules)
        if trained is not None:
            solved = trained.solved()
        else:
            solved = _solved(checkpoint, recipe, modules, plan, calibration, progress)
        reports: list[LayerReport] = []
        for component, (part, _) in PLACES.items():
            progress(f"quantizing {component}")
            dtypes = {t.dtype for t in checkpoint.stored_tensors(part).values()}
            stay = torch.float16 if dtypes == {"F16"} else torch.float32
            own = {name: result for (of, name), result in solved.items() if of == component}
            tensors = _quantized_state(component, modules[part], plan.schemes[component], own, stay, reports)
            (stage / part).mkdir()
            shutil.copyfile(checkpoint.root / part / "config.json", stage / part / "config.json")
            save_file(tensors, stage / part / f"{checkpoint.weight_stem(part)}.safetensors")
            (stage / part / f"{checkpoint.weight_stem(part)}.safetensors").chmod(0o644)
        _write_rest(checkpoint, recipe, stage)
        Checkpoint.open(stage)
    return QuantizationReport(recipe.name, tuple(reports), (*plan.notes, *_left(recipe, reports, solved)))


def _left(recipe: Recipe, reports: list[LayerReport], solved: dict[tuple[str, str], Solved]) -> Iterator[str]:
    """What is said of layers that calibration does not reach or that have no input to round."""
    for r in reports:
        result = solved.get((r.component, r.layer))
        if r.scheme not in SCHEMES or not _calibrated(recipe):
            continue
        if result is None:
            yield f"{r.component}: {r.layer}: calibration does not reach it: rounded to nearest"
        if SCHEMES[r.scheme].activations and (result is None or result.input_grid is None):
            yield f"{r.component}: {r.layer}: no input that could be rounded: its weight alone"


def _calibrated(recipe: Recipe) -> bool:
    """Whether the recipe takes calibration pictures."""
    return recipe.rounding != NEAREST or rounds_activations(recipe.raw)


def calibrated_recipe(
    checkpoint: Checkpoint, recipe: Recipe, method: str, source: str | None, pictures: int
) -> tuple[Recipe, Calibration | None]:
    """The recipe with the rounding ``method`` in its JSON, and the calibration that this takes.

    ``source`` is as in edgeflow.quantization.prompts; raises as that does, and UsageError for prompts given
    to a recipe and a method that look at none.
    """
    if not _calibrated(replace(recipe, rounding=method)):
        if source is not None:
            raise UsageError("quantize: --calibration: expected --rounding gptq to go with it, got nearest")
        return (recipe if recipe.rounding == NEAREST else with_rounding(recipe, {"method": NEAREST})), None
    prompts, facts = calibration_prompts(checkpoint, source)
    calibration = Calibration(prompts, pictures, SEED)
    return with_rounding(recipe, {"method": method, **facts, "pictures": pictures, "seed": SEED}), calibration


def _solved(
    checkpoint: Checkpoint,
    recipe: Recipe,
    modules: dict[str, nn.Module],
    plan: Plan,
    calibration: Calibration | None,
    progress: Callable[[str], None],
) -> dict[tuple[str, str], Solved]:
    """(component, layer) → what calibration makes of it; nothing where each weight is rounded by itself."""
    if not _calibrated(recipe):
        return {}
    if calibration is None:
        raise ValueError(f"recipe {recipe.name}: it takes a calibration, got none")
    layers = {component: layers_of(component, modules[part]) for component, (part, _) in PLACES.items()}
    spec = checkpoint.generation
    return solve_layers(modules, layers, plan.schemes, recipe.rounding, spec, calibration, progress)


def plan_for(recipe: Recipe, modules: dict[str, nn.Module]) -> Plan:
    """The recipe's plan for a model's modules, by part. Raises ConfigError as recipe.plan does."""
    shapes = {
        component: {
            name: tuple(layer.weight.shape) for name, layer in layers_of(component, modules[part]).items()
        }
        for component, (part, _) in PLACES.items()
    }
    return recipes.plan(recipe, shapes)


def layers_of(component: str, module: nn.Module) -> dict[str, Any]:
    """Name in recipes → layer, for every layer of the component that can be quantized."""
    _, prefixes = PLACES[component]
    found = {name.removeprefix(_WRAPPER): layer for name, layer in quantizable_layers(module).items()}
    return {name: layer for name, layer in found.items() if name.startswith(prefixes)}


def _quantized_state(
    component: str,
    module: nn.Module,
    plan: dict[str, str],
    solved: dict[str, Solved],
    stay: torch.dtype,
    reports: list[LayerReport],
) -> dict[str, Tensor]:
    """The part's tensors as stored: integers and scales where planned, the rest in the dtype ``stay``.

    A layer that is in ``solved`` has its integers from there instead of being rounded.
    """
    state = {name.removeprefix(_WRAPPER): tensor for name, tensor in module.state_dict().items()}
    state = {n: (t.to(stay) if t.is_floating_point() else t).contiguous() for n, t in state.items()}
    for name, how in plan.items():
        weight = state[f"{name}.weight"]
        before = after = weight.nbytes
        sqnr = None
        if how in PALETTES:
            original = state.pop(f"{name}.weight").float()
            indices, palette = palettize(original, PALETTES[how])
            state |= {f"{name}.{INTEGERS}": indices, f"{name}.{PALETTE}": palette.half()}
            after = indices.nbytes + palette.half().nbytes
            sqnr = metrics.sqnr_db(original.numpy(), palette[indices.long()].numpy())
        elif how != FLOAT:
            scheme = SCHEMES[how]
            original = state.pop(f"{name}.weight").float()
            result = solved.get(name) or Solved(Solution(*quantize(original, scheme)))
            q, scale, zero = result.solution.q, result.solution.scale, result.solution.zero_point
            if result.bias is not None:
                state[f"{name}.bias"] = result.bias.to(stay)
            stored = {INTEGERS: pack(q) if scheme.bits == 4 else q, SCALE: scale.half()}
            if zero is not None:
                stored[ZERO_POINT] = zero
            if result.input_grid is not None:
                stored |= {INPUT_SCALE: result.input_grid[0].half(), INPUT_ZERO_POINT: result.input_grid[1]}
            state |= {f"{name}.{end}": tensor.contiguous() for end, tensor in stored.items()}
            after = sum(tensor.nbytes for tensor in stored.values())
            sqnr = metrics.sqnr_db(original.numpy(), dequantize(q, scale, zero, scheme.bits).numpy())
        reports.append(LayerReport(component, name, how, tuple(weight.shape), before, after, sqnr))
    return dict(sorted(state.items()))


def pack(q: Tensor) -> Tensor:
    """int4 in int8 (O, I, …) → uint8 (O, I/2, …), input channel 2k in the low four bits."""
    low, high = q[:, 0::2].to(torch.uint8) & 15, q[:, 1::2].to(torch.uint8) & 15
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of ``pack``: uint8 (O, I/2, …) → int8 (O, I, …), −8 to 7."""
    both = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1, 2).to(torch.int8)
    return both - 16 * (both > 7).to(torch.int8)


def _write_rest(checkpoint: Checkpoint, recipe: Recipe, stage: Path) -> None:
    """Everything but the weights, as it was, and the facts with the recipe."""
    (stage / "tokenizer").mkdir()
    for file in checkpoint.files("tokenizer"):
        shutil.copyfile(file, stage / "tokenizer" / file.name)
    for name in ("model_index.json", "README.md", "scheduler/scheduler_config.json"):
        if (checkpoint.root / name).is_file():
            (stage / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.root / name, stage / name)
    facts = {key: value for key, value in checkpoint.facts.items() if key != "parts"}
    source = {"name": checkpoint.name, "hash": checkpoint.hash}
    facts["quantization"] = {"recipe": recipe.raw, "source": source}
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (stage / FACTS).write_text(text, encoding="utf-8")


# --- loading --------------------------------------------------------------------------------------------


def load_integers(checkpoint: Checkpoint, part: str) -> dict[str, dict[str, np.ndarray]]:
    """Layer → ``q`` int8 (unpacked, in the weight's shape), ``scale`` float16, maybe ``zero_point`` int8.

    A palettized layer has ``q`` uint8 and ``palette`` float16 alone. A layer whose input is rounded has
    ``input_scale`` () float16 and ``input_zero_point`` () uint8 as well.
    """
    state = _stored_state(checkpoint, part)
    keys = {"q": INTEGERS, "scale": SCALE, "zero_point": ZERO_POINT}
    keys |= {"palette": PALETTE} | {name: name for name in (INPUT_SCALE, INPUT_ZERO_POINT)}
    found = {}
    for name, stored in checkpoint.quantized_layers(part).items():
        tensors = {key: state[f"{name}.{end}"] for key, end in keys.items() if f"{name}.{end}" in state}
        if stored.bits == 4 and not stored.palette:
            tensors["q"] = unpack(tensors["q"])
        found[name] = {key: tensor.numpy() for key, tensor in tensors.items()}
    return found


def load_quantized(checkpoint: Checkpoint, part: str, make: Callable[[], nn.Module]) -> nn.Module:
    """The part's module with its quantized layers in place; ``make`` builds it, weights still to come.

    Raises CheckpointError when weights and config disagree.
    """
    module, state = make(), _stored_state(checkpoint, part)
    where = checkpoint.root / part
    layers = {name.removeprefix(_WRAPPER): layer for name, layer in quantizable_layers(module).items()}
    for name, stored in checkpoint.quantized_layers(part).items():
        if name not in layers:
            raise CheckpointError(f"checkpoint: {where}: quantized layer {name!r} is not one of the model's")
        q, scale = state.pop(f"{name}.{INTEGERS}"), state.pop(f"{name}.{SCALE}", None)
        palette = state.pop(f"{name}.{PALETTE}", None)
        scale, palette = (None if t is None else t.float() for t in (scale, palette))
        zero = state.pop(f"{name}.{ZERO_POINT}", None)
        grid = None
        if stored.activations:
            grid = state.pop(f"{name}.{INPUT_SCALE}").float(), state.pop(f"{name}.{INPUT_ZERO_POINT}")
        q = unpack(q) if stored.bits == 4 and not stored.palette else q
        try:
            replace_weight(layers[name], q, scale, zero, stored.bits, grid, palette)
        except ValueError as error:
            raise CheckpointError(f"checkpoint: {where}: quantized layer {name!r}: {error}") from error
    own = {name.removeprefix(_WRAPPER): name for name in module.state_dict()}
    given = {own.get(name, name): t.float() if t.is_floating_point() else t for name, t in state.items()}
    ends = (INTEGERS, SCALE, ZERO_POINT, PALETTE, INPUT_SCALE, INPUT_ZERO_POINT)
    try:
        missing, unexpected = module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"checkpoint: {where}: weights do not fit the config: {reason}") from error
    wrong = sorted([*(name for name in missing if not name.endswith(ends)), *unexpected])
    if wrong:
        raise CheckpointError(
            f"checkpoint: {where}: expected weights for every tensor of the model and no others, "
            f"{len(wrong)} are missing or unknown, the first {wrong[0]}"
        )
    return module.eval().requires_grad_(False)


def _stored_state(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    return {name: t for file in checkpoint.weight_files(part) for name, t in load_file(file).items()}
