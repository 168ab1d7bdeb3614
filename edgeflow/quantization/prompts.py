"""The prompts that a model is calibrated on. Torch-free."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import UnknownNameError, UsageError
from edgeflow.quantization.recipe import RECIPES

#: A shipped list of prompts, one a line, is ``recipes/<name>.txt``: training captions of a built-in model.
SUFFIX = ".txt"
#: A text encoder's moments taken over fewer prompts than this say more of these prompts than of language.
MIN_PROMPTS = 64


def builtin_prompts() -> list[str]:
    """Names of the lists of prompts shipped in the package."""
    return sorted(p.stem for p in RECIPES.glob(f"*{SUFFIX}"))


def calibration_prompts(checkpoint: Checkpoint, source: str | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The prompts, and the facts that a recipe records of them: name, number, sha256 of the text.

    ``source`` is a shipped list's name or a text file, one prompt a line; None is the list of the model's own
    name. Raises UnknownNameError, or UsageError for a model without a list or too few prompts.
    """
    if source is None and checkpoint.name not in builtin_prompts():
        raise UsageError(
            f"quantize: {checkpoint.name}: expected --calibration with a text file of prompts this model is "
            f"for, one a line; prompts are shipped for: {', '.join(builtin_prompts())}"
        )
    name = source or checkpoint.name
    path = RECIPES / f"{name}{SUFFIX}" if name in builtin_prompts() else Path(name)
    if not path.is_file():
        raise UnknownNameError(
            "calibration", name, [*builtin_prompts(), "the path of a text file of prompts"]
        )
    try:
        prompts = tuple(
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"quantize: {path}: expected a text file of prompts, got: {error}") from error
    if len(set(prompts)) < MIN_PROMPTS:
        raise UsageError(
            f"quantize: {path}: expected at least {MIN_PROMPTS} different prompts, got {len(set(prompts))}"
        )
    digest = sha256("\n".join(prompts).encode()).hexdigest()
    return prompts, {"prompts": path.stem, "num_prompts": len(prompts), "sha256": digest}
