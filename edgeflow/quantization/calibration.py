"""Integers, and the grids of activations, chosen by what a layer is fed.

One pass of calibration pictures through the model and the quantized model is enough.

Both run side by side as the two halves of one batch: the first half through the float weights, the second
through the quantized ones. When the pass reaches a layer, its inputs as both models have them are there, the
layer is solved (edgeflow.quantization.gptq) and the pass goes on with its integers. So every layer knows
what all earlier ones have lost, and the model is run once.

Inputs are prompts and noise of fixed seeds. The text encoder, which is cheap and sees little variety, gets
all prompts; picture i is drawn of prompt i, again from the first when they run out, from the noise of seed
``seed`` + i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.noise import gaussian_noise
from edgeflow.quantization.gptq import Moments, Solution, solve
from edgeflow.quantization.layers import dequantize, quantize_activation
from edgeflow.quantization.recipe import NEAREST
from edgeflow.quantization.schemes import SCHEMES, activation_range, quantize
from edgeflow.spec import FIRST_TIMESTEP, GenerationSpec
from edgeflow.tokenizer import ClipTokenizer

#: Input columns of a layer that its moments are taken over, at most; even parts of every picture.
MAX_COLUMNS = 16384
#: Calibration picture i has the noise of seed SEED + i, far from the seeds that users and gates draw with.
SEED = 1_000_000
#: Pictures unless told otherwise.
PICTURES = 64
#: The decoder's activations are the largest by far: so many pictures are enough for it.
DECODER_PICTURES = 16


@dataclass(frozen=True)
class Calibration:
    """What the calibration pictures are drawn from."""

    prompts: tuple[str, ...]
    pictures: int
    seed: int


@dataclass(frozen=True)
class Solved:
    """A layer's integers and, where it has one, the bias that goes with them."""

    solution: Solution
    bias: Tensor | None = None
    input_grid: tuple[Tensor, Tensor] | None = None  # scale and zero point of its input, where it has them


def solve_layers(
    modules: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, nn.Module]],
    schemes: Mapping[str, Mapping[str, str]],
    method: str,
    spec: GenerationSpec,
    calibration: Calibration,
    progress: Callable[[str], None],
) -> dict[tuple[str, str], Solved]:
    """(component, layer) → its integers, for every layer that has a scheme and that the pass reaches.

    ``modules`` are the untouched text_encoder, unet and vae; ``layers`` and ``schemes`` are by component and
    layer's name. The modules are as they were when this returns.
    """
    solved: dict[tuple[str, str], Solved] = {}
    total = sum(how in SCHEMES for plan in schemes.values() for how in plan.values())
    replaced: list[nn.Module] = []

    def keep(component: str, name: str) -> Callable[[Solved], None]:
        def done(result: Solved) -> None:
            solved[component, name] = result
            progress(f"rounding {component}: layer {len(solved)} of {total}")

        return done

    for component, plan in schemes.items():
        for name, how in plan.items():
            if how in SCHEMES:
                layer = layers[component][name]
                layer.forward = _Twin(layer, how, method, keep(component, name))  # type: ignore[assignment]
                replaced.append(layer)
    try:
        with torch.no_grad():
            _draw(modules, spec, calibration)
    finally:
        for layer in replaced:
            del layer.forward
    return solved


def _draw(modules: Mapping[str, Any], spec: GenerationSpec, calibration: Calibration) -> None:
    """The whole model on the calibration's inputs, each of them twice: see the module's docstring."""
    tokenizer, count = ClipTokenizer.from_folder(spec.tokenizer_dir), calibration.pictures
    ids = torch.cat([torch.as_tensor(tokenizer.encode(p)).long() for p in calibration.prompts])
    noises = [gaussian_noise(calibration.seed + i, (1, *spec.latent_shape)) for i in range(count)]
    noise = torch.cat([torch.as_tensor(n) for n in noises]).repeat(2, 1, 1, 1)
    hidden = modules["text_encoder"](ids.repeat(2, 1)).last_hidden_state.unflatten(0, (2, len(ids)))
    hidden = hidden[:, [i % len(ids) for i in range(count)]].flatten(0, 1)
    times = torch.full((2 * count,), FIRST_TIMESTEP)
    velocity = modules["unet"](noise, times, encoder_hidden_states=hidden).sample
    few = min(count, DECODER_PICTURES)
    latent = ((noise + velocity) / spec.latent_scale).unflatten(0, (2, count))[:, :few].flatten(0, 1)
    modules["vae"].decode(latent)


