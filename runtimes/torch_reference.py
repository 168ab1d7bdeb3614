"""The reference: the untouched modules of diffusers and transformers in eager float32 PyTorch.

It draws from a checkpoint, not from a bundle, so an end-to-end comparison holds an exported artifact against
what the checkpoint was before any rewrite or lowering.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from edgeflow.checkpoint import Checkpoint
from edgeflow.components import Component, load_components
from edgeflow.errors import RuntimeFailure
from edgeflow.runtimes import checks
from edgeflow.spec import GraphSpec


class TorchReference:
    """Runs a checkpoint's graphs: text_encoder, unet, decoder, and pipeline (picture in float32 [0, 1])."""

    name: ClassVar[str] = "torch"

    def __init__(self, components: Mapping[str, Component]):
        self._components = dict(components)
        self._graphs = {
            name: GraphSpec(name, "", c.spec.inputs, c.spec.outputs) for name, c in components.items()
        }

    @classmethod
    def load(cls, source: Any) -> TorchReference:
        """Load a one-step checkpoint's modules in float32.

        Raises RuntimeFailure for a bundle or for a model that needs many steps, ExportError for a part of a
        class edgeflow does not know, CheckpointError for weights that cannot be loaded.
        """
        _expect_one_step(source)
        return cls(load_components(source))

    @classmethod
    def load_one(cls, source: Any, graph: str) -> TorchReference:
        """Load the weights of one graph alone; otherwise as ``load``."""
        _expect_one_step(source)
        return cls(load_components(source, names=(graph,)))

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see ``edgeflow.spec.GraphSpec`` for the names and shapes."""
        spec = checks.pick_graph(self._graphs, graph)
        arrays = checks.feed(spec, inputs)  # a component's keys are its names
        return checks.collect(self.name, spec, self._components[graph].run_original(arrays))


def _expect_one_step(source: Any) -> None:
    if not isinstance(source, Checkpoint):
        raise RuntimeFailure(
            f"runtime torch: expected a checkpoint, got a {type(source).__name__.lower()}; "
            "the torch runtime draws from the checkpoint that the bundle was exported from"
        )
    if source.kind != "one-step":
        raise RuntimeFailure(
            f"runtime torch: {source.name}: expected a one-step model, got kind {source.kind!r}, "
            "which cannot be drawn in one step"
        )
