"""LoRAs fused into weights: W + scale·(alpha/rank)·B·A; diffusers reads the file and translates its names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, UsageError
from edgeflow.weights import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

    #: A (rank, in, …), B (out, rank, …), alpha/rank.
    Matrices = tuple[Tensor, Tensor, float]

#: (tensor name, fp32 tensor) → fp32 tensor.
Change = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how much of it is added."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:SCALE``. Raises UsageError for a scale that is no number, or no such file."""
        name, colon, scale = text.rpartition(":")
        if not colon or Path(text).is_file():
            name, scale = text, "1"
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", scale):
            raise UsageError(f"--lora: {text}: expected FILE or FILE:SCALE, got the scale {scale!r}")
        if not Path(name).is_file() or Path(name).suffix != ".safetensors":
            raise UsageError(f"--lora: {name}: expected a safetensors file, found none")
        return cls(Path(name), float(scale))


def read_lora(lora: Lora) -> dict[str, dict[str, Matrices]]:
    """Part → module → A, B and alpha/rank, as diffusers reads and names the file's tensors.

    Raises CheckpointError for a truncated file, for DoRA, and for names that diffusers cannot translate.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    odd = sorted(n for n in read_safetensors_header(lora.path) if "dora_scale" in n or "magnitude" in n)
    if odd:
        raise CheckpointError(f"lora: {lora.path}: expected a LoRA, got a DoRA (tensor {odd[0]})")
    try:
        tensors, alphas, metadata = Mixin.lora_state_dict(
            str(lora.path), use_safetensors=True, local_files_only=True, return_lora_metadata=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise CheckpointError(f"lora: {lora.path}: expected kohya's or diffusers' names: {reason}") from error
    strengths = {_peft_name(k.removesuffix(".alpha")): float(v) for k, v in (alphas or {}).items()}
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, half = _split(_peft_name(name), name, lora.path)
        halves.setdefault(module, {})[half] = tensor.float()
    found: dict[str, dict[str, Matrices]] = {}
    strengths = {k.partition(".lora_")[0]: v for k, v in strengths.items()}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"lora: {lora.path}: {module}: expected two matrices, got {sorted(pair)}")
        part, _, inner = module.partition(".")
        rank = pair["A"].shape[0]
        alpha = strengths.get(module) or _stated_alpha(metadata or {}, part, inner, rank)
        root = (metadata or {}).get(f"{part}.use_rslora")
        strength = alpha / (rank**0.5 if root else rank)
        found.setdefault(part, {})[inner.removeprefix("text_model.")] = (pair["A"], pair["B"], strength)
    return found


def _stated_alpha(metadata: dict[str, Any], part: str, module: str, rank: int) -> float:
    """Alpha as peft's own record in the file has it; the rank, which adds B·A as it is, where it has none."""
    pattern = metadata.get(f"{part}.alpha_pattern") or {}
    own = next((v for k, v in pattern.items() if module == k or module.endswith("." + k)), None)
    return float(own if own is not None else metadata.get(f"{part}.lora_alpha") or rank)


def _peft_name(name: str) -> str:
    """diffusers' older spellings of a LoRA tensor → peft's, by diffusers' own tables."""
    from diffusers.utils import state_dict_utils as tables

    table = tables.DIFFUSERS_OLD_TO_PEFT if name.startswith("text_encoder") else tables.UNET_TO_DIFFUSERS
    return str(next(iter(tables.convert_state_dict({name: None}, table))))


def _split(name: str, written: str, path: Path) -> tuple[str, str]:
    """``unet.….to_q.lora_A.weight`` → module and half."""
    match = re.fullmatch(r"((?:unet|text_encoder)\..+)\.lora_([AB])(?:\.default\w*)?\.weight", name)
    if not match:
        raise CheckpointError(
            f"lora: {path}: tensor {written!r}: expected a matrix of a module of unet or text_encoder"
        )
    return match[1], match[2]


def fuse(
    lora: Lora,
    deltas: dict[str, Matrices],
    part: str,
    source: Checkpoint,
    unmatched: list[str],
) -> Change:
    """Adds scale·(alpha/rank)·B·A to the weights of the modules named; the rest goes to ``unmatched``."""
    shapes = {
        _module(name): t.shape for name, t in source.stored_tensors(part).items() if name.endswith("weight")
    }
    fitting = {}
    for module, (a, b, strength) in deltas.items():
        shape = shapes.get(module)
        if shape is not None and shape[0] == b.shape[0] and shape[1:2] == tuple(a.shape[1:2]):
            fitting[module] = (a, b, strength * lora.scale)
        else:
            unmatched.append(
                f"lora {lora.path.name}: {part}.{module}: "
                + (
                    "no such module"
                    if shape is None
                    else f"expected {shape}, got {tuple(b.shape)} × {tuple(a.shape)}"
                )
            )
    if not fitting:
        raise CheckpointError(
            f"lora: {lora.path}: expected modules of {source.name}'s {part}, none of {len(deltas)} matches; "
            f"the first is {next(iter(deltas))}"
        )

    def change(name: str, tensor: Tensor) -> Tensor:
        found = fitting.get(_module(name)) if name.endswith("weight") else None
        if found is None:
            return tensor
        a, b, strength = found
        delta = b.flatten(1) @ a.flatten(1)  # (out, rank) · (rank, in·kernel)
        return tensor + strength * delta.reshape(tensor.shape)

    return change


def _module(name: str) -> str:
    """The module of a stored tensor; transformers wrote the prefix text_model. before 5.6."""
    return name.removeprefix("text_model.").removesuffix(".weight").removesuffix(".bias")
