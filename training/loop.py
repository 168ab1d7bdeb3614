"""The one training loop: every stage is an Objective that this loop drives.

A run folder holds::

    config.json      the resolved configuration
    metrics.jsonl    one line per ``log_every`` steps
    state.pt         raw and averaged weights, optimizer, random state, step: what --resume continues from
    checkpoint/      the averaged weights as a diffusers folder
    sheet.png        pictures drawn with them
    sheets/          step-000123.png, drawn on the way where asked for
    tensorboard/     the log again, where asked for

Of many processes the first writes; all of them take every step.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor, nn

from edgeflow.cli.options import show_progress
from edgeflow.errors import OutputExistsError, TrainingError
from edgeflow.staging import staged_file, staged_folder
from edgeflow.training.config import LoopConfig
from edgeflow.training.diagnosis import check_finite
from edgeflow.training.parallel import Processes
from edgeflow.training.state import METRICS, STATE, Log, load_state, save_state
from edgeflow.training.step import SETTLING_STEPS, Step


class Objective(Protocol):
    """One stage's subject: what is trained, the loss, and what is made of the result.

    Optional, used where they are there:

    - ``draw``: a :class:`~edgeflow.training.draw.Draw` that ``loss`` draws its batch with; without it a batch
      can be split neither over processes nor over ``accumulate``.
    - ``batch_keys(index) -> list[str]``: names of the examples ``index`` (int64, on the CPU).
    - ``prepare(done)``: called on the host before each step, outside a captured graph; what it does may
      depend on the number of steps done and nothing else, or a resumed run is another run. The number goes
      back once: to describe a step that was not finite.
    - ``adamw``: AdamW's options by module where they are not the loop's, ``rate`` a factor of its rate.
    """

    trained: nn.ModuleDict  # gradients are clipped for each of its modules alone
    averaged: nn.ModuleDict  # some or all of ``trained``'s modules, kept at the moving average of them

    def loss(self) -> dict[str, Tensor]:
        """Draw a batch and return scalars, each a mean over the batch; ``loss`` is what is minimised."""

    def draw_sheet(self, path: Path) -> None:
        """Draw pictures with the averaged weights."""

    def save(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint into the existing, empty ``folder``."""


def averaged_copy(trained: nn.ModuleDict) -> nn.ModuleDict:
    """A copy for the loop's moving average: eval mode, no gradients."""
    return copy.deepcopy(trained).eval().requires_grad_(False)


def train(objective: Objective, config: LoopConfig, out: Path, device: torch.device, resume: bool) -> None:
    """Drive ``objective`` to ``config.steps`` or ``config.minutes``, whichever comes first.

    The learning rate warms up, stays, and falls to zero over the last ``decay_fraction`` of the run. With
    ``resume`` the run continues from ``state.pt``, or from the start where none was kept yet; with more steps
    than before it goes on training. A run bounded by steps alone is the same run however often it was cut;
    under ``minutes`` the rate follows the clock. Raises TrainingError for a loss that is not finite, naming
    the step, its batch and the last state kept.
    """
    processes = Processes.current(device)
    step = Step(objective, config, processes)
    done = load_state(out, objective, step) if resume and (out / STATE).is_file() else 0
    processes.share([*objective.trained.state_dict().values(), *objective.averaged.state_dict().values()])
    processes.share_random_state()
    prepare: Callable[[int], None] = getattr(objective, "prepare", lambda done: None)
    clock, keeper = _Clock(processes, done, config), _Keeper(objective, config, out, step)
    with contextlib.closing(step), _Teller(config, out, done, processes.main) as teller:
        while done < config.steps:
            seconds = clock.seconds(done)
            used = max(done / config.steps, seconds / 60 / config.minutes if config.minutes else 0.0)
            if used >= 1.0:
                break
            prepare(done)
            rate = config.learning_rate * _rate_factor(done, used, config)
            step.run(done + 1, rate, _ema_decay(done, config))
            done += 1
            if done % config.log_every == 0 or done == config.steps:
                check_finite(step, objective, out)
                teller.tell(done, step.take_means(), rate, clock.began)
            if config.minutes:
                clock.agree(done, config.log_every)
            keeper.after(done)
        check_finite(step, objective, out)
    keeper.finish(done)
    processes.barrier()


def check_run(out: Path, *, force: bool, resume: bool) -> None:
    """Whether ``out`` can be this run's folder, before any work. Raises OutputExistsError, or TrainingError
    for a --resume where no run was begun. A run that was killed before it kept a state begins anew."""
    if resume and not ((out / STATE).is_file() or (out / "config.json").is_file()):
        raise TrainingError(f"resume: {out}: expected a run with {STATE} or config.json, found neither")
    if not resume and out.exists() and (out.is_file() or any(out.iterdir())) and not force:
        raise OutputExistsError(out)


