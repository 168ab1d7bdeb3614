"""The stages of the paper's table: each an ``edgeflow train`` in a process of its own, kept once finished."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import TrainingError, UnknownNameError, UsageError
from edgeflow.training.config import resolve
from edgeflow.training.dataset import open_dataset
from edgeflow.training.presets import PRESETS
from edgeflow.training.run import checkpoint_of, pick_device

_LOG = logging.getLogger("edgeflow")

#: Noise seeds of one table seed's pairs lie this far from the next one's.
_PAIR_SEEDS = 100_000_000


@dataclass(frozen=True)
class Plan:
    """One seed's table: what it is made from and with."""

    data: Path
    teacher: Path  # a run folder or a checkpoint, of kind diffusion
    out: Path
    seed: int
    preset: str
    device: str
    minutes: float  # of reflow and of distillation, each
    target_steps: int  # Euler steps of the 2-rectified flow to a target; 0: the teacher's pictures
    pairs: Path | None = None  # drawn before; None: drawn as the first stage
    overrides: tuple[str, ...] = ()

    @property
    def pairs_folder(self) -> Path:
        return self.pairs or self.out / "pairs"


@dataclass(frozen=True)
class Stage:
    """One run: its folder's name and the arguments of ``edgeflow train`` less the output."""

    name: str
    arguments: tuple[str, ...]


def stages(plan: Plan) -> list[Stage]:
    """The stages in order. Raises ConfigError for an override that reflow or distillation does not know."""
    steps = {
        stage: resolve(PRESETS[plan.preset][stage], None, plan.overrides, {}).loop.steps
        for stage in ("reflow", "distill")
    }
    settings = [word for override in plan.overrides for word in ("--set", override)]
    own = ["--set", f"target_steps={plan.target_steps}"]
    reflow = str(plan.out / "reflow")

    def trained(name: str, stage: str, source: str, share: float, num_steps: int, more: list[str]) -> Stage:
        begun = [stage, "--from", source, "--pairs", str(plan.pairs_folder), "--steps", str(num_steps)]
        timed = ["--minutes", str(round(share * plan.minutes, 4)), "--seed", str(plan.seed)]
        return Stage(name, (*begun, *timed, *_common(plan), *settings, *more))

    first = []
    if plan.pairs is None:
        begun = ["pairs", "--data", str(plan.data), "--from", str(plan.teacher)]
        first = [Stage("pairs", (*begun, "--seed", str(plan.seed * _PAIR_SEEDS), *_common(plan)))]
    teacher, one = str(plan.teacher), steps["distill"]
    small = [*own, "--set", "student=small"]
    return [
        *first,
        trained("reflow", "reflow", teacher, 1, steps["reflow"], []),
        trained("distilled", "distill", reflow, 1, one, own),
        trained("direct", "distill", teacher, 2, steps["reflow"] + one, ["--set", "target_steps=0"]),
        trained("small", "distill", reflow, 2 / 3, one, small),
    ]


def _common(plan: Plan) -> list[str]:
    return ["--preset", plan.preset, "--device", plan.device, "--force"]


def check_plan(plan: Plan) -> None:
    """Everything that can be told before any work. Raises EdgeflowError."""
    if plan.preset not in PRESETS:
        raise UnknownNameError("preset", plan.preset, PRESETS)
    stages(plan)
    checkpoint = Checkpoint.open(checkpoint_of(plan.teacher))
    if checkpoint.kind != "diffusion":
        raise UsageError(f"table: --teacher {plan.teacher}: expected kind diffusion, got {checkpoint.kind}")
    open_dataset(plan.data)
    if plan.pairs is not None and not plan.pairs.is_dir():
        raise UsageError(f"table: --pairs {plan.pairs}: expected a folder of pairs, found none")
    pick_device(plan.device)


def run_stages(plan: Plan, *, force: bool) -> None:
    """Run every stage that is not finished. Raises TrainingError for one that fails, UsageError for one
    that was finished with other settings; ``force`` begins all of them anew."""
    todo = stages(plan)
    if not force:
        for stage in todo:  # before an hour's work, not after it
            _is_finished(stage, plan)
    for stage in todo:
        if force or not _is_finished(stage, plan):
            _run(stage, plan)


def _run(stage: Stage, plan: Plan) -> None:
    _LOG.info(f"table: seed {plan.seed}: {stage.name}")
    plan.out.mkdir(parents=True, exist_ok=True)
    stamp = _stamp(stage, plan)
    stamp.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "edgeflow.cli", "train", *stage.arguments, "-o", str(plan.out / stage.name)]
    began = time.monotonic()
    code = subprocess.run(argv, stdout=subprocess.DEVNULL).returncode
    if code:
        raise TrainingError(f"table: {stage.name}: expected to finish, got exit code {code}; see above")
    record = {"arguments": _portable(stage, plan), "wall_seconds": round(time.monotonic() - began, 1)}
    stamp.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _stamp(stage: Stage, plan: Plan) -> Path:
    return plan.out / f"{stage.name}.stage.json"


def _portable(stage: Stage, plan: Plan) -> list[str]:
    """The arguments as they are wherever the folder lies."""
    return [a.replace(str(plan.out), "OUT") for a in stage.arguments]


def _is_finished(stage: Stage, plan: Plan) -> bool:
    stamp = _stamp(stage, plan)
    if not stamp.is_file():
        return False
    got = json.loads(stamp.read_text(encoding="utf-8"))["arguments"]
    if got != _portable(stage, plan):
        raise UsageError(
            f"table: {stamp}: finished with other settings: {' '.join(got)}; expected "
            f"{' '.join(_portable(stage, plan))}; give another -o/--out, or --force to begin anew"
        )
    return True


def record_of(name: str, plan: Plan) -> dict[str, Any]:
    """What a stage cost: its own log's seconds, the process's wall time, steps and pictures seen."""
    run = plan.out / name
    steps, seconds = logged(run / "metrics.jsonl")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    stamp = json.loads((plan.out / f"{name}.stage.json").read_text(encoding="utf-8"))
    batch = config["loop"]["batch_size"]
    return {
        "seconds": seconds,
        "wall_seconds": stamp["wall_seconds"],
        "steps": steps,
        "batch_size": batch,
        "pictures": steps * batch,
    }


def logged(metrics: Path) -> tuple[int, float]:
    """Steps and seconds of a log; a resumed run's seconds begin again at each call and are added up."""
    if not metrics.is_file():
        return 0, 0.0
    steps, before, last = 0, 0.0, 0.0
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        seconds = float(record.get("seconds", 0.0))
        if seconds < last:
            before += last
        last, steps = seconds, int(record.get("step", steps))
    return steps, round(before + last, 1)
