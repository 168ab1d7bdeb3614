"""How much of a batch's gradient is signal: how alike two batches' gradients are, for each term of the loss.

    python -m edgeflow.training.gradient_noise emoji --recipe w4g32 --prompts captions.txt --batch-size 8

The cosine of two batches' gradients is S²/(S² + N²), with S the length of the mean gradient and N that of a
batch's noise about it, whose square falls as one over the batch's size.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from torch import Tensor

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import EdgeflowError
from edgeflow.quantization.recipe import read_recipe
from edgeflow.training.pairs import read_prompts
from edgeflow.training.presets import PRESETS
from edgeflow.training.qat import QatObjective

#: Terms of the loss, as the settings weigh them.
TERMS = ("latent", "picture", "perceptual")


def agreement(objective: QatObjective, batches: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Term → trained module → mean length of its gradient, mean cosine over the pairs of ``batches`` batches.

    Batch b is drawn from the random state of seed b, the same for every term.
    """
    config = objective.config
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for term in TERMS:
        weights: dict[str, Any] = {f"{name}_weight": float(name == term) for name in TERMS}
        objective.config = dataclasses.replace(config, **weights)
        drawn = [_gradients(objective, seed) for seed in range(batches)]
        found[term] = {
            name: (
                mean(float(g[name].norm()) for g in drawn),
                mean(_cosine(a[name], b[name]) for a, b in itertools.combinations(drawn, 2)),
            )
            for name in objective.trained
        }
    objective.config = config
    return found


def _gradients(objective: QatObjective, seed: int) -> dict[str, Tensor]:
    """Module → its gradient as one vector."""
    torch.manual_seed(seed)
    objective.trained.zero_grad(set_to_none=True)
    objective.loss()["loss"].backward()
    return {
        name: torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()]
        )
        for name, module in objective.trained.items()
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-30))


@click.command()
@click.argument("model")
@click.option("--recipe", default="w4g32", show_default=True, metavar="NAME|FILE")
@click.option("--prompts", required=True, type=click.Path(path_type=Path), metavar="FILE")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--batches", type=click.IntRange(2), default=4, show_default=True)
@click.option("--preset", default="emoji", show_default=True, help="Preset of the loss.")
def main(model: str, recipe: str, prompts: Path, batch_size: int, batches: int, preset: str) -> None:
    """Print how alike the gradients of MODEL's quantization-aware loss are from batch to batch."""
    try:
        config = PRESETS[preset]["qat"]
        loop = dataclasses.replace(config.loop, batch_size=batch_size, compile=False)
        config = dataclasses.replace(config, loop=loop)
        captions = sorted(set(read_prompts(prompts)))
        source, rules = Checkpoint.open(model), read_recipe(recipe)
        objective = QatObjective(config, source, rules, captions, torch.device("cpu"))
    except EdgeflowError as error:
        raise SystemExit(f"Error: {error}") from error
    print("| term | module | gradient's length | cosine between batches |\n|---|---|---:|---:|")
    for term, modules in agreement(objective, batches).items():
        for name, (length, cosine) in modules.items():
            print(f"| {term} | {name} | {length:.3f} | {cosine:.3f} |")


if __name__ == "__main__":
    main()
