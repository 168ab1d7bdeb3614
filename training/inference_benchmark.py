"""One-step text-to-image at Stable Diffusion 1.5's full size on one GPU, with random weights.

    python -m edgeflow.training.inference_benchmark -o inference.json

Ids and noise on the host to a picture in bytes on the host, 512 × 512: float32 and float16 as diffusers' own
pipeline runs them, edgeflow's CUDA path (rewritten, compiled, captured), its package compiled ahead of time,
and what the GPU spends its time on. Every ratio is of one run: the matrix rate is measured first, and every
picture is held against the float32 one from the same noise. What a picture costs does not depend on the
weights' values. The file is written anew after each row, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgeflow.errors import EdgeflowError, UsageError
from edgeflow.training import inference_rows as rows
from edgeflow.training.inference_model import Model
from edgeflow.training.inference_rows import Variant

#: Row → what runs it and about how many seconds it takes at full size on an H100, compilation included.
Row = tuple[Callable[[Model], dict[str, Any]], float]


def _path(**changes: Any) -> Callable[[Model], dict[str, Any]]:
    return functools.partial(rows.compiled, variant=Variant(**changes))


ROWS: dict[str, Row] = {
    "eager fp32": (functools.partial(rows.eager, precision="fp32"), 10),
    "eager fp16": (functools.partial(rows.eager, precision="fp16"), 10),
    "fp16": (_path(), 120),
    "decoder fp16": (_path(graph="decoder", profile=True), 60),
    "tiny decoder fp16": (_path(tiny=True), 80),
    "fp16, batch 16": (_path(batch=16), 110),
    "package fp16": (rows.package, 130),
    "bf16": (_path(precision="bf16"), 100),
    "tiny decoder fp16, batch 16": (_path(tiny=True, batch=16), 80),
}
#: Second call: each rewrite left out of the decoder or the whole, and integers.
MORE_ROWS: dict[str, Row] = {
    "decoder fp16, no rewrites": (_path(graph="decoder", without=rows.ALL), 45),
    "decoder fp16, without upsample": (_path(graph="decoder", without=("upsample",)), 45),
    "decoder fp16, without norm": (_path(graph="decoder", without=("norm",)), 45),
    "decoder fp16, without wide_attention": (_path(graph="decoder", without=("wide_attention",)), 45),
    "unet fp16": (_path(graph="unet", profile=True), 70),
    # Without text_kv too, which would make one product of half of the same layers.
    "unet fp16, without qkv": (_path(graph="unet", without=("qkv", "text_kv")), 70),
    "unet fp16, without text_kv": (_path(graph="unet", without=("text_kv",)), 70),
    "unet fp16, without product": (_path(graph="unet", without=("product",)), 70),
    "unet fp16, no rewrites": (_path(graph="unet", without=rows.ALL), 70),
    "unet w8": (_path(graph="unet", integers="w8"), 80),
    "unet w8a8": (_path(graph="unet", integers="w8a8"), 80),
    "unet fp8": (_path(graph="unet", integers="fp8", precision="bf16"), 80),  # torchao: bfloat16 alone
}
SETS = {"main": ROWS, "more": MORE_ROWS}


@dataclass(frozen=True)
class Plan:
    """What is run."""

    width: str = "full"
    rows: tuple[str, ...] = tuple(ROWS)
    runs: int = 50
    compile: bool = True
    minutes: float = 8.5


class Bench:
    """The model, the report so far, and the clock."""

    def __init__(self, plan: Plan, device: str, out: Path):
        self.plan, self.out, self.began = plan, out, time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {}
        self.model = Model(plan.width, device, runs=plan.runs, compile=plan.compile)
        self.rate = rows.matrix_rate(device)
        self.say(f"matrix rate: {self.rate}")
        self.write()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)

    def record(self, name: str) -> None:
        """Run one row and write the report; a row that does not fit in the time or fails says so."""
        run, needs_s = (ROWS | MORE_ROWS)[name]
        left = 60 * self.plan.minutes - (time.monotonic() - self.began)
        if left < needs_s:
            row: dict[str, Any] = {"skipped": f"{left:.0f} s left, about {needs_s:.0f} s needed"}
        else:
            began = time.monotonic()
            try:
                row = run(self.model)
                row |= self._against_rate(row)
            except torch.OutOfMemoryError:
                row = {"failed": "out of memory"}
            except Exception as error:  # the other rows are worth having; the exit code tells
                row = {"failed": f"{type(error).__name__}: {error}"[:600]}
                traceback.print_exc()
            row["seconds"] = round(time.monotonic() - began, 1)
            self.model.free()
        self.rows[name] = row
        self.say(f"{name}: {json.dumps({k: v for k, v in row.items() if k != 'kernels'})}")
        self.write()

    def _against_rate(self, row: dict[str, Any]) -> dict[str, Any]:
        """The floor of the row's arithmetic, unrewritten, and the part of the matrix rate that it reached."""
        if "gflop" not in row or "gpu_ms" not in row:
            return {}
        rate = self.rate["bf16" if row.get("precision") == "bf16" else "fp16"]
        floor = row["gflop"] / rate["tflop_per_s"]
        return {"floor_ms": round(floor, 3), "of_matrix_rate": round(floor / row["gpu_ms"], 3)}

    def write(self) -> None:
        partial = self.out.with_name(self.out.name + ".partial")
        partial.write_text(json.dumps(self.report(), indent=2) + "\n", encoding="utf-8")
        partial.replace(self.out)

    def report(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "machine": self.model.machine(),
            "plan": asdict(self.plan),
            "gflop": self.model.__dict__.get("gflop"),  # counted with the first row that needs it
            "matrix_rate": self.rate,
            "seconds": round(time.monotonic() - self.began, 1),
            "rows": self.rows,
            "goals": goals(self.rows),
        }


