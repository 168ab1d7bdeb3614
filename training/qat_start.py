"""Where quantization-aware distillation starts: the integers that calibration chose, with room to move.

Rounding to nearest starts from weights and their own scales. GPTQ's integers draw nearer pictures, but a
weight in the middle of its step has half a step to go before anything changes. So each weight is put where it
was, or as near to it as its integer allows: rounded to nearest it gives GPTQ's integer; one that GPTQ moved
lies nearer to the border that it crossed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.quantization.apply import PLACES, layers_of
from edgeflow.quantization.calibration import SEED, Calibration, Solved, solve_layers
from edgeflow.quantization.layers import dequantize
from edgeflow.quantization.recipe import GPTQ, Plan
from edgeflow.quantization.schemes import SCHEMES, Scheme

#: How far from its integer a weight may lie, in steps: at 0.5 the first step's noise would undo GPTQ.
REACH = 0.3

Start = Mapping[tuple[str, str], Solved]


def gptq_start(
    parts: Mapping[str, nn.Module], plan: Plan, source: Checkpoint, captions: Sequence[str], pictures: int
) -> Start:
    """(component, layer) → GPTQ's integers and biases, for the layers that have inputs.

    ``parts`` are the float text_encoder, unet and vae on the CPU, which stay as they are; pictures are drawn
    of captions spread evenly over those given.
    """
    step = max(1, len(captions) // max(1, 8 * pictures))
    drawn = Calibration(tuple(captions[::step]), pictures, SEED)
    layers = {component: layers_of(component, parts[part]) for component, (part, _) in PLACES.items()}
    solved = solve_layers(
        parts, layers, plan.schemes, GPTQ, source.generation, drawn, progress=lambda step: None
    )
    tables = {
        (component, name)
        for component, found in layers.items()
        for name, layer in found.items()
        if isinstance(layer, nn.Embedding)  # rounded to nearest: every entry is its own output
    }
    return {key: result for key, result in solved.items() if key not in tables}


@torch.no_grad()
def begin_at(layer: Any, scheme: str, solved: Solved) -> tuple[Tensor, Tensor | None]:
    """Put a float layer's weight within reach of these integers, and its bias at theirs, in place.

    Returns the scale (float32) and zero point (int8 or None) that the weight is then seen with.
    """
    how, found = SCHEMES[scheme], solved.solution
    layer.weight.copy_(_near(layer.weight.detach().cpu(), how, found.q, found.scale, found.zero_point))
    if solved.bias is not None:
        layer.bias.copy_(solved.bias)
    return found.scale, found.zero_point


def _near(weight: Tensor, how: Scheme, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The nearest weight that rounds to ``q``."""
    middle = dequantize(q, scale, zero, how.bits)
    wide = dequantize(torch.ones_like(q), scale, None, how.bits)
    return middle + (weight - middle).clamp(-REACH * wide, REACH * wide)
