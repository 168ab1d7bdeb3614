"""The two halves of an export that hold weights: reference outputs, and one graph lowered.

Where the model is large, the reference and each graph have a process of their own (edgeflow.worker), which
ends with them, and a ``Source`` in it; a graph's reads that graph's weights alone and lowers it for every
backend that was asked for, from one program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflow import overflow, registry
from edgeflow.apple import FUSED
from edgeflow.checkpoint import Checkpoint
from edgeflow.low_memory import give_back
from edgeflow.overflow import Range, Wide
from edgeflow.spec import COMPONENTS, PIPELINE, GraphSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeflow.components import Component
    from edgeflow.exporters.program import Program

#: Bytes of fp32 weights from which on each step of an export has a process of its own.
LARGE = 1 << 30


def is_large(checkpoint: Checkpoint) -> bool:
    """Whether the weights, in fp32, are so many that each step deserves a process of its own."""
    return sum(fp32_bytes(checkpoint).values()) >= LARGE


def fp32_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Part → bytes of its weights in fp32, from the headers."""
    return {p: 4 * checkpoint.num_parameters(p) for p in checkpoint.parts if p != "tokenizer"}


@dataclass
class Source:
    """Components and programs of a checkpoint, each made once; ``names`` are the components to read."""

    checkpoint: Checkpoint
    picture: str
    names: tuple[str, ...] = (*COMPONENTS, PIPELINE)
    attention: str = FUSED
    _components: dict[str, Component] = field(default_factory=dict)
    _programs: dict[str, Program] = field(default_factory=dict)

    def component(self, name: str) -> Component:
        """The component, its picture in float32."""
        from edgeflow.components import load_components

        if not self._components:
            self._components = load_components(
                self.checkpoint, names=self.names, attention=self.attention, merged=True
            )
        return self._components[name]

    def program(self, name: str) -> Program:
        """The component's program, its picture as asked for."""
        from edgeflow.components import with_picture
        from edgeflow.exporters.program import build_program

        if name not in self._programs:
            component = self.component(name)
            whole = with_picture(component, self.picture) if name == PIPELINE else component
            self._programs[name] = build_program(whole)
        return self._programs[name]

    def lower(
        self,
        graph: str,
        backend: str,
        folder: Path,
        precision: str,
        layout: str,
        wide: Wide,
        settings: Mapping[str, Any] | None = None,
    ) -> GraphSpec:
        """One graph through one backend, into ``folder``; see edgeflow.registry.Exporter.

        ``settings`` are the exporter's own, as its constructor takes them.
        """
        program = replace(self.program(graph), wide=wide)
        exporter = registry.exporter(backend, **(settings or {}))
        try:
            return exporter.lower(program, folder, precision=precision, layout=layout)
        finally:
            give_back()


def reference(
    source: Source, graphs: Sequence[str], num_prompts: int
) -> tuple[dict[str, NDArray[Any]], dict[str, list[Range]]]:
    """Seeded inputs and the export-ready modules' fp32 outputs, by ``prompt{i}/{graph}/{tensor}``.

    And the ranges of ``graphs``, over these prompts. Components are run one after the other, all prompts
    through each. Raises ExportError naming the first value that is not finite.
    """
    import numpy as np

    from edgeflow.noise import gaussian_noise
    from edgeflow.parity_reference import OUTPUTS, Sample
    from edgeflow.tokenizer import ClipTokenizer

    spec = source.checkpoint.generation
    tokenizer = ClipTokenizer.from_folder(spec.tokenizer_dir)
    samples = []
    for i, prompt in enumerate(spec.prompts[:num_prompts]):
        noise = gaussian_noise(i, (1, *spec.latent_shape))
        samples.append(Sample(prompt, {"input_ids": tokenizer.encode(prompt), "noise": noise}, noise))
    ranges: dict[str, list[Range]] = {}
    for graph in (*COMPONENTS, PIPELINE):
        component = source.component(graph)
        program = source.program(graph) if graph in graphs else None
        runs = []
        for sample in samples:
            outputs, found = _outputs(component, program, sample.inputs(graph, spec.timestep))
            runs.append(found)
            made: dict[str, Any] = sample.arrays  # type: ignore[assignment]  # filled in as it goes
            made[f"{graph}/{OUTPUTS[graph]}"] = outputs[OUTPUTS[graph]]
            if graph == "unet":
                latent = (sample.arrays["noise"] + made["unet/velocity"]) / np.float32(spec.latent_scale)
                made["decoder/latent"] = latent
        ranges[graph] = overflow.merged(runs)
    return {f"prompt{i}/{k}": v for i, s in enumerate(samples) for k, v in s.arrays.items()}, ranges


def _outputs(component: Component, program: Program | None, inputs: Any) -> tuple[dict[str, np.ndarray], Any]:
    from edgeflow.exporters.ranges import run_recorded

    if program is None:
        return component.run(inputs), []
    outputs, found = run_recorded(program, inputs)
    if program.spec != component.spec:  # it rounds its picture to bytes
        outputs = component.run(inputs)
    return outputs, found


def finish(backend: str, folder: Path, layout: str) -> None:
    """What a backend's own clients need besides graphs and configs, into the bundle's ``folder``."""
    registry.exporter(backend).finish(folder, layout)  # type: ignore[attr-defined]
