"""Parity of a large model: the originals in a process of their own, component by component.

The export-ready modules' outputs are those that the bundle carries: its export computed them from the very
checkpoint that its manifest names, and opening the bundle has verified them. That saves two runs a prompt.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

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
    """For each sample graph → the untouched modules' output; one component's weights at a time.

    The pipeline's is what the components make of each other's outputs. A component that is fed the very array
    that the reference fed it is not run again.
    """
    import torch

    from edgeflow.components import load_components, to_unit

    timestep, scale = checkpoint.generation.timestep, np.float32(checkpoint.generation.latent_scale)
    found: list[dict[str, NDArray[Any]]] = [{} for _ in samples]
    chains = [{key: sample.arrays[key] for key in ("input_ids", "noise")} for sample in samples]
    for graph in COMPONENTS:
        component = load_components(checkpoint, names=(graph,))[graph]
        for sample, own, chain in zip(samples, found, chains, strict=True):
            fed, chained = (s.inputs(graph, timestep) for s in (sample, replace(sample, arrays=chain)))
            own[graph] = output = component.run_original(fed)[OUTPUTS[graph]]
            if not all(np.array_equal(chained[name], array) for name, array in fed.items()):
                output = component.run_original(chained)[OUTPUTS[graph]]
            chain[f"{graph}/{OUTPUTS[graph]}"] = output
            if graph == "unet":
                chain["decoder/latent"] = (chain["noise"] + output) / scale
        del component
        gc.collect()
    for own, chain in zip(found, chains, strict=True):
        own[PIPELINE] = to_unit(torch.from_numpy(chain["decoder/image"])).numpy()
    return found
