"""Quantization-aware distillation: the one-step model learns to draw its own pictures with integers.

min E D(G(x₀ | text), G_q(x₀ | text)) over the weights and scales of G_q, which runs through integers in every
layer that a recipe quantizes (edgeflow.quantization.fake); G is the float model it started from, the noise x₀
is fresh at every step. D is a pseudo-Huber norm on latents and on pictures, plus the perceptual distance of
the pictures. All three components train, for all three hold integers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import ConfigError, TrainingError
from edgeflow.quantization.apply import PLACES, Trained, layers_of, plan_for, quantize_checkpoint
from edgeflow.quantization.fake import FakeQuantized, fake_quantize_layer, float_state
from edgeflow.quantization.layers import dequantize
from edgeflow.quantization.recipe import Plan, Recipe, parse_recipe
from edgeflow.quantization.schemes import FLOAT, SCHEMES
from edgeflow.spec import FIRST_TIMESTEP
from edgeflow.training.config import to_dict
from edgeflow.training.corpus import caption_states, encode_captions
from edgeflow.training.draw import Draw
from edgeflow.training.loop import averaged_copy
from edgeflow.training.losses import PerceptualDistance, check_choice, pseudo_huber
from edgeflow.training.models import load_parts
from edgeflow.training.qat_inputs import STARTS, QatConfig
from edgeflow.training.qat_start import Start, begin_at, gptq_start
from edgeflow.training.sampling import seeded_noise, to_uint8
from edgeflow.training.sheet import draw_sheet, sheet_prompts

#: Where a scale comes from: a parameter of its own, or the block's largest weight at every step.
SCALES = ("learned", "weights")
_SHEET_PROMPTS = 16


class QatObjective:
    """Trains a one-step model's integers towards the float model's own pictures."""

    def __init__(
        self,
        config: QatConfig,
        source: Checkpoint,
        recipe: Recipe,
        captions: Sequence[str],
        device: torch.device,
    ):
        if config.scales not in SCALES:
            raise ConfigError(f"config: scales: expected {' or '.join(SCALES)}, got {config.scales!r}")
        check_choice("start", config.start, STARTS)
        if config.start == "gptq" and config.scales != "learned":  # GPTQ's scales cut blocks' ends off
            raise ConfigError(f"config: start: gptq: expected scales to be learned, got {config.scales!r}")
        self.config, self.source, self.recipe, self.device = config, source, recipe, device
        self.captions = list(captions)
        self.draw = Draw(config.loop.batch_size, device)
        parts = load_parts(source.root)
        torch.manual_seed(config.loop.seed)
        self.latent_scale = float(parts.vae.config.scaling_factor)
        floats = {"text_encoder": parts.text_encoder, "unet": parts.unet, "vae": parts.vae}
        plan = plan_for(recipe, floats)
        start: Start = {}
        if config.start == "gptq":
            start = gptq_start(floats, plan, source, self.captions, config.start_pictures)
        self.text = caption_states(parts, self.captions, device)  # the teacher's, once
        self.ids = encode_captions(self.captions, parts.tokenizer_dir, device)
        unet = parts.unet.to(device, memory_format=torch.channels_last)
        vae = parts.vae.to(device, memory_format=torch.channels_last)
        self.shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        teacher = nn.ModuleDict({"unet": unet, "vae": vae})
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.layers = _fake_quantize(floats, recipe, plan, config.scales == "learned", start)
        self.trained = nn.ModuleDict(
            {"text_encoder": parts.text_encoder, "unet": unet, "decoder": vae.decoder}
        ).to(device)
        self.averaged = averaged_copy(self.trained)
        self.perceptual = PerceptualDistance().to(device) if config.perceptual_weight else None
        if config.loop.compile:  # the rest runs once a step without gradients, or is small
            self.trained["unet"].compile()
            self.trained["decoder"].compile()
            if self.perceptual is not None:
                self.perceptual.compile()

    def loss(self) -> dict[str, Tensor]:
        config = self.config
        index = self.draw.index(len(self.ids))
        noise = self.draw.normal(*self.shape)
        noise = noise.contiguous(memory_format=torch.channels_last)
        teacher, trained = self.teacher, self.trained
        with torch.no_grad():
            target = self._latent(teacher["unet"], self.text[index], noise)
        text = trained["text_encoder"](self.ids[index]).last_hidden_state
        drawn = self._latent(trained["unet"], text, noise)
        latent = pseudo_huber(drawn, target)
        losses = {"loss": config.latent_weight * latent, "latent": latent}
        if config.picture_weight or config.perceptual_weight:  # without, the decoder is only rounded
            with torch.no_grad():
                wanted = self._picture(teacher["vae"].decoder, target)
            picture = self._picture(trained["decoder"], drawn)
            losses["loss"] = losses["loss"] + config.picture_weight * pseudo_huber(picture, wanted)
            # of pictures in [0, 1]: −10·log₁₀ of it is the batch's PSNR
            losses["picture_mse"] = (picture - wanted).square().mean() / 4
            if self.perceptual is not None:
                losses["perceptual"] = self.perceptual(picture, wanted)
                losses["loss"] = losses["loss"] + config.perceptual_weight * losses["perceptual"]
        return losses

    def batch_keys(self, index: Tensor) -> list[str]:
        return [self.captions[i] for i in index.tolist()]

    def _latent(self, unet: nn.Module, text: Tensor, noise: Tensor) -> Tensor:
        """The one step from ``noise`` (N, C, h, w) under text states (N, L, D), float32."""
        t = torch.full((len(noise),), FIRST_TIMESTEP, device=self.device)
        return noise + unet(noise, t, text).sample.float()

    def _picture(self, decoder: nn.Module, latent: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1], float32."""
        return decoder(latent / self.latent_scale).float().clamp(-1, 1)

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """A quantized checkpoint: the averaged weights' integers, by the recipe with this run's record."""
        averaged = self.averaged
        weights = {name: float_state(averaged[name]) for name in ("text_encoder", "unet")}
        weights["vae"] = {f"decoder.{name}": t for name, t in float_state(averaged["decoder"]).items()}
        integers: dict[str, dict[str, Any]] = {component: {} for component in PLACES}
        for component, names in self.layers.items():
            for name, inner in names.items():
                layer = averaged[component].get_submodule(inner)
                assert isinstance(layer, FakeQuantized)
                integers[component][name] = _checked(layer, f"{component}: {name}")
        cpu = {
            part: {name: t.cpu().contiguous() for name, t in state.items()} for part, state in weights.items()
        }
        quantize_checkpoint(self.source, self._record(), folder, force=True, trained=Trained(cpu, integers))

    def _record(self) -> Recipe:
        """The recipe with how its integers were found; its rules are untouched."""
        raw = dict(self.recipe.raw)
        found_by = str(raw.get("found_by", "unknown"))
        raw.pop("rounding", None)  # the recipe's own way to choose integers, which training replaces
        raw["found_by"] = f"{found_by}; the integers by edgeflow train qat"
        raw["measured"] = {"training": to_dict(self.config), "captions": len(self.captions)}
        return parse_recipe(raw, self.recipe.name)

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """The float model's pictures above the integers', with the PSNR between them."""
        prompts = sheet_prompts(self.captions, _SHEET_PROMPTS)
        index = torch.tensor([self.captions.index(p) for p in prompts], device=self.device)
        noise = seeded_noise(torch.arange(len(prompts)), self.shape).to(self.device)
        averaged, teacher = self.averaged, self.teacher
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.loop.bf16):
            wanted = self._latent(teacher["unet"], self.text[index], noise)
            wanted = self._picture(teacher["vae"].decoder, wanted)
            text = averaged["text_encoder"](self.ids[index]).last_hidden_state
            drawn = self._latent(averaged["unet"], text, noise)
            drawn = self._picture(averaged["decoder"], drawn)
        psnr = -10 * ((drawn - wanted).square().mean((1, 2, 3)) / 4).log10()
        rows, labels = [], []
        for k in range(0, len(prompts), 8):
            rows += [wanted[k : k + 8], drawn[k : k + 8]]
            labels += [*prompts[k : k + 8], *(f"{p:.1f} dB" for p in psnr[k : k + 8].tolist())]
        draw_sheet(path, to_uint8(torch.cat(rows)), labels, columns=8)


