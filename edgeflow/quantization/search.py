"""The search behind ``edgeflow quantize --budget-mib`` and its kin: measure, allocate, and measure again.

Layers are measured on the model's own prompts, or on those given, prompt i on the noise of seed i. The
allocations are then drawn as they are, on the same noise, which shows how far errors add up, and on noise
that the search has not seen, which is what a limit on the drop is held against.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import UsageError
from edgeflow.quantization.allocate import MIB, Allocation, Allocator, recipe_of
from edgeflow.quantization.goal import FEATURE, PICTURE, Goal
from edgeflow.quantization.recipe import Recipe
from edgeflow.quantization.sensitivity import FRESH, Features, Painter, Sensitivity, measure

#: Allocations on the curve, the one asked for apart.
POINTS = 6
SENSITIVITY, CURVE, RECIPE = "sensitivity.json", "curve.json", "recipe.json"


@dataclass(frozen=True)
class Point:
    """One allocation, as predicted and as drawn. PSNR in dB is of the mean squared error over the prompts;
    feature distances are the mean over the prompts, None without a network that sees them."""

    size_mib: float
    average_bits: float
    predicted_psnr_db: float | None  # if the layers' errors added up; None where these are of features
    psnr_db: float  # on the noise the layers were measured on
    fresh_psnr_db: float
    fresh_worst_psnr_db: float  # of the worst prompt
    predicted_feature: float | None = None
    feature: float | None = None
    fresh_feature: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Found:
    """The recipe, and the curve of size against quality with the chosen point on it."""

    recipe: Recipe
    curve: tuple[Point, ...]
    sensitivity: Sensitivity

    def write(self, folder: Path) -> None:
        """recipe.json, curve.json and sensitivity.json into the existing ``folder``."""
        self.sensitivity.write(folder / SENSITIVITY)
        curve = [dataclasses.asdict(point) for point in self.curve]
        for name, value in ((RECIPE, self.recipe.raw), (CURVE, curve)):
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def search(
    checkpoint: Checkpoint,
    goal: Goal,
    name: str,
    *,
    num_prompts: int,
    given: Sequence[str] | None = None,
    features: Features | None = None,
    measured: Sensitivity | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Found:
    """The recipe for ``goal``, called ``name``. ``measured`` saves measuring the layers again.

    Layers are measured on the first ``num_prompts`` of the prompts ``given``, or else of the model's own, by
    the pictures or, with ``features``, by what these see in them. Raises UsageError for a goal that cannot
    be reached or more prompts than there are, or where ``measured`` is of another model, prompts or error.
    """
    own = tuple(checkpoint.generation.prompts)
    there = own if given is None else tuple(given)
    if not 1 <= num_prompts <= len(there):
        whose = "the model's own" if given is None else "those given"
        raise UsageError(f"--num-prompts: expected 1 to {len(there)}, {whose}, got {num_prompts}")
    prompts, seeds = there[:num_prompts], tuple(range(num_prompts))
    error = PICTURE if features is None else FEATURE
    if measured is not None:
        _check_measured(measured, checkpoint, prompts, error)
    progress("loading the checkpoint")
    painter = Painter(checkpoint, prompts, seeds, features)
    sensitivity = measured or measure(painter, checkpoint, progress, error)
    allocator = Allocator(sensitivity)
    fresh = tuple(FRESH + seed for seed in range(len(own)))
    allocations = _curve(allocator)
    if goal.budget_mib is not None:
        chosen = allocator.under_bytes(int(goal.budget_mib * MIB))
    elif goal.average_bits is not None:
        chosen = allocator.under_bits(goal.average_bits)
    else:
        assert goal.drop is not None
        progress("looking for the fewest bytes")
        painter.use(own, fresh)
        chosen = _smallest(allocator, painter, *goal.drop)
        painter.use(prompts, seeds)
    progress("drawing the allocations")
    curve = _drawn({*allocations, chosen}, chosen, painter, sensitivity, (own, fresh))
    point = dataclasses.asdict(next(p for p in curve if p.chosen))
    facts = {k: v for k, v in point.items() if k != "chosen" and v is not None}
    where = "at the picture" if error == PICTURE else "in features of the picture"
    whose = f"of {checkpoint.name}" if given is None else "of a list"
    found_by = (
        f"edgeflow quantize: {goal}; each layer's error {where} on {num_prompts} prompts {whose}, "
        f"noise seeds 0 to {num_prompts - 1}; integer programming"
    )
    record = {"model": checkpoint.name, "hash": checkpoint.hash, **facts}
    return Found(recipe_of(chosen, sensitivity, name, found_by, record), curve, sensitivity)


def _check_measured(
    measured: Sensitivity, checkpoint: Checkpoint, prompts: tuple[str, ...], error: str
) -> None:
    """Raises UsageError unless this is what the search would measure."""
    if (measured.hash, measured.prompts) != (checkpoint.hash, prompts):
        raise UsageError(
            f"sensitivity: expected one of {checkpoint.name}, {checkpoint.hash[:12]}…, on {len(prompts)} of "
            f"its prompts, got one of {measured.model}, {measured.hash[:12]}…, on {len(measured.prompts)}"
        )
    if measured.error != error:
        raise UsageError(
            f"sensitivity: expected errors of the {error}, as the goal is, got errors of the {measured.error}"
        )


def _curve(allocator: Allocator) -> list[Allocation]:
    """Allocations from the least bytes to those of 8 bits and a little, evenly."""
    least = allocator.least_bytes
    most = allocator.of(["w8" if "w8" in x.errors else "float" for x in allocator.sensitivity.layers]).bytes
    return [allocator.under_bytes(least + (most - least) * i // (POINTS - 1)) for i in range(POINTS)]


def _smallest(allocator: Allocator, painter: Painter, metric: str, limit: float) -> Allocation:
    """The fewest bytes whose pictures hold the limit: bisection on the allowed sum of errors."""

    def holds(allocation: Allocation) -> bool:
        errors = painter.errors(allocation.plan(allocator.sensitivity))
        if metric == FEATURE:
            return float(errors[FEATURE].mean()) <= limit
        error = errors[PICTURE]
        return _psnr(float(error.max() if metric == "worst_psnr" else error.mean())) >= limit

    best = allocator.under_error(0.0)  # all float, which draws the float model's own picture
    low, high = 0.0, None
    allowed = max(limit, 1e-9) if metric == FEATURE else 10 ** (-limit / 10)
    for _ in range(9):
        tried = allocator.under_error(allowed)
        if holds(tried):
            low = allowed
            best = min(best, tried, key=lambda a: a.bytes)
            if tried.bytes == allocator.least_bytes:
                break
        else:
            high = allowed
        if high is None:
            allowed *= 4
        else:
            allowed = math.sqrt(low * high) if low else high / 4
    return best


def _drawn(
    allocations: set[Allocation],
    chosen: Allocation,
    painter: Painter,
    sensitivity: Sensitivity,
    fresh: tuple[tuple[str, ...], tuple[int, ...]],
) -> tuple[Point, ...]:
    """The allocations by size, drawn on the search's noise and on fresh noise."""
    ordered = sorted(allocations, key=lambda a: (a.bytes, a.error))
    plans = [a.plan(sensitivity) for a in ordered]
    same = [painter.errors(plan) for plan in plans]
    painter.use(*fresh)
    other = [painter.errors(plan) for plan in plans]
    features = sensitivity.error == FEATURE
    return tuple(
        Point(
            size_mib=round(a.bytes / MIB, 4),
            average_bits=round(a.average_bits, 4),
            predicted_psnr_db=None if features else _psnr(a.error),
            psnr_db=_psnr(float(here[PICTURE].mean())),
            fresh_psnr_db=_psnr(float(there[PICTURE].mean())),
            fresh_worst_psnr_db=_psnr(float(there[PICTURE].max())),
            predicted_feature=round(a.error, 6) if features else None,
            feature=_mean(here.get(FEATURE)),
            fresh_feature=_mean(there.get(FEATURE)),
            chosen=a == chosen,
        )
        for a, here, there in zip(ordered, same, other, strict=True)
    )


def _mean(errors: Tensor | None) -> float | None:
    return None if errors is None else round(float(errors.mean()), 6)


def _psnr(error: float) -> float:
    """dB of a mean squared error of pictures in [0, 1]; 200 for none, which JSON can hold."""
    return round(-10 * math.log10(error), 2) if error > 1e-20 else 200.0
