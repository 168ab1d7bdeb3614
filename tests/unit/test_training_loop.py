"""The loop on a small objective: it learns, resumes to the same bits, and stops on what is not finite."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeflow.errors import OutputExistsError, TrainingError
from edgeflow.training import loop
from edgeflow.training.config import LoopConfig
from edgeflow.training.loop import averaged_copy, check_run, start_run, train
from edgeflow.training.parallel import Processes

CONFIG = LoopConfig(steps=12, batch_size=16, learning_rate=1e-2, warmup_steps=2, log_every=4)


class Regression:
    """Fits y = 3x; the batch comes from the default generator, as every stage's does."""

    def __init__(self, poison_at: int | None = None):
        torch.manual_seed(0)
        self.trained = nn.ModuleDict({"net": nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))})
        self.averaged = averaged_copy(self.trained)
        self.calls, self.poison_at = 0, poison_at

    def loss(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        x = torch.randn(16, 1)
        loss = (self.trained["net"](x) - 3 * x).square().mean()
        return {"loss": loss * float("nan") if self.calls == self.poison_at else loss}

    def draw_sheet(self, path: Path) -> None:
        path.write_bytes(b"sheet")

    def save(self, folder: Path) -> None:
        torch.save(self.averaged.state_dict(), folder / "weights.pt")


def run(out: Path, config: LoopConfig, *, resume: bool = False, poison_at: int | None = None) -> Regression:
    objective = Regression(poison_at)
    check_run(out, force=False, resume=resume)
    start_run(out, dataclasses.asdict(config), resume=resume)
    train(objective, config, out, torch.device("cpu"), resume)
    return objective


def test_a_resumed_run_ends_at_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", CONFIG)
    run(tmp_path / "parts", dataclasses.replace(CONFIG, steps=5))
    torch.manual_seed(99)  # the random state must come from the saved run
    parts = run(tmp_path / "parts", CONFIG, resume=True)
    for name in ("trained", "averaged"):
        first, second = getattr(whole, name).state_dict(), getattr(parts, name).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(whole.trained["net"][0].weight, whole.averaged["net"][0].weight)
    lines = [json.loads(x) for x in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [4, 5, 8, 12]


def test_the_loss_falls(tmp_path: Path) -> None:
    run(tmp_path / "run", dataclasses.replace(CONFIG, steps=300, log_every=100))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]


def test_the_average_is_the_recurrence(tmp_path: Path) -> None:
    """Recomputed from the definition over the same weights: d = min(decay, (1 + n)/(10 + n))."""
    seen: list[torch.Tensor] = []

    class Watched(Regression):
        def loss(self) -> dict[str, torch.Tensor]:
            seen.append(self.trained["net"][0].weight.detach().clone())
            return super().loss()

    objective, config = Watched(), dataclasses.replace(CONFIG, ema_decay=0.3)
    start_run(tmp_path / "run", {}, resume=False)
    train(objective, config, tmp_path / "run", torch.device("cpu"), False)
    average = seen[0]
    for n, weight in enumerate([*seen[1:], objective.trained["net"][0].weight.detach()]):
        decay = min(0.3, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(objective.averaged["net"][0].weight, average)


def test_a_loss_that_is_not_finite_stops_the_run_and_writes_no_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="loss, grad_norm not finite at step 6; no state was kept"):
        run(out, CONFIG, poison_at=6)
    assert not (out / "checkpoint").exists() and not (out / "state.pt").exists()


def test_resuming_what_is_not_there_or_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected a run with state"):
        run(tmp_path / "none", CONFIG, resume=True)
    run(tmp_path / "run", CONFIG)
    with pytest.raises(OutputExistsError):
        run(tmp_path / "run", CONFIG)
    whole = (tmp_path / "run" / "state.pt").read_bytes()
    (tmp_path / "run" / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match="does not fit this run"):
        run(tmp_path / "run", CONFIG, resume=True)


def test_minutes_begin_after_the_steps_that_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of compiling and capturing is not a minute of training; without either every step counts."""
    now = iter(range(0, 6000, 60))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(now))
    alone = Processes.current(torch.device("cpu"))
    compiled = loop._Clock(alone, 10, LoopConfig(100, 8, 1e-3, compile=True))
    assert [compiled.seconds(done) for done in range(10, 16)] == [0, 0, 0, 0, 60, 120]
    eager = loop._Clock(alone, 10, LoopConfig(100, 8, 1e-3))
    assert [eager.seconds(done) for done in range(10, 12)] == [60, 120]


class SlowToBegin(Regression):
    """A first step of half a second, as one that compiles."""

    def loss(self) -> dict[str, torch.Tensor]:
        if self.calls == 0:
            time.sleep(0.5)
        return super().loss()


@pytest.mark.parametrize(("compiles", "counted"), [(True, False), (False, True)])
def test_logged_seconds_leave_out_the_steps_that_compile(
    tmp_path: Path, compiles: bool, counted: bool
) -> None:
    config = dataclasses.replace(CONFIG, compile=compiles, log_every=12)
    train(SlowToBegin(), config, tmp_path, torch.device("cpu"), False)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(line)["seconds"] >= 0.5) is counted