def _fake_quantize(
    parts: dict[str, nn.Module], recipe: Recipe, plan: Plan, learned: bool, start: Start
) -> dict[str, dict[str, str]]:
    """Put the recipe's fake quantization into the parts, in place; layers in ``start`` begin at its integers.

    Returns component → layer's name in recipes → its name in the trained component's module. Raises
    ConfigError for a recipe that quantizes nothing, or activations.
    """
    taken = {scheme for schemes in plan.schemes.values() for scheme in schemes.values()} - {FLOAT}
    if wrong := sorted(name for name in taken if getattr(SCHEMES[name], "activations", False)):
        raise ConfigError(
            f"train qat: recipe {recipe.name}: expected schemes of weights alone, got {', '.join(wrong)}"
        )
    found: dict[str, dict[str, str]] = {}
    for component, (part, _) in PLACES.items():
        names = {id(module): name for name, module in parts[part].named_modules()}
        found[component] = {}
        for name, layer in layers_of(component, parts[part]).items():
            if (scheme := plan.schemes[component][name]) != FLOAT:
                begun = start.get((component, name))
                scale = None if begun is None else begin_at(layer, scheme, begun)
                fake_quantize_layer(layer, scheme, learned=learned, start=scale)
                inner = names[id(layer)]
                found[component][name] = inner.removeprefix("decoder.") if part == "vae" else inner
    if not any(found.values()):
        raise ConfigError(
            f"train qat: recipe {recipe.name}: expected a recipe that quantizes a layer, got none"
        )
    return found


def _checked(layer: FakeQuantized, where: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer's integers on the CPU. Raises TrainingError unless they are what the layer ran with."""
    q, scale, zero = layer.integers()
    q, scale, zero = q.cpu().contiguous(), scale.cpu(), None if zero is None else zero.cpu()
    if not torch.equal(
        dequantize(q, scale.half().float(), zero, SCHEMES[layer.scheme].bits), layer.seen_weight().cpu()
    ):
        raise TrainingError(f"train qat: {where}: the stored integers are not those that were trained")
    return q, scale, zero
