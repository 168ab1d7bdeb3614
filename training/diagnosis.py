"""What stopped a run: the step, its batch, and which of its examples are to blame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgeflow.errors import TrainingError
from edgeflow.training.state import STATE, last_step
from edgeflow.training.step import Step

if TYPE_CHECKING:
    from edgeflow.training.loop import Objective

_KEYS_NAMED = 8  # of a bad batch, in the message
_CULPRITS = 3  # looked for


def check_finite(step: Step, objective: Objective, out: Path) -> None:
    """Raises TrainingError if a step was not finite; weights are still those before it."""
    found = step.first_bad()
    if found is None:
        return
    number, names, index = found
    kept = last_step(out)
    state = "no state was kept" if kept is None else f"the last good state is {out / STATE}, of step {kept}"
    batch = "" if index is None else _describe(step, objective, number, index)
    raise TrainingError(
        f"training: {out.name}: {', '.join(names)} not finite at step {number}{batch}; {state}"
    )


def _describe(step: Step, objective: Objective, number: int, index: Tensor) -> str:
    name = getattr(objective, "batch_keys", None)
    if name is None:
        return ""
    getattr(objective, "prepare", lambda done: None)(number - 1)
    keys = list(dict.fromkeys(name(index)))
    more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
    said = f", on the batch of {', '.join(keys[:_KEYS_NAMED])}{more}"
    if alone := culprits(step, objective, index):
        said += f"; not finite by itself: {', '.join(name(torch.tensor(alone)))}"
    return said


def culprits(step: Step, objective: Objective, index: Tensor) -> list[int]:
    """Examples of ``index`` whose loss alone is not finite under the present weights and new noise, found by
    halving; the first few. Empty when only the batch as it was drawn did it."""
    assert step.draw is not None
    distinct = index.unique()
    waiting, found = list(distinct.split(step.draw.size))[::-1], []
    while waiting and len(found) < _CULPRITS:
        some = waiting.pop()
        if _finite(step, objective, some):
            continue
        if len(some) == 1:
            found.append(int(some))
        else:
            waiting += some.tensor_split(2)[::-1]
    return found


def _finite(step: Step, objective: Objective, examples: Tensor) -> bool:
    """Whether a batch of these examples, repeated to the usual size, has finite losses."""
    draw = step.draw
    assert draw is not None
    draw.begin()
    repeats = -(-draw.size // len(examples))
    draw.only = examples.repeat(repeats)[: draw.size].to(step.device)
    try:
        with torch.no_grad(), step.autocast():
            losses = objective.loss()
    finally:
        draw.only = None
    return all(bool(torch.isfinite(v).all()) for v in losses.values())