def start_run(out: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Make the run folder and record the configuration."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"output: {out}: expected a writable folder, got: {error.strerror}") from error
    if not resume:
        for stale in (STATE, METRICS, "sheet.png"):
            (out / stale).unlink(missing_ok=True)
        for folder in ("checkpoint", "sheets", "tensorboard"):
            shutil.rmtree(out / folder, ignore_errors=True)
    with staged_file(out / "config.json") as file:
        file.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _rate_factor(done: int, used: float, config: LoopConfig) -> float:
    warmup = min(1.0, (done + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = min(1.0, (1.0 - used) / config.decay_fraction) if config.decay_fraction else 1.0
    return warmup * left


def _ema_decay(done: int, config: LoopConfig) -> float:
    """Short memory at first, so that the average forgets the initialisation."""
    return min(config.ema_decay, (1 + done) / (10 + done))


class _Clock:
    """Seconds of training since the call began, less its first steps where these compile and capture: minutes
    buy training. Many processes go by the first one's clock: it is read at :meth:`agree`, and
    between two readings every process adds the same time for each step."""

    def __init__(self, processes: Processes, done: int, config: LoopConfig):
        self.processes, self.first = processes, done
        self.free = done + (SETTLING_STEPS if config.compile or config.cuda_graph else 0)
        self.began, self.read, self.at, self.pace = time.monotonic(), 0.0, done, 0.0

    def seconds(self, done: int) -> float:
        if done < self.free:
            self.began, self.at = time.monotonic(), done
            return 0.0
        if self.processes.size == 1:
            return time.monotonic() - self.began
        return self.read + self.pace * (done - self.at)

    def agree(self, done: int, every: int) -> None:
        if done <= self.free or self.processes.size == 1 or (done - self.first > 10 and done % every):
            return
        now = time.monotonic() - self.began
        told = torch.tensor(
            [now, (now - self.read) / (done - self.at)], dtype=torch.float64, device=self.processes.device
        )
        self.processes.share([told])
        (self.read, self.pace), self.at = told.tolist(), done


class _Keeper:
    """Keeps states and draws sheets when they are due, in the first process alone."""

    def __init__(self, objective: Objective, config: LoopConfig, out: Path, step: Step):
        self.objective, self.config, self.out, self.step = objective, config, out, step
        self.saved = self.drawn = time.monotonic()

    def after(self, done: int) -> None:
        """What is due after this step."""
        if not self.step.processes.main or done == self.config.steps:
            return
        now, config = time.monotonic(), self.config
        if _due(done, config.save_steps, now - self.saved, config.save_minutes):
            check_finite(self.step, self.objective, self.out)
            save_state(self.out, self.objective, self.step, done)
            self.saved = time.monotonic()
        if _due(done, config.sheet_steps, now - self.drawn, config.sheet_minutes):
            (self.out / "sheets").mkdir(exist_ok=True)
            self._draw(self.out / "sheets" / f"step-{done:06d}.png")
            self.drawn = time.monotonic()

    def finish(self, done: int) -> None:
        """The last state, the checkpoint and the sheet."""
        if not self.step.processes.main:
            return
        save_state(self.out, self.objective, self.step, done)
        self.objective.averaged.eval()
        with staged_folder(self.out / "checkpoint", force=True) as folder:
            self.objective.save(folder)
        self._draw(self.out / "sheet.png")

    def _draw(self, path: Path) -> None:
        """A sheet must leave the random state of the run alone."""
        devices = [self.step.device] if self.step.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.objective.draw_sheet(path)


def _due(done: int, steps: int, seconds: float, minutes: float) -> bool:
    return bool((steps and done % steps == 0) or (minutes and seconds > 60 * minutes))


class _Teller:
    """The log and the progress bar, in the first process alone."""

    def __init__(self, config: LoopConfig, out: Path, done: int, main: bool):
        self.config, self.done = config, done
        self.log = Log(out, done, tensorboard=config.tensorboard) if main else None
        self.bar = _progress(main)
        self.task: TaskID = self.bar.add_task(out.name, total=config.steps, completed=done, note="")
        self.told = time.monotonic()

    def __enter__(self) -> _Teller:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
        if self.log is not None:
            self.log.__exit__(*exception)

    def tell(self, done: int, means: dict[str, float], rate: float, began: float) -> None:
        """Log the means of the steps since the last call, and show speed and time left. ``began`` is when the
        first steps were over that compile and capture."""
        if self.log is None:
            return
        now = time.monotonic()
        per_step = (now - self.told) / (done - self.done)
        speed = self.config.batch_size / per_step
        record = {"step": done, **means, "learning_rate": rate, "images_per_s": speed}
        record["seconds"] = now - began
        if torch.cuda.is_initialized():
            record["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.log.write(record)
        left = (self.config.steps - done) * per_step
        if self.config.minutes:
            left = min(left, max(0.0, 60 * self.config.minutes - (now - began)))
        note = f"loss {means['loss']:.4f}  {speed:,.0f}/s  {_span(left)} left"
        self.bar.update(self.task, completed=done, note=note)
        self.done, self.told = done, now


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _progress(main: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not (main and show_progress()),
    )
