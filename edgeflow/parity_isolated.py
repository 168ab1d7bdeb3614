"""Parity of a large model: the originals and runtimes in processes of their own, by component.

The export-ready modules' outputs are those that the bundle carries: its export computed them from the very
checkpoint that its manifest names, and opening the bundle has verified them. That saves two runs a prompt.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflow import worker
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import RuntimeFailure
from edgeflow.parity_reference import CHECKPOINT, OUTPUTS, Reference, Sample, reference_from_bundle
from edgeflow.spec import COMPONENTS, PIPELINE

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes of a bundle's graphs from which on its runtime has a process of its own.
LARGE_GRAPHS = 1 << 29


def is_large(bundles: list[Bundle]) -> bool:
    return any(bundle.graph_bytes() >= LARGE_GRAPHS for bundle in bundles)


class InTurn:
    """A runtime that holds one graph of a bundle at a time, loaded as it always loads it, in its own process.

    What a graph has answered stays known when its turn is over, so that a chain of graphs asked for in every
    turn gets one further each time.
    """

    def __init__(self, bundle: Bundle, runtime: str | None):
        self.name = runtime or bundle.manifest.backend
        self._bundle, self._runtime = bundle, runtime
        self._turn: tuple[str, Any] | None = None
        self._answers: list[tuple[str, Mapping[str, NDArray[Any]], Any]] = []

    @contextmanager
    def turn(self, graph: str) -> Iterator[None]:
        """Hold ``graph`` while the block runs. Raises RuntimeFailure where it does not load."""
        with worker.worker(f"runtime {self.name}: graph {graph}") as child:
            child.call("edgeflow.generate:load_runtime", self._bundle.only(graph), self._runtime, hold=True)
            self._turn = graph, worker.Held(child)
            try:
                yield
            finally:
                self._turn = None

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays. Raises RuntimeFailure for what is not known out of a graph's turn."""
        for known, fed, answer in self._answers:
            if known == graph and all(np.array_equal(fed[name], array) for name, array in inputs.items()):
                if isinstance(answer, Exception):
                    raise answer
                return dict(answer)
        if self._turn is None or self._turn[0] != graph:
            raise RuntimeFailure(
                f"runtime {self.name}: graph {graph}: expected it loaded, it is not its turn"
            )
        try:
            answer = self._turn[1].run(graph, inputs)
        except (RuntimeFailure, ValueError) as error:
            self._answers.append((graph, inputs, error))
            raise
        self._answers.append((graph, inputs, answer))
        return dict(answer)


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
