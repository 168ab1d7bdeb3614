"""The one training loop: every stage is an Objective that this loop drives.

A run folder holds::

    config.json      the resolved configuration
    metrics.jsonl    one line per ``log_every`` steps
    state.pt         raw and averaged weights, optimizer, random state, step: what --resume continues from
    checkpoint/      the averaged weights as a diffusers folder
    sheet.png        pictures drawn with them
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from edgeflow.cli.options import show_progress
from edgeflow.errors import OutputExistsError, TrainingError
from edgeflow.staging import staged_folder
from edgeflow.training.config import LoopConfig

_EAGER_STEPS = 3  # run before a CUDA graph is captured: allocations, compilation and cuDNN's choices settle


class Objective(Protocol):
    """One stage's subject: what is trained, the loss, and what is made of the result."""

    trained: nn.ModuleDict
    averaged: nn.ModuleDict  # those to be kept; the loop keeps each at the moving average of its ``trained``
    # And, where a module wants other AdamW options than the rest: adamw: {name: {"rate": factor, "betas": …}}

    def loss(self) -> dict[str, Tensor]:
        """Draw a batch with the default generator and return scalars; ``loss`` is what is minimised."""

    def draw_sheet(self, path: Path) -> None:
        """Draw pictures with the averaged weights."""

    def save(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint into the existing, empty ``folder``."""


def averaged_copy(trained: nn.ModuleDict) -> nn.ModuleDict:
    """A copy for the loop's moving average: eval mode, no gradients."""
    return copy.deepcopy(trained).eval().requires_grad_(False)


class Step:
    """One optimizer step: loss, backward, clip, AdamW, moving average; replayed as one CUDA graph if asked.

    Everything stays on the device: the batch is drawn inside, losses are summed into ``sums`` and read only
    when logged, so no step waits for the host.
    """

    def __init__(self, objective: Objective, config: LoopConfig, device: torch.device):
        self.objective, self.config, self.device = objective, config, device
        self.average = list(objective.averaged.parameters())
        self.weights = [p for name in objective.averaged for p in objective.trained[name].parameters()]
        self.factors: list[float] = []  # of the learning rate, by parameter group
        self.rates: list[Tensor] = []
        self.decay = torch.tensor(0.0, device=device)
        self.groups = self._groups()
        self.optimizer = torch.optim.AdamW(
            self.groups,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
            capturable=config.cuda_graph,
        )
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_left = _EAGER_STEPS

    def _groups(self) -> list[dict[str, Any]]:
        """A parameter group for each module, with the options that the objective names for it."""
        groups: list[dict[str, Any]] = []
        for name, module in self.objective.trained.items():
            options = dict(getattr(self.objective, "adamw", {}).get(name, {}))
            self.factors.append(options.pop("rate", 1.0))
            self.rates.append(torch.tensor(self.config.learning_rate, device=self.device))
            params = [p for p in module.parameters() if p.requires_grad]
            groups.append({"params": params, "lr": self.rates[-1], **options})
        return groups

    def run(self, rate: float, decay: float) -> None:
        """Take one step at this learning rate and decay of the average."""
        for tensor, factor in zip(self.rates, self.factors, strict=True):
            tensor.fill_(rate * factor)
        self.decay.fill_(decay)
        if not self.config.cuda_graph:
            self._step()
        elif self._eager_left:
            self._eager_left -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()

    def _capture(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients live in the graph's own pool
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16, cache_enabled=False):
            losses = self.objective.loss()
        losses["loss"].backward()
        # Each module by itself: a discriminator's gradients must not shrink the generator's.
        norms = [nn.utils.clip_grad_norm_(g["params"], self.config.clip_norm) for g in self.groups]
        norm = torch.stack(norms).square().sum().sqrt()
        self.optimizer.step()
        with torch.no_grad():
            # average ← decay·average + (1 − decay)·weights
            kept = torch._foreach_mul(self.average, self.decay)
            new = torch._foreach_mul(self.weights, 1.0 - self.decay)
            torch._foreach_copy_(self.average, torch._foreach_add(kept, new))
            values = torch.stack([v.detach().float() for v in losses.values()] + [norm.float()])
            if self.sums is None:
                self.names = [*losses, "grad_norm"]
                self.sums = torch.zeros_like(values)
            self.sums.add_(values)

    def take_means(self, count: int) -> dict[str, float]:
        """Means over the ``count`` steps since the last call; waits for the device."""
        assert self.sums is not None
        means = (self.sums / count).tolist()
        self.sums.zero_()
        return dict(zip(self.names, means, strict=True))


def train(objective: Objective, config: LoopConfig, out: Path, device: torch.device, resume: bool) -> None:
    """Drive ``objective`` to ``config.steps`` or ``config.minutes``, whichever comes first.

    The learning rate warms up, stays, and falls to zero over the last ``decay_fraction`` of the run. With
    ``resume`` the run continues from ``state.pt``; with more steps than before it goes on training.
    Raises TrainingError for a non-finite loss, naming the step and the last state kept.
    """
    step = Step(objective, config, device)
    done = _load_state(out, objective, step, device) if resume else 0
    started = saved = logged = time.monotonic()
    since_log = 0
    with _progress() as bar, (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
        task = bar.add_task(out.name, total=config.steps, completed=done, note="")
        while done < config.steps:
            minutes = (time.monotonic() - started) / 60
            used = max(done / config.steps, minutes / config.minutes if config.minutes else 0.0)
            if used >= 1.0:
                break
            rate = config.learning_rate * _rate_factor(done, used, config)
            step.run(rate, _ema_decay(done, config))
            done, since_log = done + 1, since_log + 1
            if done % config.log_every == 0 or done == config.steps:
                means = step.take_means(since_log)
                now = time.monotonic()
                speed = since_log * config.batch_size / (now - logged)
                record = {"step": done, **means, "learning_rate": rate, "images_per_s": speed}
                record["seconds"] = now - started
                log.write(json.dumps({k: round(v, 6) for k, v in record.items()}) + "\n")
                log.flush()
                _check_finite(means, done, out)
                bar.update(task, completed=done, note=f"loss {means['loss']:.4f}  {speed:,.0f}/s")
                since_log, logged = 0, now
                if now - saved > 60 * config.save_minutes:
                    _save_state(out, objective, step, done)
                    saved = time.monotonic()
    if since_log:
        _check_finite(step.take_means(since_log), done, out)
    _save_state(out, objective, step, done)
    objective.averaged.eval()
    with staged_folder(out / "checkpoint", force=True) as folder:
        objective.save(folder)
    objective.draw_sheet(out / "sheet.png")


def check_run(out: Path, *, force: bool, resume: bool) -> None:
    """Whether ``out`` can be this run's folder, before any work. Raises OutputExistsError, or TrainingError
    for a --resume without a state to continue from."""
    if resume and not (out / "state.pt").is_file():
        raise TrainingError(f"resume: {out}: expected a run with state.pt, found none")
    if not resume and out.exists() and (out.is_file() or any(out.iterdir())) and not force:
        raise OutputExistsError(out)


def start_run(out: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Make the run folder and record the configuration."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"output: {out}: expected a writable folder, got: {error.strerror}") from error
    if not resume:
        for stale in ("state.pt", "metrics.jsonl", "sheet.png"):
            (out / stale).unlink(missing_ok=True)
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rate_factor(done: int, used: float, config: LoopConfig) -> float:
    warmup = min(1.0, (done + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = min(1.0, (1.0 - used) / config.decay_fraction) if config.decay_fraction else 1.0
    return warmup * left


def _ema_decay(done: int, config: LoopConfig) -> float:
    """Short memory at first, so that the average forgets the initialisation."""
    return min(config.ema_decay, (1 + done) / (10 + done))


def _check_finite(means: dict[str, float], done: int, out: Path) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        kept = (
            f"the last good state is {out / 'state.pt'}"
            if (out / "state.pt").is_file()
            else "no state was kept"
        )
        raise TrainingError(f"training: {out.name}: {', '.join(bad)} not finite by step {done}; {kept}")


def _save_state(out: Path, objective: Objective, step: Step, done: int) -> None:
    state: dict[str, Any] = {
        "step": done,
        "trained": objective.trained.state_dict(),
        "averaged": objective.averaged.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "rng_cpu": torch.get_rng_state(),
    }
    if step.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state()
    partial = out / "state.pt.partial"
    torch.save(state, partial)
    partial.replace(out / "state.pt")


def _load_state(out: Path, objective: Objective, step: Step, device: torch.device) -> int:
    try:
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        objective.trained.load_state_dict(state["trained"])
        objective.averaged.load_state_dict(state["averaged"])
        if "optimizer" in state:  # weights alone are a fresh start of the optimizer
            step.optimizer.load_state_dict(state["optimizer"])
            for group, rate in zip(step.optimizer.param_groups, step.rates, strict=True):
                group["lr"] = rate
    except (RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"resume: {out / 'state.pt'}: does not fit this run: {reason}") from error
    if "rng_cpu" in state:
        torch.set_rng_state(state["rng_cpu"].cpu())
    if device.type == "cuda" and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"].cpu())
    return int(state["step"])


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not show_progress(),
    )
