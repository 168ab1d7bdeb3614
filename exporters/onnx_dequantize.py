"""``edgeflow::dequantize`` as ONNX's ``DequantizeLinear`` (opset 21): int8 per axis, int4 in blocks.

``edgeflow::quantize_activation`` is ``QuantizeLinear`` and ``DequantizeLinear``.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import onnx_ir as ir
from onnxscript import opset21 as op

from edgeflow.exporters.program import Program, dequantize_op, quantize_activation_op

_INTEGERS = {4: (ir.DataType.INT4, ml_dtypes.int4), 8: (ir.DataType.INT8, "int8")}


def _translate(q: Any, scale: Any, zero_point: Any, bits: int) -> Any:
    """A node that is still without its axis, block and narrow integers: constants are filled in later."""
    arguments = (q, scale) if zero_point is None else (q, scale, zero_point)
    return op.DequantizeLinear(*arguments, axis=1, block_size=0)


def _translate_activation(x: Any, scale: Any, zero_point: Any) -> Any:
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)


TRANSLATIONS = {dequantize_op(): _translate, quantize_activation_op(): _translate_activation}


def settle(model: ir.Model, program: Program) -> None:
    """Give every DequantizeLinear its axis or block, and its constants their true width."""
    widths = _widths(program)
    done: set[str] = set()
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        q, scale, *zero_point = node.inputs
        if q is not None and q.producer() is not None:  # an activation's
            continue
        assert q is not None and scale is not None and q.name is not None
        bits, scales = widths[q.name], _constant(scale)
        blocks = bits == 4 or scales.size > len(scales)  # also where a group is all input channels
        for value in (q, *(z for z in zero_point if z is not None)):
            if value.name not in done:
                kind, dtype = _INTEGERS[bits]
                array = _constant(value)
                shape = array.shape if blocks or value is q else (-1,)
                _replace(value, array.reshape(shape).astype(dtype), kind)
        if not blocks and scale.name not in done:
            _replace(scale, scales.reshape(-1), ir.DataType.FLOAT)
        done |= {str(value.name) for value in node.inputs if value is not None}
        del node.attributes["block_size"]
        if blocks:
            size = q.shape[1] // scales.shape[1]  # type: ignore[index, operator]
            node.attributes["block_size"] = ir.AttrInt64("block_size", size)
        else:
            node.attributes["axis"] = ir.AttrInt64("axis", 0)


def _widths(program: Program) -> dict[str, int]:
    """Name of the integers' tensor, which is its initializer's, → bits."""
    buffers = program.exported.graph_signature.inputs_to_buffers
    nodes = program.exported.graph_module.graph.find_nodes(op="call_function", target=dequantize_op())
    return {buffers[node.args[0].name]: node.args[3] for node in nodes}


def _constant(value: ir.Value) -> Any:
    assert value.const_value is not None, value.name
    return value.const_value.numpy()


def _replace(value: ir.Value, array: Any, kind: ir.DataType) -> None:
    value.const_value = ir.tensor(array, dtype=kind, name=value.name)
    value.dtype, value.shape = kind, ir.Shape(array.shape)
