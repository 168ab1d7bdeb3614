"""How close a bundle is to PyTorch, on real prompts: four gaps, each measured and gated by itself.

- rewrite: the original modules ↔ the export-ready ones, eager fp32. It needs torch and the checkpoint.
- lowering: the export-ready modules, eager fp32 ↔ each graph in its runtime, on the reference's own inputs.
- quantization: fp32 ↔ quantized, eager; for bundles with a recipe, gated only by the recipe's own gates.
- end to end: PyTorch's picture from the original modules ↔ the runtime's picture, both in [0, 1].

Without the checkpoint, or without torch, the last is against the export-ready modules' picture that the
bundle carries, and the report says so. This module imports no backend by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflow import __version__, metrics, parity_isolated, registry, worker
from edgeflow.apple import FUSED
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import RuntimeFailure
from edgeflow.generate import backend_version, is_fused, load_runtime, run_pipeline
from edgeflow.parity_limits import Limits, limits
from edgeflow.parity_quantization import quantization_rows
from edgeflow.parity_reference import (
    CHECKPOINT,
    OUTPUTS,
    TORCH_PACKAGES,
    Reference,
    Sample,
    find_checkpoint,
    graphs_of,
    reference_from_bundle,
    reference_from_checkpoint,
)
from edgeflow.parity_report import (
    END_TO_END,
    FAIL,
    LOWERING,
    REWRITE,
    UNMEASURED,
    Measurement,
    ParityReport,
    check_gates,
    judged,
    model_row,
    print_report,
)
from edgeflow.registry import Runtime
from edgeflow.spec import COMPONENTS, PIPELINE, GenerationSpec

_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "sqnr_db": metrics.sqnr_db,
    "psnr_db": lambda reference, actual: metrics.psnr_db(reference, actual, peak=1.0),
    "max_abs": metrics.max_abs,
}
Progress = Callable[[str], None]


def run_and_print(
    bundles: Sequence[Bundle | str | Path],
    *,
    against: Checkpoint | str | None = None,
    runtime: str | None = None,
    num_prompts: int | None = None,
    gates: Mapping[str, float] | None = None,
    unquantized: Checkpoint | str | None = None,
    as_json: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """``measure``, print the report on stdout, then raise GateFailed if a gate failed (all are named)."""
    report = measure(
        bundles,
        against=against,
        runtime=runtime,
        num_prompts=num_prompts,
        gates=gates,
        unquantized=unquantized,
        progress=progress,
    )
    print_report(report, as_json=as_json)
    report.check()
    return report


def measure(
    bundles: Sequence[Bundle | str | Path],
    *,
    against: Checkpoint | str | None = None,
    runtime: str | None = None,
    num_prompts: int | None = None,
    gates: Mapping[str, float] | None = None,
    unquantized: Checkpoint | str | None = None,
    isolate: bool | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Measure every gap of every bundle; what fails is in the report, not raised.

    ``against`` is the checkpoint; by default the one that the manifest names, if it is there and its hash is
    the manifest's. ``runtime`` is by default the bundle's own. ``gates`` replaces limits by name
    (parity_report.GATE_NAMES). ``unquantized`` is the float checkpoint of quantized bundles; by default the
    one that their checkpoint names, if it is there. ``isolate`` gives the originals and each runtime a
    process of its own (edgeflow.parity_isolated), by default where a bundle is large. ``progress`` is told
    what is being measured.

    Raises BundleError, CheckpointError (also when ``against`` is not what a bundle was exported from),
    UsageError for more prompts than there are, UnknownNameError, and BackendMissing before anything is
    measured.
    """
    asked, say = check_gates(gates or {}), progress or (lambda text: None)
    if not bundles:
        raise ValueError("expected at least one bundle")
    opened = [b if isinstance(b, Bundle) else Bundle.open(b) for b in bundles]
    for bundle in opened:
        registry.runtime(runtime or bundle.manifest.backend)
    given = Checkpoint.open(against) if isinstance(against, str) else against
    floats = Checkpoint.open(unquantized) if isinstance(unquantized, str) else unquantized
    sources = [find_checkpoint(bundle, given) for bundle in opened]
    isolate = parity_isolated.is_large(opened) if isolate is None else isolate
    quantized: Any = quantization_rows
    if isolate:
        quantized = partial(worker.call, "parity", "edgeflow.parity_quantization:quantization_rows")
    rows: list[Measurement] = []
    notes: list[str] = []
    references: dict[tuple[str, tuple[str, ...], str], Reference] = {}
    held_to: dict[tuple[str, tuple[str, ...], str], Limits] = {}
    for bundle, label, (checkpoint, reason) in zip(opened, labels(opened), sources, strict=True):
        spec = bundle.generation
        attention = bundle.manifest.settings.get("attention", FUSED)
        model = (spec.checkpoint_hash, spec.prompts, attention)
        reference = references.get(model)
        if checkpoint is None:
            reference = reference_from_bundle(bundle, num_prompts, reason)
        elif reference is None:
            say(f"{spec.name}: references in PyTorch")
            if isolate:
                reference = parity_isolated.isolated_reference(checkpoint, bundle, num_prompts)
            else:
                reference = reference_from_checkpoint(checkpoint, spec.prompts, num_prompts, attention)
        if model not in references:
            known = any(key[:2] == model[:2] for key in references)
            references[model] = reference
            say(f"{spec.name}: rewrite")
            lost = quantized(bundle, checkpoint, reference, floats)
            held_to[model] = limits(asked, bundle.manifest.recipe, lost)
            rows += _rewrite(spec, reference, held_to[model], attention)
            rows += [] if known else lost
            notes += [] if known else _notes(spec, reference, held_to[model])
        say(f"{label}: {runtime or bundle.manifest.backend}")
        rows += _bundle_rows(bundle, label, runtime, reference, held_to[model], isolate)
    return ParityReport(tuple(rows), _versions(rows), tuple(notes))


