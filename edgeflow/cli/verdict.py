"""What ``edgeflow quality --against`` runs: the verdict, its outputs and its gates. No verb of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeflow.errors import BackendMissing, OutputExistsError
from edgeflow.verdict_gates import failures, parse_gates, raise_failures
from edgeflow.verdict_table import print_verdict


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
    out: Path | None
    force: bool
    as_json: bool


def run_verdict(asked: Asked, progress: Callable[[ExitStack], Any]) -> None:
    """Judge, write, print, and raise GateFailed last. Raises EdgeflowError for anything a user can mend."""
    gates = parse_gates(asked.gates)
    if asked.out is not None and (asked.out.exists() or asked.out.is_symlink()) and not asked.force:
        raise OutputExistsError(asked.out)  # before an hour's drawing, not after it
    judged = _judged(asked, progress)
    report = replace(judged.report, gates=gates, failures=failures(judged.report.rows, gates))
    if asked.out is not None:
        from edgeflow.staging import staged_folder

        with staged_folder(asked.out, force=asked.force) as folder:
            (folder / "verdict.json").write_text(report.to_json(), encoding="utf-8")
    print_verdict(report, as_json=asked.as_json)
    raise_failures(report)


def _judged(asked: Asked, progress: Callable[[ExitStack], Any]) -> Any:
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
    with ExitStack() as stack:
        return judge(request, progress(stack))