class _Twin:
    """Stands in for a layer's forward: float weights for the first half of a batch, integers for the rest."""

    def __init__(self, layer: Any, how: str, method: str, done: Callable[[Solved], None]):
        self.layer, self.how, self.method, self.done = layer, how, method, done
        self.result: Solved | None = None
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer, count = self.layer, len(x) // 2
        if self.result is None:
            self.result = solve_layer(layer, self.how, self.method, x[:count], x[count:])
            s = self.result.solution
            self.weight = dequantize(s.q, s.scale, s.zero_point, SCHEMES[self.how].bits)
            self.done(self.result)
        assert self.weight is not None
        if isinstance(layer, nn.Embedding):
            return torch.cat((F.embedding(x[:count], layer.weight), F.embedding(x[count:], self.weight)))
        first = _apply(layer, x[:count], layer.weight, layer.bias)
        second, bias = x[count:], layer.bias if self.result.bias is None else self.result.bias
        if self.result.input_grid is not None:
            second = quantize_activation(second, *self.result.input_grid)
        return torch.cat((first, _apply(layer, second, self.weight, bias)))


def solve_layer(layer: Any, how: str, method: str, floats: Tensor, quantized: Tensor) -> Solved:
    """One layer's integers, and its bias, from its inputs in the float and in the quantized model.

    A table that is looked up is rounded to nearest: every entry is its own output.
    """
    weight = layer.weight.detach().float()
    if isinstance(layer, nn.Embedding):
        return Solved(Solution(*quantize(weight, SCHEMES[how])))
    grid = None
    if SCHEMES[how].activations:
        grid = activation_range(quantized)
        quantized = quantize_activation(quantized, *grid)
    if method == NEAREST:
        return Solved(Solution(*quantize(weight, SCHEMES[how])), None, grid)
    x, y = _columns(layer, floats), _columns(layer, quantized)
    mean_x, mean_y = (t.double().mean(1) if layer.bias is not None else None for t in (x, y))
    if mean_x is not None and mean_y is not None:
        x, y = x - mean_x[:, None].float(), y - mean_y[:, None].float()
    solution = solve(weight, SCHEMES[how], Moments(x @ y.T / x.shape[1], y @ y.T / y.shape[1]))
    if mean_x is None or mean_y is None:
        return Solved(solution, None, grid)
    new = dequantize(solution.q, solution.scale, solution.zero_point, SCHEMES[how].bits)
    moved = weight.flatten(1).double() @ mean_x - new.flatten(1).double() @ mean_y
    return Solved(solution, (layer.bias.detach().double() + moved).float(), grid)


def _columns(layer: Any, x: Tensor) -> Tensor:
    """A layer's input as the columns (K, M) that its matrix meets, thinned out evenly to MAX_COLUMNS."""
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        return flat[_chosen(len(flat), MAX_COLUMNS)].T.contiguous()
    columns = []
    for i, picture in enumerate(x):
        patches = F.unfold(picture[None], layer.kernel_size, layer.dilation, _padding(layer), layer.stride)[0]
        columns.append(patches[:, _chosen(patches.shape[1], max(1, MAX_COLUMNS // len(x)), seed=i)])
    return torch.cat(columns, 1)


def _chosen(available: int, wanted: int, seed: int = 0) -> Tensor:
    """``wanted`` indices below ``available``, always the same ones; all of them where there are no more."""
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values


def _padding(layer: Any) -> tuple[int, ...]:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"expected a convolution padded with zeros by numbers, got {layer}")
    return layer.padding


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
