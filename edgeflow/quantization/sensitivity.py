"""How much of the picture each layer costs: one layer quantized at a time, the error seen at the picture.

The one-step generator draws P prompts on fixed noise with every weight in float; then again with one layer's
weight dequantized from a scheme's integers. The mean squared difference of the pictures, in [0, 1], is the
layer's error under the scheme; or the distance of what a network of features sees in them, where noise that
hardly moves pixels can weigh the most. Only what comes after a layer is computed again: the float model's
text states and latents are kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import ConfigError
from edgeflow.loading import load_modules
from edgeflow.noise import gaussian_noise
from edgeflow.quantization.apply import PLACES, layers_of
from edgeflow.quantization.goal import FEATURE, PICTURE
from edgeflow.quantization.layers import dequantize
from edgeflow.quantization.schemes import FLOAT, SCHEMES, quantize
from edgeflow.tokenizer import ClipTokenizer

SCHEMA = 1
#: Pictures (P, 3, H, W) in [-1, 1] → what a network sees in them.
Features = Callable[[Tensor], Sequence[Tensor]]
#: What a layer may be stored as, besides float.
CANDIDATES = ("w8", "w4g32", "w4g32z")
#: Added to a prompt's number for the seed of noise that no search has seen.
FRESH = 1000


@dataclass(frozen=True)
class LayerErrors:
    """One layer: scheme → mean error of the pictures, for the schemes that divide it."""

    component: str
    layer: str
    shape: tuple[int, ...]
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """All layers of a model, in its own order, and what they were measured on."""

    model: str
    hash: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    float_values: int  # values of the graphs outside the layers: biases, norms, position embeddings
    layers: tuple[LayerErrors, ...]
    error: str = PICTURE  # what the errors are: mean squares of pictures in [0, 1], or distances of features

    def write(self, path: Path) -> None:
        text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Sensitivity:
        """Raises ConfigError for what ``write`` has not written."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("schema") != SCHEMA:
                raise ValueError(f"schema is not {SCHEMA}")
            layers = tuple(
                LayerErrors(x["component"], x["layer"], tuple(x["shape"]), dict(x["errors"]))
                for x in raw.pop("layers")
            )
            prompts, seeds = tuple(raw.pop("prompts")), tuple(raw.pop("seeds"))
            return cls(prompts=prompts, seeds=seeds, layers=layers, **raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"sensitivity: {path}: expected what a search has written, got: {error}"
            ) from error


class Painter:
    """A float one-step model that draws the same prompts again and again, some layers quantized.

    ``features`` maps pictures (P, 3, H, W) in [-1, 1] to tensors (P, C, h, w) of unit length over C.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[str],
        seeds: Sequence[int],
        features: Features | None = None,
    ):
        self._see = features
        self._text, self._unet, self._vae = load_modules(checkpoint)
        self._parts = {"text_encoder": self._text, "unet": self._unet, "vae": self._vae}
        self.spec = checkpoint.generation
        self._tokenizer = ClipTokenizer.from_folder(self.spec.tokenizer_dir)
        self.layers = {c: layers_of(c, self._parts[part]) for c, (part, _) in PLACES.items()}
        self.use(prompts, seeds)

    @torch.no_grad()
    def use(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Draw these prompts from now on, prompt i on the noise of seed i; every layer is float."""
        self.prompts, self.seeds = tuple(prompts), tuple(seeds)
        ids = np.concatenate([self._tokenizer.encode(p) for p in prompts])
        noise = np.concatenate([gaussian_noise(s, (1, *self.spec.latent_shape)) for s in seeds])
        self._ids, self._noise = torch.from_numpy(ids).long(), torch.from_numpy(noise)
        self._states = self._text(self._ids).last_hidden_state
        self._latent = self._latents(self._states)
        self.pictures = self._decoded(self._latent)
        self._seen: Sequence[Tensor] = () if self._see is None else self._see(self.pictures * 2 - 1)

    @property
    def float_values(self) -> int:
        """Values of the graphs that no scheme touches."""
        count = 0
        for component, (part, prefixes) in PLACES.items():
            weights = {id(layer.weight) for layer in self.layers[component].values()}
            named = self._parts[part].named_parameters()
            count += sum(p.numel() for n, p in named if n.startswith(prefixes) and id(p) not in weights)
        return count

    def error(self, plan: Mapping[str, Mapping[str, str]]) -> Tensor:
        """Mean squared error of each picture (P,), float64, under component → layer → scheme."""
        return self.errors(plan)[PICTURE]

    @torch.no_grad()
    def errors(self, plan: Mapping[str, Mapping[str, str]]) -> dict[str, Tensor]:
        """Errors of each picture (P,), float64, by what they are of: ``picture`` and, with features,
        ``feature``, the mean over positions of the squared difference, summed over the tensors."""
        with self._quantized(plan):
            if _changes(plan, "text_encoder"):
                latent = self._latents(self._text(self._ids).last_hidden_state)
            elif _changes(plan, "unet"):
                latent = self._latents(self._states)
            else:
                latent = self._latent
            drawn = self._decoded(latent)
        found = {PICTURE: (drawn - self.pictures).double().square().mean((1, 2, 3))}
        if self._see is not None:
            pairs = zip(self._see(drawn * 2 - 1), self._seen, strict=True)
            found[FEATURE] = sum((a - b).double().square().sum(1).mean((1, 2)) for a, b in pairs)
        return found

    def _latents(self, states: Tensor) -> Tensor:
        t = torch.tensor([self.spec.timestep])
        return (self._noise + self._unet(self._noise, t, states).sample) / self.spec.latent_scale

    def _decoded(self, latent: Tensor) -> Tensor:
        return (self._vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def _quantized(self, plan: Mapping[str, Mapping[str, str]]) -> Iterator[None]:
        kept = []
        try:
            for component, names in plan.items():
                for name, scheme in names.items():
                    if scheme != FLOAT:
                        layer = self.layers[component][name]
                        kept.append((layer, layer.weight.data))
                        layer.weight.data = seen(layer.weight.data, scheme)
            yield
        finally:
            for layer, weight in kept:
                layer.weight.data = weight


def seen(weight: Tensor, scheme: str) -> Tensor:
    """The weight that runs once it is stored by the scheme, rounded to nearest."""
    how = SCHEMES[scheme]
    return dequantize(*quantize(weight.contiguous(), how), how.bits)


def _changes(plan: Mapping[str, Mapping[str, str]], component: str) -> bool:
    return any(scheme != FLOAT for scheme in plan.get(component, {}).values())


def measure(
    painter: Painter,
    checkpoint: Checkpoint,
    progress: Callable[[str], None] = lambda step: None,
    error: str = PICTURE,
) -> Sensitivity:
    """Every layer under every candidate that divides its weight. Deterministic on one machine."""
    found: list[LayerErrors] = []
    count = sum(map(len, painter.layers.values()))
    for component, layers in painter.layers.items():
        for name, layer in layers.items():
            progress(f"layer {len(found) + 1} of {count}: {component} {name}")
            shape = tuple(layer.weight.shape)
            errors = {
                scheme: float(painter.errors({component: {name: scheme}})[error].mean())
                for scheme in CANDIDATES
                if SCHEMES[scheme].divides(shape)
            }
            found.append(LayerErrors(component, name, shape, errors))
    facts: dict[str, Any] = {"model": checkpoint.name, "hash": checkpoint.hash}
    return Sensitivity(
        prompts=painter.prompts,
        seeds=painter.seeds,
        float_values=painter.float_values,
        layers=tuple(found),
        error=error,
        **facts,
    )
