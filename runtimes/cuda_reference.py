"""The CUDA runtime: a checkpoint compiled here, or a bundle compiled ahead of time, as one captured graph.

It needs an NVIDIA GPU of the Ampere generation or later and falls back to nothing: what cannot be compiled,
captured or trusted is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeflow import gpu_device
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import RuntimeFailure
from edgeflow.runtimes import checks
from edgeflow.runtimes.cuda_compile import CompiledCheckpoint, How
from edgeflow.runtimes.cuda_graph import Captured
from edgeflow.runtimes.cuda_package import load_package
from edgeflow.spec import GraphSpec


class CudaReference:
    """A checkpoint's graphs (pipeline, whose picture is uint8, text_encoder, unet, decoder), or a bundle's.

    A checkpoint's are compiled when they are first run. ``facts`` names the chip and what was chosen on it.
    """

    name: ClassVar[str] = "cuda"
    precision: ClassVar[str] = "fp16"
    device: ClassVar[str] = "cuda"

    def __init__(
        self,
        graphs: Mapping[str, GraphSpec],
        build: Callable[[str], Callable[..., Tensor]],
        facts: dict[str, str],
    ):
        self._graphs, self._build, self._facts = dict(graphs), build, facts
        self._functions: dict[str, Callable[..., Tensor]] = {}

    @classmethod
    def load(cls, source: Any) -> CudaReference:
        """Load a one-step checkpoint, or a bundle of the backend cuda.

        Raises DeviceMissing without a CUDA device, RuntimeFailure for one that is too old, for another
        backend's bundle, and for one that was compiled for another chip or torch.
        """
        if not isinstance(source, Checkpoint):
            checks.expect_bundle("cuda", source)
        chip = gpu_device.require_chip()
        facts = {"gpu": chip.name, "capability": "{}.{}".format(*chip.capability), "cuda": chip.cuda}
        if isinstance(source, Bundle):
            return cls.packaged(source, facts)
        if source.kind != "one-step":
            raise RuntimeFailure(
                f"runtime cuda: {source.name}: expected a one-step model, got kind {source.kind!r}, "
                "which cannot be drawn in one step"
            )
        return cls.compiled(source, How(precision=cls.precision), facts)

    @classmethod
    def compiled(cls, checkpoint: Checkpoint, how: How, facts: dict[str, str]) -> CudaReference:
        """A checkpoint's graphs, built as ``how`` says."""
        made = CompiledCheckpoint(checkpoint, how)
        made.facts.update(facts, compiled="here")
        graphs = {
            name: GraphSpec(name, "", c.spec.inputs, c.spec.outputs) for name, c in made.components.items()
        }
        return cls(graphs, made.build, made.facts)

    @classmethod
    def packaged(cls, bundle: Bundle, facts: dict[str, str], device: str = "cuda") -> CudaReference:
        """A bundle's graphs, loaded at once. Raises RuntimeFailure as ``load``."""
        functions = {g.name: load_package(bundle, g, device) for g in bundle.manifest.graphs}
        facts = {**facts, "precision": bundle.manifest.precision, "compiled": "ahead of time"}
        return cls({g.name: g for g in bundle.manifest.graphs}, functions.__getitem__, facts)

    @property
    def facts(self) -> dict[str, str]:
        """The chip, and what was chosen on it by the graphs run so far."""
        return dict(self._facts)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see ``edgeflow.spec.GraphSpec`` for the names and shapes."""
        spec = checks.pick_graph(self._graphs, graph)
        arrays = checks.feed(spec, inputs)
        if graph not in self._functions:
            self._functions[graph] = self._build(graph)
        tensors = [torch.from_numpy(arrays[t.key]) for t in spec.inputs]
        function = self._functions[graph]
        try:
            with torch.no_grad():
                output = (function.on_host if isinstance(function, Captured) else function)(*tensors)
        except torch.OutOfMemoryError as error:
            raise RuntimeFailure(f"runtime cuda: graph {graph}: out of GPU memory") from error
        return checks.collect(self.name, spec, {spec.outputs[0].key: output.numpy()})


class CudaBfloat16(CudaReference):
    """The same in bfloat16: no value overflows, three bits less of each."""

    name: ClassVar[str] = "cuda-bf16"
    precision: ClassVar[str] = "bf16"
