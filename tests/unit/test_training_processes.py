"""A run is the same run however it is split over processes, micro-batches and calls; SIGKILL included."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeflow.errors import ConfigError, TrainingError
from edgeflow.training.draw import Draw
from edgeflow.training.parallel import _line, buckets

DRIVER = Path(__file__).with_name("drive_training.py")
_spec = importlib.util.spec_from_file_location("drive_training", DRIVER)
assert _spec is not None and _spec.loader is not None
driver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driver)


def start(out: Path, settings: dict[str, Any], *flags: str, processes: int = 1) -> int:
    """The driver in processes of its own; returns the exit code."""
    settings_file = out.with_suffix(".json")
    settings_file.write_text(json.dumps(settings))
    launcher: list[str] = []
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, *launcher, str(DRIVER), str(out), str(settings_file), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, timeout=120, env=environment).returncode


def losses(out: Path) -> list[dict[str, Any]]:
    """The log without what the clock decides."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("images_per_s", "seconds", "peak_mib")} for x in lines]


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    assert len(losses(one)) == len(losses(other)) > 0
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    a, b = (torch.load(f / "checkpoint" / "weights.pt") for f in (one, other))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=10 * tolerance, atol=tolerance)


# --- splitting the batch -----------------------------------------------------------------------------------


def test_pieces_of_a_draw_are_the_rows_of_the_whole() -> None:
    def draws(draw: Draw) -> list[torch.Tensor]:
        return [draw.index(50), draw.uniform(), draw.normal(3, 2), draw.integers(9)]

    torch.manual_seed(3)
    whole = draws(Draw(12, torch.device("cpu")))
    rows: list[list[torch.Tensor]] = []
    for rank in range(2):
        torch.manual_seed(3)  # every process has the same random state
        draw = Draw(12, torch.device("cpu"))
        draw.share(rank, processes=2, pieces=3)
        for piece in range(3):
            draw.begin(piece)
            rows.append(draws(draw))
            assert draw.chosen is not None and torch.equal(draw.chosen, whole[0])
        draw.begin()
        assert not torch.equal(draws(draw)[1], rows[-3][1])  # a new step draws anew
    for k, wanted in enumerate(whole):
        assert torch.equal(torch.cat([r[k] for r in rows]), wanted)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"multiple of 1 processes × loop\.accumulate 3, got 16"):
        driver.drive(tmp_path / "run", {"accumulate": 3})


def test_buckets_hold_everything_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeflow.training.parallel.BUCKET", 5)
    tensors = [torch.zeros(n) for n in (2, 3, 1, 9, 4)]
    assert [[len(t) for t in b] for b in buckets(tensors)] == [[2, 3], [1], [9], [4]]


