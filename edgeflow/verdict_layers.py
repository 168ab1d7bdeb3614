"""What of a model ran at which precision: its graphs, and its quantized layers."""

from __future__ import annotations

from typing import Any

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.verdict import Layer


def graphs_of(model: Bundle | Checkpoint) -> tuple[dict[str, Any], ...]:
    """A bundle's graphs with their tensors' dtypes, as the manifest promises them; none for a checkpoint."""
    if not isinstance(model, Bundle):
        return ()
    return tuple(
        {
            "name": graph.name,
            "file": graph.file,
            "inputs": {t.name: t.dtype for t in graph.inputs},
            "outputs": {t.name: t.dtype for t in graph.outputs},
        }
        for graph in model.manifest.graphs
    )


def layers_of(model: Bundle | Checkpoint, source: Checkpoint | None = None) -> tuple[Layer, ...]:
    """The quantized layers of a checkpoint, in its own order.

    ``source`` is the float checkpoint that it was made from: each weight's SQNR is then measured.
    """
    if not isinstance(model, Checkpoint) or model.quantization is None:
        return ()
    parts = {"text_encoder": "text_encoder", "unet": "unet", "decoder": "vae"}
    found = []
    for component, part in parts.items():
        sqnr = _weight_sqnr(model, source, part) if source is not None else {}
        for name, layer in model.quantized_layers(part).items():
            found.append(Layer(component, name, layer.bits, layer.shape, sqnr.get(name)))
    return tuple(found)


def _weight_sqnr(model: Checkpoint, source: Checkpoint, part: str) -> dict[str, float]:
    """Layer → SQNR of its weight in dB: float ↔ what its integers and scales stand for."""
    import torch
    from safetensors.numpy import load_file

    from edgeflow.metrics import sqnr_db
    from edgeflow.quantization.apply import load_integers
    from edgeflow.quantization.layers import dequantize

    floats = {n: t for file in source.weight_files(part) for n, t in load_file(file).items()}
    known = {name.removeprefix("text_model."): tensor for name, tensor in floats.items()}
    out, layers = {}, model.quantized_layers(part)
    for name, stored in load_integers(model, part).items():
        weight = known.get(f"{name}.weight")
        if weight is None:
            continue
        tensors = {key: torch.from_numpy(value) for key, value in stored.items()}
        if "palette" in tensors:
            back = tensors["palette"].float()[tensors["q"].long()]
        else:
            scale, zero = tensors["scale"].float(), tensors.get("zero_point")
            back = dequantize(tensors["q"], scale, zero, layers[name].bits)
        out[name] = sqnr_db(weight, back.numpy())
    return out
