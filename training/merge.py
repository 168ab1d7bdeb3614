"""One model out of several that began as one: each weight the sum of theirs, times a number for each model.

    python -m edgeflow.training.merge runs/late runs/early runs/early-distill --weights 0.9 0.9 -0.8 -o merged

Models that were trained on from the same weights can lie in one basin of the loss. Then the mean of two
joins what one knows with what the other can do (Wortsman et al., arXiv 2109.01903 and 2203.05482), and what
a stage changed in one, the difference of two checkpoints, does much the same to another (task arithmetic:
Ilharco et al., arXiv 2212.04089). The example does both: a tenth of the way from one model to another, and
0.8 times what the other's last stage had changed. Models that did not begin as one give noise, which no
check here can see: measure what comes out (edgeflow quality).

UNet and text encoder are summed, in float32. Autoencoder and tokenizer must be the same in all: a latent
between two autoencoders is neither's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, EdgeflowError, UsageError
from edgeflow.loading import quiet_libraries
from edgeflow.staging import staged_folder
from edgeflow.training.models import Parts, load_parts, save_parts
from edgeflow.training.run import checkpoint_of

#: What the models must agree on, since no weight stands for it.
_SAME = ("kind", "steps", "guidance")
_SUMMED = ("unet", "text_encoder")
#: Keys of a transformers config that say how it was written.
_NOT_ARITHMETIC = ("architectures", "dtype", "torch_dtype", "transformers_version")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def merge(
    models: Sequence[str], weights: Sequence[float], out: Path, *, dtype: str = "fp32", force: bool = False
) -> None:
    """Write the checkpoint Σ ``weights[i]`` · ``models[i]``; a model is whatever ``--from`` takes.

    It has the first one's facts, with every model's name, hash and weight under ``training``. ``dtype`` is
    the stored weights', fp32 or fp16. Raises UsageError unless there is a weight for each of two models or
    more and they sum to 1, CheckpointError where models do not fit together, OutputExistsError.
    """
    _check_weights(models, weights)
    checkpoints = [Checkpoint.open(str(checkpoint_of(Path(model)))) for model in models]
    for checkpoint in checkpoints:
        _check_fit(checkpoints[0], checkpoint)
    with quiet_libraries(), staged_folder(out, force=force) as stage, torch.no_grad():
        parts = load_parts(checkpoints[0].root)
        if parts.prediction != "epsilon":  # the scheduler that save_parts writes is of our own teachers
            raise CheckpointError(
                f"merge: {checkpoints[0].root}: expected ε-prediction, got {parts.prediction}"
            )
        for name in _SUMMED:
            for tensor in _floats(parts, name).values():
                tensor *= weights[0]
        for other, weight in zip(checkpoints[1:], weights[1:], strict=True):
            _add(parts, load_parts(other.root), weight, f"merge: {checkpoints[0].root} and {other.root}")
        _cast(parts, dtype)
        save_parts(parts, stage, _facts(checkpoints, weights))


def _cast(parts: Parts, dtype: str) -> None:
    """Raises CheckpointError where a sum leaves the range of ``dtype``."""
    for name in (*_SUMMED, "vae"):
        getattr(parts, name).to(_DTYPES[dtype])
        for key, tensor in _floats(parts, name).items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"merge: {name}: {key}: expected finite {dtype} weights, got others")


def _check_weights(models: Sequence[str], weights: Sequence[float]) -> None:
    if len(models) < 2 or len(models) != len(weights):
        raise UsageError(
            f"--weights: expected one for each of two models or more, got {len(weights)} for {len(models)}"
        )
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):  # NaN is close to nothing
        raise UsageError(f"--weights: expected a sum of 1, got {sum(weights):g}")


def _check_fit(first: Checkpoint, other: Checkpoint) -> None:
    """Raise CheckpointError naming what the two differ in that no weight stands for."""
    where = f"merge: {first.root} and {other.root}"
    if other.kind == "autoencoder":
        raise CheckpointError(f"{where}: expected models that draw, got an autoencoder alone")
    facts = [{**{key: c.facts[key] for key in _SAME}, "latent scale": c.latent_scale} for c in (first, other)]
    for key, value in facts[0].items():
        if value != facts[1][key]:
            raise CheckpointError(
                f"{where}: {key}: expected the same in both, got {value!r} and {facts[1][key]!r}"
            )
    mine, theirs = ({p.name: p.read_bytes() for p in c.files("tokenizer")} for c in (first, other))
    wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if wrong:
        raise CheckpointError(f"{where}: tokenizer: expected the same files in both, but {wrong[0]} differs")


def _add(parts: Parts, others: Parts, weight: float, where: str) -> None:
    """Add ``weight`` times the other model to ``parts``, in place."""
    for part in (*_SUMMED, "vae"):
        _check_config(_config(parts, part), _config(others, part), f"{where}: {part}")
    mine, theirs = _floats(parts, "vae"), _floats(others, "vae")
    wrong = sorted(name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name]))
    if wrong:
        raise CheckpointError(f"{where}: vae: expected the same weights in both, but {wrong[0]} differs")
    for part in _SUMMED:
        mine, theirs = _floats(parts, part), _floats(others, part)
        for name, tensor in mine.items():
            tensor.add_(theirs[name], alpha=weight)


def _floats(parts: Parts, name: str) -> dict[str, Tensor]:
    """A part's own tensors by name, less the integers (positions)."""
    return {k: v for k, v in getattr(parts, name).state_dict().items() if v.is_floating_point()}


def _config(parts: Parts, name: str) -> dict[str, str]:
    """What a part's config says of its arithmetic, defaults filled in by its library."""
    config = getattr(parts, name).config
    known = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {
        k: json.dumps(v, default=str) for k, v in known.items() if k[0] != "_" and k not in _NOT_ARITHMETIC
    }


def _check_config(mine: dict[str, str], theirs: dict[str, str], where: str) -> None:
    """Equal shapes are not enough: heads, groups and activations leave none in the weights."""
    for key in sorted(mine.keys() | theirs.keys()):
        got = [config.get(key, "none") for config in (mine, theirs)]
        if got[0] != got[1]:
            raise CheckpointError(f"{where}: {key}: expected the same in both, got {got[0]} and {got[1]}")


def _facts(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> dict[str, Any]:
    merged = [
        {"name": c.name, "hash": c.hash, "weight": weight, "training": c.facts.get("training")}
        for c, weight in zip(checkpoints, weights, strict=True)
    ]
    facts = {k: v for k, v in checkpoints[0].facts.items() if k not in ("schema", "parts")}
    return {**facts, "training": {"merged": merged}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeflow.training.merge",
        description="Write the weighted sum of models that began as one.",
        epilog="example: python -m edgeflow.training.merge runs/late runs/early --weights 0.8 0.2 -o merged",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, checkpoint folder or built-in name")
    parser.add_argument(
        "--weights", nargs="+", type=float, required=True, metavar="W", help="one a model; they sum to 1"
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="fp32", help="of the weights on disk")
    parser.add_argument("--force", action="store_true", help="replace an output that already exists")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    try:
        merge(given.models, given.weights, given.out, dtype=given.dtype, force=given.force)
    except EdgeflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
