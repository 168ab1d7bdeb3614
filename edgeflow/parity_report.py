"""What a parity measurement says, and its two renderings: JSON and a terminal table.

The JSON (``ParityReport.as_dict``), schema 1, holds nothing of the machine or the moment::

    {"schema": 1, "kind": "parity", "passed": bool, "failures": [sentence…], "notes": [sentence…],
     "versions": {package: version},
     "measurements": [{"gap", "model", "checkpoint", "bundle", "runtime", "precision", "component", "against",
                       "metric", "gate", "prompts", "values", "worst", "median", "status", "reason"}…]}

JSON has no infinity: +inf (equal arrays) is the string "inf", −inf (a value that is not finite) is "-inf".
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeflow import terminal
from edgeflow.errors import GateFailed, UnknownNameError, UsageError
from edgeflow.spec import GenerationSpec
from edgeflow.terminal import Part

SCHEMA = 1
REWRITE, LOWERING, QUANTIZATION, END_TO_END = "rewrite", "lowering", "quantization", "end_to_end"
#: The four gaps in the order in which a model crosses them.
GAPS = (REWRITE, LOWERING, QUANTIZATION, END_TO_END)

PASS, FAIL, UNGATED, UNMEASURED = "pass", "fail", "not gated", "not measured"

#: Metric → (what the table calls it, whether more is better).
METRICS = {"sqnr_db": ("SQNR", True), "psnr_db": ("PSNR", True), "max_abs": ("max abs", False)}

#: The starting gates: (gap, metric) → precision → limit. A precision without a line is reported, not gated.
GATES: dict[tuple[str, str], dict[str, float]] = {
    (REWRITE, "sqnr_db"): {"fp32": 80.0},
    (REWRITE, "max_abs"): {"fp32": 1e-4},
    (LOWERING, "sqnr_db"): {"fp32": 60.0, "fp16": 40.0},
    (END_TO_END, "psnr_db"): {"fp32": 50.0, "fp16": 35.0},
}
#: What ``--gate NAME=VALUE`` calls each gate; a value given replaces it for every precision.
GATE_NAMES = {
    "rewrite": (REWRITE, "sqnr_db"),
    "rewrite-max-abs": (REWRITE, "max_abs"),
    "lowering": (LOWERING, "sqnr_db"),
    "end-to-end": (END_TO_END, "psnr_db"),
}


def parse_gates(texts: Sequence[str]) -> dict[str, float]:
    """``["lowering=50", …]`` → name → limit. Raises UsageError naming what is wrong."""
    gates: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in GATE_NAMES:
            raise UnknownNameError("gate", name, GATE_NAMES)
        try:
            gates[name] = float(value)
        except ValueError:
            gates[name] = math.nan
        if not math.isfinite(gates[name]):
            raise UsageError(f"gate: {text}: expected a number after {name}=, got {value!r}")
    return gates


def check_gates(given: Mapping[str, float]) -> dict[str, float]:
    """``given`` itself. Raises UnknownNameError for a name that is not one of GATE_NAMES."""
    for name in given:
        if name not in GATE_NAMES:
            raise UnknownNameError("gate", name, GATE_NAMES)
    return dict(given)


@dataclass(frozen=True)
class Measurement:
    """One metric of one output over all prompts. What is gated is the worst prompt."""

    gap: str  # one of GAPS
    model: str  # GenerationSpec.name
    checkpoint: str  # GenerationSpec.checkpoint_hash
    bundle: str | None  # the bundle's folder, or None for the rewrite, which no bundle takes part in
    runtime: str
    precision: str
    component: str  # text_encoder, unet, decoder, pipeline
    against: str  # what the reference is: checkpoint, float checkpoint, reference.npz, or nothing
    metric: str  # one of METRICS
    gate: float | None
    prompts: tuple[str, ...]  # prompt i is drawn with seed i
    values: tuple[float, ...]  # by prompt; empty where nothing could be measured
    status: str  # PASS, FAIL, UNGATED, UNMEASURED
    reason: str | None = None  # why there are no values

    @property
    def worst(self) -> float | None:
        if not self.values:
            return None
        return min(self.values) if METRICS[self.metric][1] else max(self.values)

    @property
    def median(self) -> float | None:
        """The lower of the two middle values where their number is even: a value that was measured."""
        return statistics.median_low(self.values) if self.values else None

    def as_dict(self) -> dict[str, Any]:
        return _as_json({**asdict(self), "worst": self.worst, "median": self.median})

    @property
    def place(self) -> str:
        """Where it was measured: bundle (or model), gap and component."""
        return f"{self.bundle or self.model}: {self.gap.replace('_', ' ')}: {self.component}"

    @property
    def failure(self) -> str:
        """What went wrong, with the prompt that is worst."""
        if self.worst is None:
            return f"{self.place}: {self.reason}"
        prompt, name = self.prompts[self.values.index(self.worst)], METRICS[self.metric][0]
        value = show(self.metric, self.worst)
        return f"{self.place}: {name} {value}, gate {show_gate(self)} (prompt {prompt!r})"


def model_row(
    gap: str, spec: GenerationSpec, prompts: tuple[str, ...], reason: str | None = None
) -> Measurement:
    """A row of a gap between two models in eager PyTorch, which no bundle takes part in: not measured yet."""
    return Measurement(
        gap=gap,
        model=spec.name,
        checkpoint=spec.checkpoint_hash,
        bundle=None,
        runtime="torch",
        precision="fp32",
        component="all",
        against="nothing",
        metric="sqnr_db",
        gate=None,
        prompts=prompts,
        values=(),
        status=UNMEASURED,
        reason=reason,
    )


def judged(measurement: Measurement) -> str:
    """The status that a measurement's worst value deserves; a value that is not a number never passes."""
    if measurement.worst is None or measurement.gate is None:
        return UNMEASURED if measurement.worst is None else UNGATED
    more_is_better = METRICS[measurement.metric][1]
    value, gate = measurement.worst, measurement.gate
    return PASS if (value >= gate if more_is_better else value <= gate) else FAIL


