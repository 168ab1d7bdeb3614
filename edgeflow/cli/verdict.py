"""What ``edgeflow quality --against`` runs: the verdict, its outputs and its gates. No verb of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflow.errors import BackendMissing, OutputExistsError
from edgeflow.verdict_gates import failures, parse_gates, raise_failures
from edgeflow.verdict_table import print_verdict

if TYPE_CHECKING:
    from edgeflow.training.verdict import Judged


@dataclass(frozen=True)
class Asked:
    """The options of the command line."""

    models: tuple[str, ...]
    against: str
    data: Path
    split: str
    num_prompts: int | None
    seed: int
    device: str
    gates: tuple[str, ...]
    speed: bool
    html: Path | None
    sensitivity: tuple[Path, ...]
    out: Path | None
    force: bool
    as_json: bool


def run_verdict(asked: Asked, progress: Callable[[ExitStack], Any]) -> None:
    """Judge, write, print, and raise GateFailed last. Raises EdgeflowError for anything a user can mend."""
    from edgeflow.sensitivity_file import carried_sensitivity, read_sensitivity

    gates = parse_gates(asked.gates)
    sensitivity = [read_sensitivity(path) for path in asked.sensitivity]
    for out in (asked.out, asked.html):
        if out is not None and (out.exists() or out.is_symlink()) and not asked.force:
            raise OutputExistsError(out)  # before an hour's drawing, not after it
    with ExitStack() as stack:
        judged = _judged(asked, progress(stack))
        if asked.speed:
            judged = _timed(asked, judged, progress(stack))
    report = replace(judged.report, gates=gates, failures=failures(judged.report.rows, gates))
    if asked.out is not None:
        from edgeflow.staging import staged_folder

        with staged_folder(asked.out, force=asked.force) as folder:
            (folder / "verdict.json").write_text(report.to_json(), encoding="utf-8")
    if asked.html is not None:
        from edgeflow.staging import staged_output
        from edgeflow.verdict_page import Pictures, verdict_page

        pictures = Pictures(judged.seeds, judged.real, judged.model, judged.drawn)
        page = verdict_page(report, pictures, [*sensitivity, *carried_sensitivity(report)])
        with staged_output(asked.html, force=asked.force) as stage:
            stage.write_text(page, encoding="utf-8")
    print_verdict(report, as_json=asked.as_json)
    raise_failures(report)


def _judged(asked: Asked, progress: Any) -> Judged:
    try:
        from edgeflow.training.run import pick_device
        from edgeflow.training.verdict import Request, judge
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgeflow"):
            raise
        raise BackendMissing(error.name or "torch", "train") from error
    request = Request(
        models=asked.models,
        against=asked.against,
        data=asked.data,
        split=asked.split,
        num_prompts=asked.num_prompts,
        seed=asked.seed,
        device=str(pick_device(asked.device)),
    )
    return judge(request, progress)


def _timed(asked: Asked, judged: Judged, progress: Any) -> Judged:
    """The rows with their speed; each timed picture must be the judged one of the first prompt."""
    from edgeflow.measure import Plan, measure
    from edgeflow.measure_process import Configuration
    from edgeflow.speed import speeds
    from edgeflow.training.drawing import open_drawers

    report = judged.report
    rows, drawn = (report.model, *report.rows), (judged.model, *judged.drawn)
    drawers = open_drawers([asked.against, *asked.models])
    wanted = [
        Configuration(
            str(drawer.model.root),
            name=row.name,
            prompt=judged.prompts[0],
            seed=judged.seeds[0],
            expected=pictures[0].transpose(1, 2, 0),
        )
        for drawer, row, pictures in zip(drawers, rows, drawn, strict=True)
    ]
    plan = Plan()
    done = progress("timing", plan.launches * len(wanted))
    found = speeds(measure(wanted, plan, say=lambda step: done(1)))
    model, *others = (replace(row, speed=speed) for row, speed in zip(rows, found, strict=True))
    return replace(judged, report=replace(report, model=model, rows=tuple(others)))