def labels(bundles: Iterable[Bundle]) -> list[str]:
    """A short name for each bundle: its folder's, with as many parents as it takes to tell them apart."""
    parts = [bundle.root.resolve().parts[1:] for bundle in bundles]

    def tail(own: tuple[str, ...]) -> tuple[str, ...]:
        lengths = range(1, len(own))
        return next((own[-n:] for n in lengths if sum(p[-n:] == own[-n:] for p in set(parts)) == 1), own)

    return ["/".join(tail(own)) for own in parts]


# --- gaps -----------------------------------------------------------------------------------------------


def _rewrite(
    spec: GenerationSpec, reference: Reference, held_to: Limits, attention: str
) -> list[Measurement]:
    """Original ↔ export-ready, per component; a row that says so where the originals are not there.

    Export-ready modules in the Neural Engine's layout are another rewrite, with rows under another name.
    """
    blank = model_row(REWRITE, spec, reference.prompts, reference.reason)
    if attention != FUSED:
        blank = replace(blank, model=f"{spec.name}, {attention}")
    if reference.against != CHECKPOINT:
        return [blank]
    rows = []
    for graph in (*COMPONENTS, PIPELINE):
        original = [_original(reference, graph, sample, spec) for sample in reference.samples]
        for metric in ("sqnr_db", "max_abs"):
            pairs = zip(original, reference.samples, strict=True)
            values = tuple(_METRICS[metric](array, sample.output(graph)) for array, sample in pairs)
            gate = held_to.of(REWRITE, graph, metric, "fp32")
            row = replace(blank, component=graph, against=CHECKPOINT, metric=metric, gate=gate, values=values)
            rows.append(replace(row, status=judged(row), reason=None))
    return rows


def _original(reference: Reference, graph: str, sample: Sample, spec: GenerationSpec) -> NDArray[Any]:
    """The untouched modules' output; the pipeline's is at hand, being what end to end compares with."""
    if graph == PIPELINE:
        return sample.picture
    if graph in sample.originals:
        return sample.originals[graph]
    assert reference.components is not None
    return reference.components[graph].run_original(sample.inputs(graph, spec.timestep))[OUTPUTS[graph]]


def _bundle_rows(
    bundle: Bundle,
    label: str,
    runtime: str | None,
    reference: Reference,
    held_to: Limits,
    isolate: bool,
) -> list[Measurement]:
    """Lowering for each graph, then end to end. A runtime that fails is a failed row; the rest goes on."""
    spec, precision = bundle.generation, bundle.manifest.precision

    def blank(gap: str, graph: str, metric: str) -> Measurement:
        return Measurement(
            gap=gap,
            model=spec.name,
            checkpoint=spec.checkpoint_hash,
            bundle=label,
            runtime=runtime or bundle.manifest.backend,
            precision=precision,
            component=graph,
            against=reference.against,
            metric=metric,
            gate=held_to.of(gap, graph, metric, precision),
            prompts=reference.prompts,
            values=(),
            status=FAIL,
        )

    rows = [blank(LOWERING, graph, "sqnr_db") for graph in graphs_of(bundle)]
    picture = blank(END_TO_END, PIPELINE, "psnr_db")
    try:
        if isolate:
            return _judge_in_turn(bundle, runtime, rows, picture, reference.samples)
        drawn = _Drawn(load_runtime(bundle, runtime), bundle)
    except RuntimeFailure as error:
        unmeasured = replace(picture, status=UNMEASURED, reason="the runtime did not load")
        return [replace(rows[0], component="all", reason=str(error)), unmeasured]
    return [drawn.judge(row, reference.samples) for row in (*rows, picture)]


