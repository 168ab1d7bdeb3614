"""The rows of the paper's table: every model drawn from the same captions and noise, paths measured."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeflow.training import straightness
from edgeflow.training.drawing import Drawer, open_drawers
from edgeflow.training.evaluate import Measured, Progress, Request, measure
from edgeflow.training.models import load_parts
from edgeflow.training.paper_stages import Plan, logged, record_of
from edgeflow.training.run import pick_device

SCHEMA = 1
#: Every row: its label, the run it draws from, its steps (None: the model's own), the stages it cost.
ROWS: tuple[tuple[str, str, int | None, tuple[str, ...]], ...] = (
    ("teacher", "teacher", None, ()),
    ("teacher", "teacher", 1, ()),
    ("direct distillation", "direct", 1, ("direct",)),
    ("2-rectified flow", "reflow", None, ("reflow",)),
    ("2-rectified flow", "reflow", 2, ("reflow",)),
    ("2-rectified flow", "reflow", 1, ("reflow",)),
    ("2-rectified flow + distillation", "distilled", 1, ("reflow", "distilled")),
    ("2-rectified flow + small student", "small", 1, ("reflow", "small")),
)
_TRAINED = ("reflow", "distilled", "direct", "small")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    num_prompts: int | None = None
    per_prompt: int = 1
    num_paths: int = 1024


def measure_table(plan: Plan, sizes: Sizes, progress: Progress) -> tuple[dict[str, Any], Measured]:
    """The table of one seed as JSON values, and the pictures behind it. The prompts' noise has seeds from 0
    whatever the plan's seed: two seeds differ in training alone."""
    device = pick_device(plan.device)
    drawers = [_drawer(plan, run, steps) for _, run, steps, _ in ROWS]
    request = Request(
        data=plan.data,
        drawers=drawers,
        num_prompts=sizes.num_prompts,
        per_prompt=sizes.per_prompt,
        device=str(device),
    )
    measured = measure(request, progress)
    captions, noise, stored = straightness.sample_of(plan.pairs_folder, sizes.num_paths)
    costs = {name: record_of(name, plan) for name in _TRAINED}
    rows = []
    done = progress("paths", len(ROWS))
    for (label, run, _, used), drawer, row in zip(ROWS, drawers, measured.report.rows, strict=True):
        geometry = straightness.measure(drawer, captions, noise, device)
        rows.append(
            {
                "label": label,
                "run": run,
                "steps": drawer.steps,
                "guidance": drawer.guidance,
                "stages": list(used),
                "minutes": sum(costs[name]["seconds"] for name in used) / 60 if used else None,
                "figures": dict(row.figures),
                "paths": geometry.as_dict(),
            }
        )
        done(1)
    report = measured.report.as_dict()
    table = {
        "schema": SCHEMA,
        "kind": "paper-table",
        "seed": plan.seed,
        "settings": {
            "preset": plan.preset,
            "minutes": plan.minutes,
            "target_steps": plan.target_steps,
            "overrides": list(plan.overrides),
            "num_paths": len(noise),
        },
        "data": report["data"],
        "quality": report["settings"],
        "versions": report["versions"],
        "machine": _machine(device),
        "pairs": {"transport": stored, **_pairs_record(plan)},
        "models": {run: _model(_folder(plan, run), device) for run in ("teacher", *_TRAINED)},
        "stages": {**_teachers_record(plan), **costs},
        "floor": report["floor"],
        "rows": rows,
    }
    return table, measured


def _folder(plan: Plan, run: str) -> Path:
    return plan.teacher if run == "teacher" else plan.out / run


def _drawer(plan: Plan, run: str, steps: int | None) -> Drawer:
    drawer = open_drawers([_folder(plan, run)])[0]
    return drawer if steps is None else dataclasses.replace(drawer, steps=steps)


def _teachers_record(plan: Plan) -> dict[str, Any]:
    """What the teacher cost, where its run's log is at hand."""
    steps, seconds = logged(plan.teacher / "metrics.jsonl")
    return {"teacher": {"seconds": seconds, "steps": steps}} if seconds else {}


def _pairs_record(plan: Plan) -> dict[str, Any]:
    _, seconds = logged(plan.pairs_folder / "metrics.jsonl")
    return {"seconds": seconds} if seconds else {}


def _machine(device: torch.device) -> dict[str, Any]:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": device.type, "name": name, "cpu": threads}


@torch.no_grad()
def _model(folder: Path, device: torch.device) -> dict[str, Any]:
    """Parameters of the UNet, and milliseconds a picture of one forward pass in a full batch."""
    drawer = open_drawers([folder])[0]
    unet = load_parts(drawer.model.root).unet.to(device).eval()
    batch = 256 if device.type == "cuda" else 8
    x = torch.zeros(batch, *drawer.latent_shape, device=device)
    t = torch.full((batch,), 1000.0, device=device)
    text = torch.zeros(batch, 16, unet.config.cross_attention_dim, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        seconds = _median_seconds(lambda: unet(x, t, text), device)
    parameters = sum(p.numel() for p in unet.parameters())
    return {"unet_parameters": parameters, "batch_size": batch, "forward_ms": 1e3 * seconds / batch}


def _median_seconds(
    run: Callable[[], object], device: torch.device, warm_up: int = 3, count: int = 9
) -> float:
    times = []
    for i in range(warm_up + count):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= warm_up:
            times.append(time.perf_counter() - began)
    return statistics.median(times)
