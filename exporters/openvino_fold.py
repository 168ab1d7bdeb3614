"""Arithmetic on constants, done before a model is saved: shapes above all, conversions of a type to itself.

OpenVINO's own folding would fold the weights' decompression as well (see openvino_dequantize.py), so this one
leaves every constant below 32 bits alone, and whatever would grow. What is left out need not be described.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino.opset13 as ops

#: Outputs of so many values may be larger than what they are made of: a shape, an axis.
_SMALL = 64
_INTEGERS = {openvino.Type.i32: np.int32, openvino.Type.i64: np.int64}
_WHOLE = {*_INTEGERS, openvino.Type.f32, openvino.Type.boolean}


def fold_constants(model: Any) -> None:
    """Put constants in the place of what is known without running the model, in place."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and _same_type(node):
            node.output(0).replace(node.input_value(0))
        elif (value := _known(node)) is not None:
            value.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(value.output(0))


def _same_type(node: Any) -> bool:
    return node.input_value(0).get_element_type() == node.get_output_element_type(0)


def _known(node: Any) -> Any | None:
    """The constant that a node of one output gives, or None where it takes a run or is better computed."""
    if node.get_output_size() != 1 or node.get_type_name() in ("Constant", "Parameter", "Result"):
        return None
    kind, shape = node.get_output_element_type(0), node.get_output_partial_shape(0)
    if node.get_type_name() == "ShapeOf":
        given = node.get_input_partial_shape(0)
        return ops.constant(np.array(given.to_shape(), _INTEGERS[kind])) if given.is_static else None
    sources = [port.get_node() for port in node.input_values()]
    if not sources or shape.is_dynamic or kind not in _WHOLE:
        return None
    if any(s.get_type_name() != "Constant" or s.get_element_type() not in _WHOLE for s in sources):
        return None
    size = int(np.prod(list(shape.to_shape()), dtype=np.int64))
    if size > max(_SMALL, *(s.data.size for s in sources)):
        return None
    inputs = [openvino.Tensor(s.data if s.data.ndim else np.array(s.data)) for s in sources]
    output = [openvino.Tensor(kind, shape.to_shape())]
    if not node.evaluate(output, inputs):
        return None
    return ops.constant(np.array(output[0].data), dtype=kind)
