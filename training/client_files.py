"""What makes a checkpoint of a rectified flow open in diffusers: its pipeline's name and a scheduler.

diffusers has none whose step is x + v, so the checkpoint ships one as code, which diffusers runs where it
is told ``trust_remote_code=True``. ``python -m edgeflow.training.client_files FOLDER`` adds both to a folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

_NAME = "rectified_flow_scheduler"
_CLASS = "RectifiedFlowScheduler"
#: diffusers' pipeline that calls the parts in the right order.
PIPELINE_CLASS = "StableDiffusionPipeline"
#: What ``model_index.json`` says of the scheduler: the module in its folder, and the class.
SCHEDULER = [_NAME, _CLASS]


def ship_scheduler(folder: Path) -> None:
    """Put the scheduler's code and config into ``folder/scheduler``, which is replaced."""
    scheduler = folder / "scheduler"
    shutil.rmtree(scheduler, ignore_errors=True)
    scheduler.mkdir()
    shutil.copyfile(Path(__file__).with_name(f"{_NAME}.py"), scheduler / f"{_NAME}.py")
    _write(scheduler / "scheduler_config.json", {"_class_name": _CLASS, "num_train_timesteps": 1000})


def update_checkpoint(folder: Path) -> None:
    """Make an existing checkpoint one that diffusers opens. Raises CheckpointError for other kinds."""
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.errors import CheckpointError
    from edgeflow.facts import read_json

    checkpoint = Checkpoint.open(folder)
    if checkpoint.kind not in ("one-step", "rectified-flow"):
        raise CheckpointError(
            f"checkpoint: {folder}: expected kind one-step or rectified-flow, got {checkpoint.kind}"
        )
    index = read_json(folder / "model_index.json")
    _write(folder / "model_index.json", {**index, "_class_name": PIPELINE_CLASS, "scheduler": SCHEDULER})
    ship_scheduler(folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        update_checkpoint(Path(name))