def test_a_gradient_is_sent_as_it_lies() -> None:
    """Writing into the line writes into the tensor, in any dense order of memory."""
    for format in (torch.contiguous_format, torch.channels_last):
        tensor = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).contiguous(memory_format=format)
        line = _line(tensor)
        line *= 2
        assert torch.equal(tensor.flatten(), 2 * torch.arange(120.0)) and line.is_contiguous()


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    driver.drive(tmp_path / "one", {"log_every": 1})
    driver.drive(tmp_path / "four", {"log_every": 1, "accumulate": 4})
    assert_same_run(tmp_path / "one", tmp_path / "four", 1e-5)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Two gloo processes under torchrun, each with two micro-batches, go on with a run begun by one."""
    driver.drive(tmp_path / "one", {"log_every": 1})
    driver.drive(tmp_path / "two", {"log_every": 1, "steps": 3})
    assert start(tmp_path / "two", {"log_every": 1, "accumulate": 2}, "--resume", processes=2) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)


def test_each_module_is_clipped_by_its_own_norm() -> None:
    from edgeflow.training.config import LoopConfig
    from edgeflow.training.parallel import Processes
    from edgeflow.training.step import Step

    config = LoopConfig(**{**driver.LOOP, "clip_norm": 0.01})
    objective = driver.Regression(config)
    step = Step(objective, config, Processes(0, 1, torch.device("cpu")))
    step.run(1, 0.0, 0.0)
    for module in objective.trained.values():
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()
        assert norm == pytest.approx(0.01, rel=1e-3)


# --- SIGKILL -----------------------------------------------------------------------------------------------


def test_a_run_killed_thrice_ends_at_the_same_bytes(tmp_path: Path) -> None:
    """Killed before a state was kept, while one was half written, and between two: the run that is resumed
    each time leaves the checkpoint and the losses of the one that nobody touched."""
    settings = {"save_steps": 3, "steps": 15}
    whole, out = tmp_path / "whole", tmp_path / "killed"
    driver.drive(whole, settings)
    assert start(out, {**settings, "die_at": 3}) == -signal.SIGKILL
    assert not (out / "state.pt").exists()
    assert start(out, {**settings, "die_saving": 2}, "--resume") == -signal.SIGKILL
    assert torch.load(out / "state.pt")["step"] == 3 and (out / "state.pt.partial").exists()
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # a line torn by the kill
    assert start(out, {**settings, "die_at": 12}, "--resume") == -signal.SIGKILL
    assert not (out / "checkpoint").exists()
    driver.drive(out, settings, resume=True)
    name = "checkpoint/weights.pt"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert losses(out) == losses(whole)
    for part in ("trained", "optimizer", "rng_cpu"):
        a, b = (torch.load(f / "state.pt")[part] for f in (out, whole))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_sheets_on_the_way_leave_the_run_alone(tmp_path: Path) -> None:
    driver.drive(tmp_path / "plain", {})
    driver.drive(tmp_path / "sheets", {"sheet_steps": 5})
    assert sorted(p.name for p in (tmp_path / "sheets" / "sheets").iterdir()) == [
        "step-000005.png",
        "step-000010.png",
    ]
    assert losses(tmp_path / "plain") == losses(tmp_path / "sheets")


# --- what is not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"accumulate": 4}], ids=["whole", "accumulated"])
def test_a_planted_nan_names_its_step_its_batch_and_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """One point of 64 is not a number. The first step that draws it is worked out here from the draws alone,
    and the weights stay those before it."""
    torch.manual_seed(0)
    config = driver.LoopConfig(**driver.LOOP)
    objective = driver.Regression(config)
    drawn = []
    for _ in range(config.steps):
        drawn.append(objective.draw.index(64).tolist())
        objective.draw.uniform(1), objective.draw.normal(4)
    planted = next(i for i in drawn[6] if all(i not in batch for batch in drawn[:6]))
    before = driver.drive(tmp_path / "before", {"steps": 6, **settings})

    class Poisoned(driver.Regression):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.y[planted] = float("nan")
            kept.append(self)

    kept: list[Any] = []
    monkeypatch.setattr(driver, "Regression", Poisoned)
    with pytest.raises(TrainingError) as caught:
        driver.drive(tmp_path / "run", {"save_steps": 5, "log_every": 12, **settings})
    message = str(caught.value)
    assert "loss, l1, grad_norm_net, grad_norm_offset not finite at step 7" in message
    assert f"the last good state is {tmp_path / 'run' / 'state.pt'}, of step 5" in message
    distinct = list(dict.fromkeys(drawn[6]))
    assert ", ".join(f"point {i}" for i in distinct[:8]) in message
    assert f"; not finite by itself: point {planted};" in message
    assert not (tmp_path / "run" / "checkpoint").exists()
    for name in ("trained", "averaged"):
        good, stopped = getattr(before, name).state_dict(), getattr(kept[0], name).state_dict()
        assert all(torch.equal(good[key], stopped[key]) for key in good)


# --- one CUDA graph ----------------------------------------------------------------------------------------

CAPTURED = {"device": "cuda", "cuda_graph": True, "log_every": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"accumulate": 4}], ids=["whole", "accumulated"])
def test_a_captured_step_is_the_eager_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    driver.drive(tmp_path / "eager", {"device": "cuda", "log_every": 1})
    driver.drive(tmp_path / "captured", {**CAPTURED, **settings})
    assert_same_run(tmp_path / "eager", tmp_path / "captured", 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_nan_inside_a_captured_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point turns bad after the capture, at step 8 of 12; the log is read at the end alone."""

    class Poisoned(driver.Regression):
        def prepare(self, done: int) -> None:
            super().prepare(done)
            self.y.fill_(float("nan")) if done == 7 else None

    monkeypatch.setattr(driver, "Regression", Poisoned)
    with pytest.raises(TrainingError, match="not finite at step 8, on the batch of point"):
        driver.drive(tmp_path / "run", {**CAPTURED, "log_every": 12})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_with_their_all_reduce_captured_are_one(tmp_path: Path) -> None:
    driver.drive(tmp_path / "one", CAPTURED)
    assert start(tmp_path / "two", CAPTURED, processes=2) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-4)
