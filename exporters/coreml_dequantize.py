"""``edgeflow::dequantize`` as Core ML's ``constexpr_blockwise_shift_scale`` (iOS 18).

For an earlier target, 8 bits a channel are ``constexpr_affine_dequantize`` (iOS 16); edgeflow.apple knows
which target a program needs. ``edgeflow::quantize_activation`` is ``quantize`` and ``dequantize`` (iOS 17),
``edgeflow::look_up`` is ``constexpr_lut_to_dense`` in the form of iOS 18 or, before, of iOS 16.
"""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil import register_torch_op
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with
from numpy.typing import NDArray

#: What coremltools makes of the op's name, by its version.
_ALIASES = ["edgeflow::dequantize", "edgeflow.dequantize"]
_LOOK_UP_ALIASES = ["edgeflow::look_up", "edgeflow.look_up"]
_INPUT_ALIASES = ["edgeflow::quantize_activation", "edgeflow.quantize_activation"]


def register() -> None:
    """Tell coremltools' PyTorch frontend how to take the op; more than once is the same as once."""
    register_torch_op(edgeflow_dequantize, torch_alias=_ALIASES, override=True)
    register_torch_op(edgeflow_look_up, torch_alias=_LOOK_UP_ALIASES, override=True)
    register_torch_op(edgeflow_quantize_activation, torch_alias=_INPUT_ALIASES, override=True)


def edgeflow_dequantize(context: Any, node: Any) -> None:
    inputs = _get_inputs(context, node, expected=[4])
    q, scale, zero_point, bits = (None if v is None else v.val for v in inputs)
    assert q is not None and bits is not None
    if not _has(ct.target.iOS18):
        assert int(bits) == 8 and scale is not None and scale.size == q.shape[0] and zero_point is None
        channels = {"scale": scale.reshape(-1), "zero_point": np.int8(0), "axis": 0}
        weight = mb.constexpr_affine_dequantize(quantized_data=q.astype(np.int8), name=node.name, **channels)
        context.add(weight)
        return
    kind = types.nptype_from_builtin(types.string_to_builtin(f"int{int(bits)}"))
    offset = {} if zero_point is None else {"offset": zero_point.astype(kind)}
    weight = mb.constexpr_blockwise_shift_scale(data=q.astype(kind), scale=scale, name=node.name, **offset)
    context.add(weight)


def edgeflow_look_up(context: Any, node: Any) -> None:
    indices, palette = _get_inputs(context, node, expected=[2])
    assert indices.val is not None and palette.val is not None
    bits = len(palette.val).bit_length() - 1
    if not _has(ct.target.iOS18):
        packed = _packed(indices.val, bits)
        shape = np.array(indices.val.shape, np.uint32)
        context.add(mb.constexpr_lut_to_dense(indices=packed, lut=palette.val, shape=shape, name=node.name))
        return
    kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
    table = palette.val.reshape(*(1,) * indices.val.ndim, -1, 1)  # one table for the whole weight
    context.add(mb.constexpr_lut_to_dense(indices=indices.val.astype(kind), lut=table, name=node.name))


def _has(target: Any) -> bool:
    """Whether the program that is being built may use the operations of ``target``."""
    return bool(is_current_opset_version_compatible_with(target))


def _packed(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Indices one after the other, each from its least significant bit on."""
    flat = np.unpackbits(indices.reshape(-1, 1).astype(np.uint8), axis=1, bitorder="little")[:, :bits]
    return np.packbits(flat, bitorder="little")


def edgeflow_quantize_activation(context: Any, node: Any) -> None:
    x, scale, zero_point = _get_inputs(context, node, expected=[3])
    assert scale.val is not None and zero_point.val is not None
    grid = {"scale": np.float32(scale.val), "zero_point": np.uint8(zero_point.val)}
    q = mb.quantize(input=x, output_dtype="uint8", **grid)
    context.add(mb.dequantize(input=q, name=node.name, **grid))
