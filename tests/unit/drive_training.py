"""Train a small regression in a process of its own: what the tests start, kill, and start many times over.

    python drive_training.py OUT SETTINGS.json [--resume]

``settings`` are LoopConfig's, plus ``die_at`` (SIGKILL before that step's loss), ``die_saving`` (SIGKILL
while the n-th state is half written) and ``minutes``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow.training.config import LoopConfig
from edgeflow.training.draw import Draw
from edgeflow.training.loop import averaged_copy, check_run, start_run, train
from edgeflow.training.parallel import Processes

LOOP: dict[str, Any] = {
    "steps": 12,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "log_every": 4,
    "save_minutes": 0.0,
}


class Regression:
    """Fits 64 points of a noisy line with two modules, of which one is averaged."""

    def __init__(self, config: LoopConfig, die_at: int | None = None):
        torch.manual_seed(config.seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.trained = nn.ModuleDict({"net": net, "offset": nn.Linear(4, 1)})
        self.averaged = averaged_copy(nn.ModuleDict({"net": net}))
        self.draw = Draw(config.batch_size, torch.device("cpu"))
        self.x = torch.randn(64, 4)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(64, 1)
        self.done, self.die_at = 0, die_at

    def prepare(self, done: int) -> None:
        self.done = done

    def loss(self) -> dict[str, Tensor]:
        if self.done + 1 == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        index = self.draw.index(len(self.x))
        x = self.x[index] * (0.5 + self.draw.uniform(1)) + 0.1 * self.draw.normal(4)
        error = self.trained["net"](x) + self.trained["offset"](x) - self.y[index]
        return {"loss": error.square().mean(), "l1": error.detach().abs().mean()}

    def batch_keys(self, index: Tensor) -> list[str]:
        return [f"point {i}" for i in index.tolist()]

    def draw_sheet(self, path: Path) -> None:
        torch.rand(7)  # a sheet that draws must not disturb the run
        path.write_bytes(b"sheet")

    def save(self, folder: Path) -> None:
        torch.save(self.averaged.state_dict(), folder / "weights.pt")


def drive(out: Path, settings: dict[str, Any], *, resume: bool = False) -> Regression:
    """Run the regression into ``out``; on several processes if a launcher says so."""
    settings = {**LOOP, **settings}
    die_at, die_saving = settings.pop("die_at", None), settings.pop("die_saving", None)
    if die_saving:
        _die_while_saving(die_saving)
    config = LoopConfig(**settings)
    processes = Processes.join(torch.device("cpu"))
    check_run(out, force=False, resume=resume)
    processes.barrier()
    objective = Regression(config, die_at)
    if processes.main:
        start_run(out, dataclasses.asdict(config), resume=resume)
    processes.barrier()
    train(objective, config, out, processes.device, resume)
    return objective


def _die_while_saving(nth: int) -> None:
    """SIGKILL when ``nth`` states have been begun and half of the last one is on the disk."""
    save, begun = torch.save, 0

    def half(state: Any, file: Any) -> None:
        nonlocal begun
        save(state, file)
        begun += 1
        if begun == nth:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


if __name__ == "__main__":
    drive(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), resume="--resume" in sys.argv)