def goals(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was set out for one H100-class GPU beside what was measured; None is not measured."""

    def value(row: str, key: str) -> Any:
        return found.get(row, {}).get(key)

    fast, slow = value("fp16", "ms"), value("eager fp16", "ms")
    wanted: list[tuple[str, Any, str, float]] = [
        ("batch 1, ms", fast, "at most", 9.0),
        ("batch 1, times as fast as eager fp16", slow / fast if fast and slow else None, "at least", 9.0),
        ("tiny decoder, ms", value("tiny decoder fp16", "ms"), "at most", 4.0),
        ("batch 16, part of the matrix rate", value("fp16, batch 16", "of_matrix_rate"), "at least", 0.6),
        ("fp16 against fp32, PSNR dB", value("fp16", "psnr_db"), "at least", 40.0),
        ("package, process start to picture, s", value("package fp16", "first_picture_s"), "at most", 8.0),
    ]
    return {
        name: {
            "measured": None if got is None else round(got, 3),
            "goal": f"{how} {limit:g}",
            "met": None if got is None else bool(got <= limit if how == "at most" else got >= limit),
        }
        for name, got, how, limit in wanted
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The rows as a table for a page."""
    keys = ("ms", "gpu_ms", "floor_ms", "of_matrix_rate", "psnr_db", "own_peak_gib", "first_call_s")
    lines = [f"| row | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, row in found.items():
        cells = [str(row.get(key, "–")) for key in keys]
        note = next((f" ({what}: {row[what][:60]})" for what in ("skipped", "failed") if what in row), "")
        lines.append(f"| {name}{note} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _chosen(given: str) -> tuple[str, ...]:
    """Row names, or those of a set. Raises UsageError for a name that is not known."""
    if given in SETS:
        return tuple(SETS[given])
    names, known = [n.strip() for n in given.split(";")], ROWS | MORE_ROWS
    for name in names:
        if name not in known:
            raise UsageError(f"row {name!r} is not known; known: {', '.join(SETS)}, or {'; '.join(known)}")
    return tuple(names)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 a row failed, 2 usage, 4 no GPU."""
    plan = Plan()
    parser = argparse.ArgumentParser(
        prog="python -m edgeflow.training.inference_benchmark",
        description="Time drawing at Stable Diffusion 1.5's size on one GPU, with random weights.",
        epilog="example: python -m edgeflow.training.inference_benchmark -o inference.json",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="JSON report to write")
    parser.add_argument("--width", choices=("full", "narrow"), default=plan.width)
    parser.add_argument(
        "--rows", default="main", metavar="ROWS", help="main, more, or names of rows with ; between them"
    )
    parser.add_argument("--runs", type=int, default=plan.runs, metavar="N", help="timed pictures of each row")
    parser.add_argument(
        "--minutes", type=float, default=plan.minutes, metavar="M", help="begin no row that would pass that"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the rewritten modules eager")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--force", action="store_true", help="replace a report that already exists")
    given = parser.parse_args(argv)
    try:
        if given.out.exists() and not given.force:
            raise UsageError(f"output {given.out} already exists; give another -o/--out or --force")
        names = _chosen(given.rows)
        bench = Bench(
            Plan(given.width, names, given.runs, not given.no_compile, given.minutes), given.device, given.out
        )
        for name in names:
            bench.record(name)
    except EdgeflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(bench.rows))
    return int(any("failed" in row for row in bench.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