@dataclass(frozen=True)
class ParityReport:
    """All that was measured of some bundles."""

    measurements: tuple[Measurement, ...]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()  # what was not measured or is measured against something else, and why

    @property
    def failures(self) -> tuple[str, ...]:
        """One phrase for each measurement that failed, with the prompt that is worst."""
        return tuple(m.failure for m in self.measurements if m.status == FAIL)

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values (see the module's docstring)."""
        return {
            "schema": SCHEMA,
            "kind": "parity",
            "passed": self.passed,
            "failures": list(self.failures),
            "notes": list(self.notes),
            "versions": dict(sorted(self.versions.items())),
            "measurements": [m.as_dict() for m in self.measurements],
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"

    def check(self) -> None:
        """Raise GateFailed naming every failure, if there is one. Call it once the report is printed."""
        if self.failures:
            gated = sum(m.status in (PASS, FAIL) for m in self.measurements)
            raise GateFailed(
                f"parity: {len(self.failures)} of {gated} gates failed: {'; '.join(self.failures)}"
            )


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value]
    return value


def show(metric: str, value: float | None) -> str:
    """A value for people: ``61.3 dB``, ``equal`` for +inf dB, ``not finite`` for what an overflow gives."""
    if value is None:
        return "–"
    if metric == "max_abs":
        return "not finite" if math.isinf(value) else f"{value:.1e}" if value else "equal"
    if math.isinf(value):
        return "equal" if value > 0 else "not finite"
    return f"{value:.1f} dB"


def show_gate(m: Measurement) -> str:
    if m.gate is None:
        return "–"
    return f"≥ {m.gate:.4g} dB" if METRICS[m.metric][1] else f"≤ {m.gate:.4g}"


def print_report(report: ParityReport, *, as_json: bool = False) -> None:
    """The report on stdout: JSON, or the table, its notes and the count of each verdict."""
    terminal.print_report(report, _parts(report), as_json=as_json)


def render(report: ParityReport) -> str:
    """The table, its notes and the count of each verdict as plain text, no line wrapped."""
    return terminal.plain(_parts(report))


def _parts(report: ParityReport) -> list[Part]:
    return [table(report), *report.notes, summary(report)]


def table(report: ParityReport) -> Part:
    """The measurements as a ``rich`` table, in the order of the report, a rule between bundles."""
    from rich.text import Text

    styles = {PASS: "green", FAIL: "bold red"}
    grid = terminal.table(["Bundle", "Runtime", "Gap", "Component", "Metric"], ["Worst", "Median", "Gate"])
    grid.add_column("Verdict", overflow="fold")
    rows = report.measurements
    for m, after in zip(rows, [*rows[1:], None], strict=True):
        verdict = m.status if m.reason is None else f"{m.status}: {m.reason}"
        cells = (
            m.bundle or f"({m.model})",
            m.runtime,
            m.gap.replace("_", " "),
            m.component,
            METRICS[m.metric][0],
        )
        figures = (show(m.metric, m.worst), show(m.metric, m.median), show_gate(m))
        last = after is not None and after.bundle != m.bundle
        grid.add_row(*cells, *figures, Text(verdict, styles.get(m.status, "yellow")), end_section=last)
    return grid


def summary(report: ParityReport) -> str:
    """``parity: 12 passed, 1 failed, 4 not measured``, over the first prompts and seeds."""
    counts = [(sum(m.status == s for m in report.measurements), s) for s in (PASS, FAIL, UNGATED, UNMEASURED)]
    words = {PASS: "passed", FAIL: "failed"}
    said = ", ".join(f"{n} {words.get(s, s)}" for n, s in counts if n or s in words)
    num_prompts = max((len(m.prompts) for m in report.measurements), default=0)
    return f"parity: {said}; the worst of {num_prompts} prompts is gated"
