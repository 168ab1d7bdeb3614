"""What --resume continues from, and the logs that go with it."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeflow.errors import BackendMissing, TrainingError
from edgeflow.staging import staged_file
from edgeflow.training.step import Step

if TYPE_CHECKING:
    from edgeflow.training.loop import Objective

STATE, METRICS = "state.pt", "metrics.jsonl"


def save_state(out: Path, objective: Objective, step: Step, done: int) -> None:
    """Write ``state.pt`` whole or not at all: weights, optimizer, random state, sums not yet logged."""
    state: dict[str, Any] = {
        "step": done,
        "trained": objective.trained.state_dict(),
        "averaged": objective.averaged.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "rng_cpu": torch.get_rng_state(),
        "since_log": (step.count, step.sums),
    }
    if step.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state()
    with staged_file(out / STATE) as file:
        torch.save(state, file)


def load_state(out: Path, objective: Objective, step: Step) -> int:
    """Continue from ``state.pt``; returns its step. Raises TrainingError for a file that does not fit."""
    try:
        state = torch.load(out / STATE, map_location="cpu", weights_only=True)
        objective.trained.load_state_dict(state["trained"])
        objective.averaged.load_state_dict(state["averaged"])
        if "optimizer" in state:  # weights alone are a fresh start of the optimizer
            step.optimizer.load_state_dict(state["optimizer"])
            for group, rate in zip(step.optimizer.param_groups, step.rates, strict=True):
                group["lr"] = rate
    except (RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"resume: {out / STATE}: does not fit this run: {reason}") from error
    if "rng_cpu" in state:
        torch.set_rng_state(state["rng_cpu"])
    if step.device.type == "cuda" and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"])
    step.count, sums = state.get("since_log", (0, None))
    step.sums = None if sums is None else sums.to(step.device)
    return int(state["step"])


def last_step(out: Path) -> int | None:
    """The step of the state in ``out``, None where there is none."""
    if not (out / STATE).is_file():
        return None
    return int(torch.load(out / STATE, map_location="cpu", weights_only=True, mmap=True)["step"])


class Log:
    """``metrics.jsonl``, and TensorBoard's files where asked for; both go on after step ``done``.

    Lines after that step, whole or torn, are those of a process that was killed: they are dropped. Raises
    BackendMissing for TensorBoard that is not installed.
    """

    def __init__(self, out: Path, done: int, *, tensorboard: bool):
        self._keep(out / METRICS, done)
        self._file = (out / METRICS).open("a", encoding="utf-8")
        self._tracker = _tensorboard(out, done) if tensorboard else None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker.finish()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; ``step`` is its step."""
        values = {k: round(v, 6) for k, v in record.items()}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log({k: v for k, v in values.items() if k != "step"}, step=record["step"])

    def _keep(self, path: Path, done: int) -> None:
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= done:
                    kept.append(line + "\n")
        with staged_file(path) as file:
            file.write("".join(kept).encode())


def _tensorboard(out: Path, done: int) -> Any:
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendMissing("tensorboard", "tensorboard") from error
    from accelerate.tracking import TensorBoardTracker

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    tracker = TensorBoardTracker("tensorboard", out, purge_step=done + 1)
    tracker.start()
    return tracker
