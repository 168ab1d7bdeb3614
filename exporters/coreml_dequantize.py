"""``edgeflow::dequantize`` as Core ML's ``constexpr_blockwise_shift_scale`` (iOS 18).

``edgeflow::quantize_activation`` is ``quantize`` and ``dequantize``, ``edgeflow::look_up`` is
``constexpr_lut_to_dense``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil import register_torch_op
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.mil import types

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
    kind = types.nptype_from_builtin(types.string_to_builtin(f"int{int(bits)}"))
    offset = {} if zero_point is None else {"offset": zero_point.astype(kind)}
    weight = mb.constexpr_blockwise_shift_scale(data=q.astype(kind), scale=scale, name=node.name, **offset)
    context.add(weight)


def edgeflow_look_up(context: Any, node: Any) -> None:
    indices, palette = _get_inputs(context, node, expected=[2])
    assert indices.val is not None and palette.val is not None
    kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{len(palette.val).bit_length() - 1}"))
    table = palette.val.reshape(*(1,) * indices.val.ndim, -1, 1)  # one table for the whole weight
    context.add(mb.constexpr_lut_to_dense(indices=indices.val.astype(kind), lut=table, name=node.name))


def edgeflow_quantize_activation(context: Any, node: Any) -> None:
    x, scale, zero_point = _get_inputs(context, node, expected=[3])
    assert scale.val is not None and zero_point.val is not None
    grid = {"scale": np.float32(scale.val), "zero_point": np.uint8(zero_point.val)}
    q = mb.quantize(input=x, output_dtype="uint8", **grid)
    context.add(mb.dequantize(input=q, name=node.name, **grid))
