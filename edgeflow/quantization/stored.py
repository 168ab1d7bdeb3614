"""How a quantized weight lies in a checkpoint's safetensors, read from headers alone. Torch-free.

Where a float checkpoint has ``<layer>.weight``, a quantized one has

- ``<layer>.weight_q``: I8 in the weight's own shape for 8 bits; for 4 bits U8 with axis 1 half as long, two
  integers a byte: input channel 2k in the low four bits, 2k + 1 in the high four, both two's complement;
- ``<layer>.weight_scale``: F16, as many axes as the weight, one entry a block;
- ``<layer>.weight_zero_point``: I8 in the scale's shape, where the scheme has one;
- or, in place of both, ``<layer>.weight_palette``, F16, a table of 2^bits; ``weight_q`` is then U8 in the
  weight's own shape, an index a byte;
- ``<layer>.input_scale``, F16, and ``<layer>.input_zero_point``, U8, of one value each, where the layer's
  input is rounded to uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgeflow.errors import CheckpointError
from edgeflow.weights import StoredTensor

INTEGERS, SCALE, ZERO_POINT = ".weight_q", ".weight_scale", ".weight_zero_point"
INPUT_SCALE, INPUT_ZERO_POINT = ".input_scale", ".input_zero_point"
PALETTE = ".weight_palette"
#: What a quantized layer has besides its integers; none of it is a weight.
ENDS = (INTEGERS, SCALE, ZERO_POINT, PALETTE, INPUT_SCALE, INPUT_ZERO_POINT)
#: safetensors' dtype of stored integers → their bits.
BITS = {"I8": 8, "U8": 4}


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer of a checkpoint; ``shape`` is the weight's, not the packed one."""

    bits: int
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    zero_point: bool
    palette: bool = False  # integers are indices into a table of ``scale_shape``
    activations: bool = False  # its input is rounded to uint8

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def quantized_layers(tensors: Mapping[str, StoredTensor], where: object) -> dict[str, StoredLayer]:
    """Layer → how it is stored, over one part's tensors; empty for a float part.

    Raises CheckpointError for integers without a scale, a scale without integers, or shapes or dtypes that do
    not fit together; ``where`` names the part.
    """
    layers = {}
    for name in tensors:
        for end in ENDS:
            layer = name.removesuffix(end)
            if layer != name and layer not in layers:
                layers[layer] = _layer(layer, tensors, where)
    return layers


def _layer(layer: str, tensors: Mapping[str, StoredTensor], where: object) -> StoredLayer:
    def fail(reason: str) -> CheckpointError:
        return CheckpointError(f"checkpoint: {where}: quantized layer {layer!r}: {reason}")

    q, scale, zero = (tensors.get(layer + end) for end in (INTEGERS, SCALE, ZERO_POINT))
    palette = tensors.get(layer + PALETTE)
    if palette is not None:
        return _palettized(layer, tensors, palette, fail)
    if q is None or scale is None:
        missing = INTEGERS if q is None else SCALE
        raise fail(f"expected the tensor {layer + missing}, found none")
    if layer + ".weight" in tensors:
        raise fail("expected integers or a float weight, got both")
    if q.dtype not in BITS or scale.dtype != "F16" or (zero is not None and zero.dtype != "I8"):
        got = ", ".join(t.dtype for t in (q, scale, zero) if t is not None)
        raise fail(f"expected integers in {' or '.join(BITS)}, scale in F16, zero point in I8, got {got}")
    bits, shape = BITS[q.dtype], q.shape
    if len(shape) < 2 or len(scale.shape) != len(shape):
        raise fail(f"expected integers and scale of two axes or more each, got {shape} and {scale.shape}")
    if bits == 4:
        shape = (shape[0], 2 * shape[1], *shape[2:])
    if scale.shape[0] != shape[0] or any(s < 1 or n % s for n, s in zip(shape, scale.shape, strict=True)):
        raise fail(f"expected a scale that divides {shape}, one row an output channel, got {scale.shape}")
    if zero is not None and zero.shape != scale.shape:
        raise fail(f"expected a zero point of the scale's shape {scale.shape}, got {zero.shape}")
    grid = [tensors.get(layer + end) for end in (INPUT_SCALE, INPUT_ZERO_POINT)]
    given = [t and (t.dtype, t.shape) for t in grid]
    if given not in ([None, None], [("F16", ()), ("U8", ())]):
        raise fail(f"expected an input scale () in F16 with a zero point () in U8, or neither, got {given}")
    return StoredLayer(bits, shape, scale.shape, zero is not None, False, grid[0] is not None)


def _palettized(
    layer: str,
    tensors: Mapping[str, StoredTensor],
    palette: StoredTensor,
    fail: Callable[[str], CheckpointError],
) -> StoredLayer:
    q = tensors.get(layer + INTEGERS)
    others = [end for end in (SCALE, ZERO_POINT, INPUT_SCALE, ".weight") if layer + end in tensors]
    bits = {64: 6, 16: 4}.get(palette.numel)
    if q is None or q.dtype != "U8" or others:
        got = [*(["no indices"] if q is None else [q.dtype]), *others]
        raise fail(f"expected indices in U8 and a palette alone, got {', '.join(got)}")
    if bits is None or palette.dtype != "F16" or len(palette.shape) != 1:
        raise fail(f"expected a palette of 16 or 64 values in F16, got {palette.dtype} {palette.shape}")
    return StoredLayer(bits, q.shape, palette.shape, False, palette=True)
