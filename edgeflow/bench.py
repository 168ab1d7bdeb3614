"""A benchmark: measured rows, what they mean for the machine, and ratios. Torch-free.

The JSON (``BenchReport.as_dict``), schema 2 (times in ms, memory in MiB, SUMMARY as in edgeflow/speed.py)::

    {"schema": 2, "kind": "bench", "machine": {…}, "settings": {…}, "versions": {…}, "notes": [sentence…],
     "matrix_rates": {device: {"gflop_per_s", "by"}},
     "rows": [{"name", "model", "runtime", "device", "backend", "precision", "threads", "bytes",
               "graph_bytes", "check", "warm_ms": SUMMARY, "parts_ms": {graph: SUMMARY},
               "stages_ms": {stage: median},
               "first_picture_ms": SUMMARY, "load_ms": SUMMARY, "cold_start_ms": SUMMARY or null,
               "peak_rss_mib", "imported_rss_mib", "peak_gpu_mib",
               "gflop": {component: GFLOP}, "gflop_per_s", "share_of_matrix_rate", "floor_ms",
               "launches_ms": [[[ms…] a turn…] a launch…]}…],
     "ratios": [{"a", "b", "value", "low", "high", "verdict"}…]}
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeflow.bench_machine import MatrixRate
from edgeflow.measure import Measured, Plan, measure
from edgeflow.measure_child import STAGES
from edgeflow.measure_process import Configuration, cold_starts
from edgeflow.measure_statistics import Summary, summarize
from edgeflow.speed import compare, peak_gpu

SCHEMA = 2


@dataclass(frozen=True)
class BenchRow:
    """One configuration; times in ms, memory in MiB."""

    name: str
    model: str
    runtime: str
    device: str
    backend: str
    precision: str
    threads: int
    bytes: int
    graph_bytes: int
    check: str
    warm_ms: Summary
    parts_ms: Mapping[str, Summary]
    stages_ms: Mapping[str, float]
    first_picture_ms: Summary
    load_ms: Summary
    peak_rss_mib: float
    imported_rss_mib: float
    peak_gpu_mib: float | None
    launches_ms: tuple[tuple[tuple[float, ...], ...], ...]
    cold_start_ms: Summary | None = None
    gflop: Mapping[str, float] = field(default_factory=dict)
    gflop_per_s: float | None = None
    share_of_matrix_rate: float | None = None
    floor_ms: float | None = None


@dataclass(frozen=True)
class NamedRatio:
    """How many times as long a picture of A takes as one of B."""

    a: str
    b: str
    value: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class BenchReport:
    """All rows of one run on one machine."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[BenchRow, ...]
    ratios: tuple[NamedRatio, ...] = ()
    matrix_rates: Mapping[str, MatrixRate] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values (see the module's docstring)."""
        return {
            "schema": SCHEMA,
            "kind": "bench",
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "versions": dict(sorted(self.versions.items())),
            "notes": list(self.notes),
            "matrix_rates": {device: asdict(rate) for device, rate in self.matrix_rates.items()},
            "rows": [asdict(row) for row in self.rows],
            "ratios": [asdict(found) for found in self.ratios],
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class BenchRequest:
    """What to run. ``cold`` is how many cold starts of the command line a model; 0 for none."""

    configurations: Sequence[Configuration]
    plan: Plan
    cold: int = 0
    flops: bool = True
    compare: bool = False


Say = Callable[[str], None]


def bench(request: BenchRequest, say: Say = lambda step: None) -> BenchReport:
    """Measure everything, then count and divide. Raises EdgeflowError for anything a user can mend."""
    from edgeflow import __version__
    from edgeflow.bench_machine import busy, machine

    facts = machine()
    notes = [warning] if (warning := busy(facts)) else []
    measured = measure(request.configurations, request.plan, say=say)
    rows = [row_of(m, _cold(m, request.cold, say)) for m in measured]
    rates = {}
    if request.flops:
        rates = _matrix_rates(measured, say)
        rows, missing = _with_work(rows, rates, say)
        notes += missing
    return BenchReport(
        machine=facts,
        settings={**asdict(request.plan), "cold": request.cold},
        rows=tuple(rows),
        ratios=ratios_of(measured) if request.compare else (),
        matrix_rates=rates,
        versions={"edgeflow": __version__, **dict(m.backend.split(" ", 1) for m in measured)},
        notes=tuple(notes),
    )


def row_of(measured: Measured, cold: Summary | None = None) -> BenchRow:
    """The row of a configuration's launches."""
    launches = measured.launches
    names = list(dict.fromkeys(name for launch in launches for name in launch.graphs_ms))
    parts = {n: summarize([v for launch in launches for v in launch.graphs_ms.get(n, ())]) for n in names}
    return BenchRow(
        name=measured.label,
        model=measured.configuration.model,
        runtime=measured.runtime,
        device=measured.device,
        backend=measured.backend,
        precision=measured.precision,
        threads=measured.threads,
        bytes=measured.bytes,
        graph_bytes=measured.graph_bytes,
        check=measured.check,
        warm_ms=summarize(measured.warm_ms),
        parts_ms=parts,
        stages_ms={s: statistics.median(launch.stages[s] for launch in launches) for s in STAGES},
        first_picture_ms=summarize([launch.first_picture_ms for launch in launches]),
        load_ms=summarize([launch.load_ms for launch in launches]),
        peak_rss_mib=statistics.median(launch.peak_rss_mib for launch in launches),
        imported_rss_mib=statistics.median(launch.rss_mib["imported"] for launch in launches),
        peak_gpu_mib=peak_gpu(measured),
        launches_ms=tuple(launch.rounds for launch in launches),
        cold_start_ms=cold,
    )


def _cold(measured: Measured, times: int, say: Say) -> Summary | None:
    if not times:
        return None
    say(f"cold starts: {measured.label}")
    wanted = measured.configuration
    return summarize(list(cold_starts(wanted, times)))


def _matrix_rates(measured: Sequence[Measured], say: Say) -> dict[str, MatrixRate]:
    """The rate of each device that a model ran on, with the most threads that one of them had."""
    from edgeflow.bench_machine import matrix_rate

    say("matrix rate")
    threads = max(m.threads for m in measured)
    return {device: matrix_rate(threads, device) for device in sorted({m.device for m in measured})}


def _with_work(
    rows: Sequence[BenchRow], rates: Mapping[str, MatrixRate], say: Say
) -> tuple[list[BenchRow], list[str]]:
    """Rows with their arithmetic, and a note for each whose arithmetic could not be counted."""
    from edgeflow.bench_flops import count_gflop
    from edgeflow.generate import open_model

    counted: dict[str, tuple[dict[str, float], str | None]] = {}
    made, notes = [], []
    for row in rows:
        say(f"counting the arithmetic of {row.name}")
        model = open_model(row.model)
        key = model.generation.checkpoint_hash
        counted[key] = counted.get(key) or count_gflop(model)
        gflop, reason = counted[key]
        if reason:
            notes.append(f"{row.name}: arithmetic not counted: {reason}")
        made.append(with_work(row, gflop, rates[row.device]))
    return made, notes


def with_work(row: BenchRow, gflop: Mapping[str, float], rate: MatrixRate) -> BenchRow:
    """The row with GFLOP/s, its share of the matrix rate, and the time that rate would take."""
    from dataclasses import replace

    total = math.fsum(gflop.values())
    if not total:
        return row
    achieved = total / (row.warm_ms.median / 1000)
    return replace(
        row,
        gflop=dict(gflop),
        gflop_per_s=achieved,
        share_of_matrix_rate=achieved / rate.gflop_per_s,
        floor_ms=total / rate.gflop_per_s * 1000,
    )


def ratios_of(measured: Sequence[Measured]) -> tuple[NamedRatio, ...]:
    """Every later configuration against the first."""
    first, *others = measured
    found = [(other, compare(other, first)) for other in others]
    return tuple(NamedRatio(m.label, first.label, r.value, r.low, r.high, r.verdict) for m, r in found)
