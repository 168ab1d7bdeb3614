"""What a checkpoint or a bundle is, as data. Reads headers and manifests, never weights; torch-free."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import EdgeflowError
from edgeflow.generate import default_runtime, open_model
from edgeflow.quantization.stored import ENDS

#: safetensors' names of dtypes in NumPy's and torch's words.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def describe(source: str | Path, *, fused: bool | None = None) -> dict[str, Any]:
    """All that is known of a checkpoint or a bundle, ready for JSON; ``what`` says which of the two it is.

    Opening verifies what opening always does: whole files in a checkpoint, every hash in a bundle.
    ``fused`` counts a bundle's operations where they run (edgeflow.fusions): by default where its graphs are
    small and its backend is installed. Raises BundleError, CheckpointError or UnknownNameError, and with
    ``fused`` what the backend's absence or refusal raises.
    """
    model = open_model(source)
    if isinstance(model, Bundle):
        return {**describe_bundle(model), "operations": _operations(model, fused)}
    return describe_checkpoint(model)


def _operations(bundle: Bundle, fused: bool | None) -> dict[str, Any] | None:
    from edgeflow.fusions import fusions

    if fused is False:
        return None
    try:
        found = fusions(bundle, large=fused is True)
    except EdgeflowError:
        if fused:
            raise
        return None
    return None if found is None else {graph: each.as_dict() for graph, each in found.items()}


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's facts and, per part, class, parameters, dtypes and bytes."""
    facts = checkpoint.facts
    parts = [_part(checkpoint, part) for part in checkpoint.parts]
    drawing: dict[str, Any] = {"picture_size": facts.get("picture_size")}
    if checkpoint.kind != "autoencoder":
        spec = checkpoint.generation
        drawing = {
            "picture_size": spec.picture_size,
            "latent_shape": list(spec.latent_shape),
            "latent_scale": spec.latent_scale,
            "max_tokens": spec.max_tokens,
            "runtime": default_runtime(checkpoint),
        }
    return {
        "what": "checkpoint",
        "name": checkpoint.name,
        "path": str(checkpoint.root),
        "kind": checkpoint.kind,
        "steps": facts["steps"],
        "guidance": facts["guidance"],
        **drawing,
        "licence": facts["licence"],
        "origin": facts["origin"],
        "hash": checkpoint.hash,
        "parameters": sum(part["parameters"] for part in parts),
        "bytes": sum(part["bytes"] for part in parts),
        "parts": parts,
        "prompts": list(facts["prompts"]),
        "training": facts.get("training"),
        "quantization": checkpoint.quantization,
    }


def _part(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """One part; ``dtypes`` maps each dtype to the number of weights stored in it (scales are no weights)."""
    dtypes: Counter[str] = Counter()
    if part != "tokenizer":
        for dtype, count in _weights(checkpoint, part):
            dtypes[dtype] += count
    return {
        "name": part,
        "class": checkpoint.class_name(part),
        "parameters": dtypes.total(),
        "dtypes": dict(dtypes.most_common()),
        "bytes": sum(path.stat().st_size for path in checkpoint.files(part)),
    }


def _weights(checkpoint: Checkpoint, part: str) -> Iterator[tuple[str, int]]:
    layers = checkpoint.quantized_layers(part)
    for layer in layers.values():
        yield f"{'table' if layer.palette else 'int'}{layer.bits}", layer.numel
    for name, tensor in checkpoint.stored_tensors(part).items():
        if not name.endswith(ENDS):
            yield _DTYPES.get(tensor.dtype, tensor.dtype), tensor.numel


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """A bundle's manifest, with its folder and sizes summed up."""
    manifest = bundle.manifest
    return {
        "what": "bundle",
        "path": str(bundle.root),
        "backend": manifest.backend,
        "precision": manifest.precision,
        "layout": manifest.layout,
        "runtime": default_runtime(bundle),
        "model": manifest.model,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "graph_bytes": bundle.graph_bytes(),
        "graphs": [dataclasses.asdict(graph) for graph in manifest.graphs],
        "files": {name: dataclasses.asdict(entry) for name, entry in manifest.files.items()},
        "versions": manifest.versions,
        "recipe": manifest.recipe,
        "settings": manifest.settings,
    }
