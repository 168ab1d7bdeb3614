"""Parity of a large model: the originals in a process of their own, component by component.

The export-ready modules' outputs are those that the bundle carries: its export computed them from the very
checkpoint that its manifest names, and opening the bundle has verified them. That saves two runs a prompt.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeflow import worker
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.parity_reference import CHECKPOINT, OUTPUTS, Reference, Sample, reference_from_bundle
from edgeflow.spec import COMPONENTS, PIPELINE

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes of a bundle's graphs from which on its runtime has a process of its own.
LARGE_GRAPHS = 1 << 29


def is_large(bundles: list[Bundle]) -> bool:
    return any(bundle.graph_bytes() >= LARGE_GRAPHS for bundle in bundles)


def isolated_reference(checkpoint: Checkpoint, bundle: Bundle, num_prompts: int | None) -> Reference:
    """The bundle's own references, and the untouched modules' outputs on the same inputs."""
    carried = reference_from_bundle(bundle, num_prompts, None)
    module = "edgeflow.parity_isolated:originals"
    found = worker.call("parity: originals", module, checkpoint, carried.samples)
    samples = tuple(
        replace(sample, originals=own, picture=own[PIPELINE])
        for sample, own in zip(carried.samples, found, strict=True)
    )
    return Reference(CHECKPOINT, samples, None, None)


def originals(checkpoint: Checkpoint, samples: tuple[Sample, ...]) -> list[dict[str, NDArray[Any]]]:
    """For each sample graph → the untouched modules' output; one component's weights at a time."""
    from edgeflow.components import load_components

    found: list[dict[str, NDArray[Any]]] = [{} for _ in samples]
    for graph in (*COMPONENTS, PIPELINE):
        component = load_components(checkpoint, names=(graph,))[graph]
        for sample, own in zip(samples, found, strict=True):
            inputs = sample.inputs(graph, checkpoint.generation.timestep)
            own[graph] = component.run_original(inputs)[OUTPUTS[graph]]
        del component
        gc.collect()
    return found