def _judge_in_turn(
    bundle: Bundle,
    runtime: str | None,
    rows: Sequence[Measurement],
    picture: Measurement,
    samples: Sequence[Sample],
) -> list[Measurement]:
    """One graph in memory at a time, each loaded once. Raises RuntimeFailure where one does not load."""
    held: Any = parity_isolated.InTurn(bundle, runtime)
    drawn, known = _Drawn(held, bundle), {}
    for row in sorted(rows, key=lambda row: (*COMPONENTS, PIPELINE).index(row.component)):
        with held.turn(row.component):
            known[row.component] = drawn.judge(row, samples)
            drawn.judge(picture, samples)  # as far as the graphs that have had their turn
    return [*(known[row.component] for row in rows), drawn.judge(picture, samples)]


class _Drawn:
    """A loaded runtime and what it has drawn: a fused graph's output is both a lowering and a picture."""

    def __init__(self, runtime: Runtime, bundle: Bundle):
        self.runtime, self.spec, self.fused = runtime, bundle.generation, is_fused(bundle)
        self._pictures: dict[int, NDArray[Any]] = {}

    def judge(self, row: Measurement, samples: Sequence[Sample]) -> Measurement:
        """The row with its values and status, or FAIL and what the runtime says."""
        compare = self._lowering if row.gap == LOWERING else self._end_to_end
        try:
            values = tuple(compare(row, seed, sample) for seed, sample in enumerate(samples))
        except (RuntimeFailure, ValueError) as error:
            return replace(row, reason=str(error))
        row = replace(row, values=values)
        return replace(row, status=judged(row))

    def _lowering(self, row: Measurement, seed: int, sample: Sample) -> float:
        graph = row.component
        reference = sample.output(graph)
        if graph == PIPELINE:
            actual = self._picture(seed, sample)
        else:
            actual = self.runtime.run(graph, sample.inputs(graph, self.spec.timestep))[OUTPUTS[graph]]
        if actual.dtype == np.uint8:  # the graph rounds by itself, so the reference is rounded the same way
            reference = np.rint(reference * 255)
        return _METRICS[row.metric](reference, actual)

    def _end_to_end(self, row: Measurement, seed: int, sample: Sample) -> float:
        picture = self._picture(seed, sample)
        unit = picture / np.float32(255) if picture.dtype == np.uint8 else picture
        return _METRICS[row.metric](sample.picture, unit)

    def _picture(self, seed: int, sample: Sample) -> NDArray[Any]:
        if seed not in self._pictures:
            ids, noise = sample.arrays["input_ids"], sample.arrays["noise"]
            self._pictures[seed] = run_pipeline(self.runtime, self.spec, ids, noise, fused=self.fused)
        return self._pictures[seed]


# --- what the report says besides -----------------------------------------------------------------------


def _notes(spec: GenerationSpec, reference: Reference, held_to: Limits) -> list[str]:
    notes = []
    if unlimited := sorted({graph for (graph, _), limit in held_to.rounded.items() if limit is None}):
        notes.append(
            f"{spec.name}: inputs of layers are rounded, and how much that costs was not measured: "
            f"{', '.join(unlimited)} not gated"
        )
    if reference.against == CHECKPOINT:
        return notes
    return [
        *notes,
        f"{spec.name}: {reference.reason}: measured against each bundle's own {reference.against} "
        "(export-ready modules, eager fp32, as they were when it was exported); the rewrite is not measured",
    ]


def _versions(rows: Sequence[Measurement]) -> dict[str, str]:
    """edgeflow's version and those of what was in fact used."""
    versions = {"edgeflow": __version__, "numpy": np.__version__}
    names = {row.runtime for row in rows if row.values}
    if any(row.against == CHECKPOINT for row in rows):
        for package in TORCH_PACKAGES:
            versions[package] = str(importlib.import_module(package).__version__)
    for name in names:
        package, _, version = backend_version(name).partition(" ")
        versions[package] = version
    return versions
