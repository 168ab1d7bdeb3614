"""The quantization gap: the float checkpoint ↔ the quantized one, both export-ready and in eager fp32.

Every component is fed the quantized reference's own inputs, so that no error comes from another; the pipeline
is fed ids and noise, and its picture is what a recipe's own gates limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeflow import metrics
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, EdgeflowError
from edgeflow.parity_reference import OUTPUTS, Reference, is_local
from edgeflow.parity_report import QUANTIZATION, Measurement, judged, model_row
from edgeflow.quantization.recipe import rounded_components
from edgeflow.spec import COMPONENTS, PIPELINE

if TYPE_CHECKING:
    from edgeflow.components import Component

#: What the rows say they are measured against.
FLOAT_CHECKPOINT = "float checkpoint"


def quantization_rows(
    bundle: Bundle, checkpoint: Checkpoint | None, reference: Reference, given: Checkpoint | None
) -> list[Measurement]:
    """SQNR of every component and PSNR of the picture, once a model; nothing for a bundle without a recipe.

    Max abs too of what rounded activations reach: parity's other limits follow from it (parity_limits).

    ``checkpoint`` is the one the bundle was exported from, ``given`` the float one where it was named; by
    default it is the source that the checkpoint names, if that is there, else one row says why it is not.
    Raises CheckpointError when ``given`` is not what was quantized.
    """
    recipe, spec = bundle.manifest.recipe, bundle.generation
    if recipe is None:
        return []
    blank = model_row(QUANTIZATION, spec, reference.prompts)
    source, reason = _source(checkpoint, reference, given)
    if source is None:
        return [replace(blank, reason=reason)]
    from edgeflow.components import load_components

    components = load_components(source)
    rows = []
    for graph in (*COMPONENTS, PIPELINE):
        outputs = _outputs(components[graph], graph, reference, spec.timestep)
        for metric in _metrics(graph, rounded_components(recipe)):
            gate = recipe.get("gates", {}).get(metric) if graph == PIPELINE else None
            pairs = zip(outputs, reference.samples, strict=True)
            values = tuple(_compare(metric, floats, sample.output(graph)) for floats, sample in pairs)
            row = replace(
                blank, component=graph, against=FLOAT_CHECKPOINT, metric=metric, gate=gate, values=values
            )
            rows.append(replace(row, status=judged(row)))
    return rows


def _metrics(graph: str, rounded: Sequence[str]) -> list[str]:
    picture = ["psnr_db"] if graph == PIPELINE else []
    reached = ["max_abs"] if rounded and graph in (*rounded, PIPELINE) else []
    return ["sqnr_db", *picture, *reached]


def _outputs(component: Component, graph: str, reference: Reference, timestep: float) -> list[Any]:
    return [component.run(sample.inputs(graph, timestep))[OUTPUTS[graph]] for sample in reference.samples]


def _compare(metric: str, floats: Any, quantized: Any) -> float:
    if metric == "psnr_db":
        return metrics.psnr_db(floats, quantized, peak=1.0)
    return metrics.max_abs(floats, quantized) if metric == "max_abs" else metrics.sqnr_db(floats, quantized)


def _source(
    checkpoint: Checkpoint | None, reference: Reference, given: Checkpoint | None
) -> tuple[Checkpoint | None, str | None]:
    """The float checkpoint, or None and why not."""
    if checkpoint is None or checkpoint.quantization is None:
        return None, reference.reason
    source: Mapping[str, str] = checkpoint.quantization["source"]
    name, expected = source["name"], source["hash"]
    if given is not None:
        if given.hash != expected:
            raise CheckpointError(
                f"parity: {checkpoint.name}: expected the checkpoint it was quantized from, "
                f"{expected[:12]}…, got {given.name}, {given.hash[:12]}…"
            )
        return given, None
    absent = f"the float checkpoint {name} is absent; name it with --unquantized"
    try:
        found = Checkpoint.open(name) if is_local(name) else None
    except EdgeflowError as error:
        return None, f"{absent} ({error})"
    if found is None or found.hash != expected:
        return None, absent
    return found, None
