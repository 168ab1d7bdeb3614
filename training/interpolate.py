"""A model between two: each weight w_A + t · (w_B − w_A).

    python -m edgeflow.training.interpolate A B --weight 0.8 -o DIR

Two models that began as one (a teacher stopped early and the same one trained on, each with its own student)
can lie in one basin of the loss: what is between them draws as well as either, and joins what one of them
knows with what the other can do (Wortsman et al., arXiv 2109.01903 and 2203.05482). Two that did not begin as
one give noise, which no check here can see: measure what comes out (edgeflow quality).

UNet and text encoder are interpolated, in float32. Autoencoder and tokenizer must be the same in both: a
latent between two autoencoders is neither's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, EdgeflowError, UsageError
from edgeflow.loading import quiet_libraries
from edgeflow.staging import staged_folder
from edgeflow.training.models import load_parts, save_parts
from edgeflow.training.run import checkpoint_of

#: What both models must agree on, since no weight between them could make up for it.
_SAME = ("kind", "steps", "guidance")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def interpolate(
    a: str, b: str, weight: float, out: Path, *, dtype: str = "fp32", force: bool = False
) -> None:
    """Write the checkpoint that lies ``weight`` (0 to 1) of the way from ``a`` to ``b``.

    It has A's facts, with both models' names and hashes under ``training``. ``dtype`` is the stored weights',
    fp32 or fp16. Raises CheckpointError where the two do not fit together, UsageError, OutputExistsError.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"--weight: expected 0 to 1, got {weight:g}")
    first, second = (Checkpoint.open(str(checkpoint_of(Path(model)))) for model in (a, b))
    where = f"interpolate: {a} and {b}"
    _check_fit(first, second, where)
    with quiet_libraries(), staged_folder(out, force=force) as stage, torch.no_grad():
        parts, towards = load_parts(first.root), load_parts(second.root)
        _check_same(parts.vae.state_dict(), towards.vae.state_dict(), f"{where}: vae")
        for name in ("unet", "text_encoder"):
            _move(getattr(parts, name), getattr(towards, name), weight, f"{where}: {name}")
        for module in (parts.unet, parts.text_encoder, parts.vae):
            module.to(_DTYPES[dtype])
        save_parts(parts, stage, _facts(first, second, weight))


def _check_fit(first: Checkpoint, second: Checkpoint, where: str) -> None:
    """Raise CheckpointError naming what the two differ in that no weight stands for."""
    if first.kind == "autoencoder":
        raise CheckpointError(f"{where}: expected models that draw, got an autoencoder alone")
    for key in _SAME:
        mine, theirs = first.facts[key], second.facts[key]
        if mine != theirs:
            raise CheckpointError(f"{where}: {key}: expected the same in both, got {mine!r} and {theirs!r}")
    if first.latent_scale != second.latent_scale:
        raise CheckpointError(
            f"{where}: vae: expected the same scaling_factor, got {first.latent_scale} and "
            f"{second.latent_scale}"
        )
    mine, theirs = ({p.name: p.read_bytes() for p in c.files("tokenizer")} for c in (first, second))
    wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if wrong:
        raise CheckpointError(f"{where}: tokenizer: expected the same files in both, but {wrong[0]} differs")


def _check_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    _check_shapes(mine, theirs, where)
    wrong = sorted(name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name]))
    if wrong:
        raise CheckpointError(f"{where}: expected the same weights in both, but {wrong[0]} differs")


def _check_shapes(mine: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    shapes = [{name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (mine, theirs)]
    for name in sorted(mine.keys() | theirs.keys()):
        got = [shape.get(name, "none") for shape in shapes]
        if got[0] != got[1]:
            raise CheckpointError(
                f"{where}: expected the same shapes in both, got {got[0]} and {got[1]} for {name}"
            )


def _move(module: nn.Module, towards: nn.Module, weight: float, where: str) -> None:
    """Every floating-point tensor of ``module``, in place."""
    mine, theirs = module.state_dict(), towards.state_dict()
    _check_shapes(mine, theirs, where)
    for name, tensor in mine.items():
        if tensor.is_floating_point():
            tensor.lerp_(theirs[name], weight)


def _facts(first: Checkpoint, second: Checkpoint, weight: float) -> dict[str, Any]:
    ends = [{"name": c.name, "hash": c.hash, "training": c.facts.get("training")} for c in (first, second)]
    facts = {k: v for k, v in first.facts.items() if k not in ("schema", "parts")}
    return {**facts, "training": {"interpolated": {"weight": weight, "between": ends}}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeflow.training.interpolate",
        description="Write the model that lies between two which began as one.",
        epilog="example: python -m edgeflow.training.interpolate runs/a runs/b --weight 0.8 -o runs/between",
    )
    parser.add_argument("a", metavar="A", help="checkpoint at weight 0, whose facts are kept")
    parser.add_argument("b", metavar="B", help="checkpoint at weight 1")
    parser.add_argument("--weight", type=float, required=True, metavar="T", help="0 is A, 1 is B")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="fp32", help="of the weights on disk")
    parser.add_argument("--force", action="store_true", help="replace an output that already exists")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    try:
        interpolate(given.a, given.b, given.weight, given.out, dtype=given.dtype, force=given.force)
    except EdgeflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
