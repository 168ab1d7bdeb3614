"""The untouched diffusers and transformers modules of a checkpoint: what every component is made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, ExportError

#: The classes a part of ``model_index.json`` may name.
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderTiny", "AutoencoderKL"),
}


def load_modules(checkpoint: Checkpoint) -> tuple[Any, Any, Any]:
    """The untouched text encoder, UNet and autoencoder, fp32, in eval mode; the model may need many steps.

    Raises ExportError for a part of a class edgeflow does not know, CheckpointError for weights that do not
    fit their config.
    """
    check_classes(checkpoint)
    text, unet, vae = (load_part(checkpoint, part) for part in ("text_encoder", "unet", "vae"))
    return text, unet, vae


def check_classes(checkpoint: Checkpoint) -> None:
    """Raise ExportError unless every part is of a class edgeflow exports. Reads no weights."""
    for part, known in CLASSES.items():
        name = checkpoint.class_name(part)
        if name not in known:
            raise ExportError(
                f"export: {checkpoint.name}: part {part!r}: expected a class edgeflow exports, got {name!r}; "
                f"known: {', '.join(known)}"
            )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Neither library's loading bars and config remarks: what matters is checked and raised."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, level, bar in zip(logs, before, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()


def load_part(checkpoint: Checkpoint, part: str) -> Any:
    """The part's module in eval mode, its float weights in fp32, its quantized layers as they are stored.

    Raises CheckpointError when weights and config disagree.
    """
    if checkpoint.quantization is None:
        return _load_float(checkpoint, part)
    from edgeflow.quantization.apply import load_quantized

    return load_quantized(checkpoint, part, lambda: _from_config(checkpoint, part))


def _from_config(checkpoint: Checkpoint, part: str) -> Any:
    """The part's module in fp32 as its config describes it; the weights are still to come."""
    import diffusers
    import transformers

    folder = checkpoint.root / part
    cls = getattr(transformers if part == "text_encoder" else diffusers, checkpoint.class_name(part))
    with quiet_libraries():
        try:
            if part == "text_encoder":
                return cls(cls.config_class.from_pretrained(folder)).float()
            return cls.from_config(cls.load_config(folder)).float()
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"checkpoint: {folder}: the config is not a model's: {reason}") from error


def _load_float(checkpoint: Checkpoint, part: str) -> Any:
    import diffusers
    import torch
    import transformers

    name = checkpoint.class_name(part)
    text = part == "text_encoder"
    cls = getattr(transformers if text else diffusers, name)
    options = {"dtype" if text else "torch_dtype": torch.float32, "variant": checkpoint.variant_of(part)}
    folder = checkpoint.root / part
    with quiet_libraries():
        try:
            model, info = cls.from_pretrained(
                folder, output_loading_info=True, use_safetensors=True, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"checkpoint: {folder}: {name} cannot be loaded: {reason}") from error
    wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if wrong:
        raise CheckpointError(
            f"checkpoint: {folder}: expected weights for every tensor of {name}, {len(wrong)} are missing "
            f"or of another shape, the first {wrong[0]}"
        )
    return model.eval().requires_grad_(False)
