"""What a dry run says against what can be worked out on paper; the logs beside metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgeflow.errors import BackendMissing
from edgeflow.training import scaling
from edgeflow.training.config import LoopConfig
from edgeflow.training.draw import Draw
from edgeflow.training.loop import averaged_copy, start_run, train
from edgeflow.training.plan import loop_plan
from edgeflow.training.state import require_tensorboard

CONFIG = LoopConfig(steps=30, batch_size=2_000_000, learning_rate=1e-3)


class Small:
    """A trained perceptron, and beside it a frozen layer that is not in the loss, and 1,000,000 numbers."""

    def __init__(self, batch_size: int = 4):
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.trained = nn.ModuleDict({"net": net})
        self.averaged = averaged_copy(self.trained)
        self.draw = Draw(batch_size, torch.device("cpu"))
        self.frozen = nn.Linear(1000, 1000, bias=False).requires_grad_(False)
        self.x = torch.randn(250_000, 4)

    def loss(self) -> dict[str, Tensor]:
        x = self.x[self.draw.index(len(self.x))]
        return {"loss": self.trained["net"](x).square().mean()}

    def draw_sheet(self, path: Path) -> None:
        path.write_bytes(b"sheet")

    def save(self, folder: Path) -> None:
        torch.save(self.averaged.state_dict(), folder / "weights.pt")


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 4)])
def test_a_plan_is_what_the_shapes_say(processes: int, accumulate: int) -> None:
    config = LoopConfig(**{**vars(CONFIG), "accumulate": accumulate})
    plan = loop_plan(Small(CONFIG.batch_size), config, processes)
    assert plan["modules"] == [
        {"name": "net", "parameters": 49, "trained": 49, "averaged": True},
        {"name": "frozen", "parameters": 1_000_000, "trained": 0, "averaged": False},
    ]
    assert (plan["pictures_seen"], plan["examples"], plan["passes"]) == (60_000_000, 250_000, 240.0)
    in_hand = 2_000_000 // (processes * accumulate)
    assert plan["batch"]["at_once"] == in_hand
    memory = plan["memory_estimate_mib"]
    assert memory["frozen"] == memory["data"] == pytest.approx(4e6 / 2**20, abs=0.05)
    # Kept for the backward pass: the input (4 numbers a row), tanh's output (8), what is squared (1).
    assert memory["activations"] == pytest.approx(13 * 4 * in_hand / 2**20, abs=0.1)
    assert memory["in_all"] == pytest.approx(sum(v for k, v in memory.items() if k != "in_all"), abs=0.3)


def test_tensorboard_goes_on_where_the_run_does(tmp_path: Path) -> None:
    """Its scalars are the log's, each step once, also of a run that was taken up again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"batch_size": 4, "learning_rate": 1e-2, "log_every": 2, "tensorboard": True}
    for steps in (5, 8):
        start_run(tmp_path, {}, resume=steps == 8)
        train(Small(), LoopConfig(steps=steps, **settings), tmp_path, torch.device("cpu"), steps == 8)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = {e.step: e.value for e in events.Scalars("loss")}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told == pytest.approx({x["step"]: x["loss"] for x in lines}) and sorted(told) == [2, 4, 5, 6, 8]


def test_tensorboard_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match=r"edgeflow\[tensorboard\]"):
        require_tensorboard()


def test_scaling_says_which_and_compares_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strong keeps the batch, weak each process's; a configuration that both share is run once."""
    asked: list[tuple[int, int]] = []

    def measured(stage: list[str], processes: int, batch_size: int, *rest: object) -> float:
        asked.append((processes, batch_size))
        return {(1, 8): 100.0, (2, 8): 150.0, (2, 16): 190.0}[processes, batch_size]

    monkeypatch.setattr(scaling, "measure", measured)
    rows = scaling.scaling(["teacher"], [1, 2], 8, 10, ["strong", "weak"], [])
    told = [(r["mode"], r["processes"], r["batch_size"], r["images_per_s"], r["efficiency"]) for r in rows]
    assert told == [
        ("strong", 1, 8, 100.0, 1.0),
        ("strong", 2, 8, 150.0, 0.75),
        ("weak", 1, 8, 100.0, 1.0),
        ("weak", 2, 16, 190.0, 0.95),
    ]
    assert asked == [(1, 8), (2, 8), (2, 16)]
