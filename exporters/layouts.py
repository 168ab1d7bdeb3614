"""Where graphs lie in a bundle and what their tensors are called there.

Layout ``pipeline`` is edgeflow's own. Layout ``components`` takes the names that the ecosystem's own
pipelines look for: diffusers and optimum (ONNX), optimum-intel and OpenVINO GenAI (OpenVINO), Apple's
Swift package (Core ML).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edgeflow.components import ComponentSpec
from edgeflow.spec import COMPONENTS, PIPELINE, GraphSpec, TensorSpec

LAYOUTS = (PIPELINE, "components")


@dataclass(frozen=True)
class Place:
    """The folder (or package stem) of a graph, and the tensor names that differ from edgeflow's."""

    stem: str
    keys: dict[str, str] = field(default_factory=dict)


DIFFUSERS = {
    PIPELINE: Place("pipeline"),
    "text_encoder": Place("text_encoder"),
    "unet": Place("unet", {"velocity": "out_sample"}),
    "decoder": Place("vae_decoder", {"latent": "latent_sample", "image": "sample"}),
}
APPLE = {
    PIPELINE: Place("Pipeline"),
    "text_encoder": Place("TextEncoder"),
    "unet": Place("Unet", {"velocity": "noise_pred"}),
    "decoder": Place("VAEDecoder", {"latent": "z"}),
}


def graphs_of(layout: str) -> tuple[str, ...]:
    """The components that a layout holds. Raises ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; known: {LAYOUTS}")
    return (PIPELINE,) if layout == PIPELINE else COMPONENTS


def graph_spec(spec: ComponentSpec, layout: str, places: dict[str, Place], suffix: str) -> GraphSpec:
    """The component's spec in its place: ``<stem><suffix>``, with the tensor names of that place."""
    if spec.name not in graphs_of(layout):
        raise ValueError(f"layout {layout!r} holds {graphs_of(layout)}, not {spec.name!r}")
    place = places[spec.name]

    def keyed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(t, key=place.keys.get(t.name, t.name)) for t in tensors)

    return GraphSpec(spec.name, place.stem + suffix, keyed(spec.inputs), keyed(spec.outputs))
