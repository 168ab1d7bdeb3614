"""``edgeflow::dequantize`` as OpenVINO's compressed constant: i8 or i4 → Convert → [Subtract] → Multiply.

A weight in groups is cut along an axis of its own, (O, I, …) → (O, G, I/G, …), so that scales broadcast, and
brought back by a Reshape. In an fp16 bundle all of this is float16, with a Convert to float32 at the end, as
OpenVINO's own weight compression writes it.

``edgeflow::quantize_activation`` is ``FakeQuantize`` of 256 levels between the grid's ends.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import openvino
import openvino.opset13 as ops
from numpy.typing import NDArray
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.op import Constant

from edgeflow.exporters.program import Program

#: torch.export's name of the op.
_TARGET = "edgeflow.dequantize.default"
_INPUT_TARGET = "edgeflow.quantize_activation.default"
_TYPES = {4: openvino.Type.i4, 8: openvino.Type.i8}


def convert_quantized(program: Program, precision: str) -> openvino.Model:
    """The program in OpenVINO's operations; ``precision``, fp32 or fp16, is the scales'.

    This is ``openvino.convert_model`` less the optimizations that it ends with: these fold a factor before a
    convolution into its weight, and the integers are gone. A device optimizes by itself when it compiles.
    """
    frontend = FrontEndManager().load_by_framework("pytorch")
    floats = "f16" if precision == "fp16" else "f32"
    frontend.add_extension(ConversionExtension(_TARGET, partial(_dequantize, floats)))
    frontend.add_extension(ConversionExtension(_INPUT_TARGET, _quantize_activation))
    with _quiet():
        decoder = TorchFXPythonDecoder.from_exported_program(program.exported)
    loaded = frontend.load(decoder)  # it holds no reference to the decoder, which must outlive it
    return frontend.convert(loaded)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The decoder warns, with tracebacks, of decompositions that torch no longer has."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _dequantize(floats: str, context: Any) -> Any:
    q, scale, zero_point, bits = (_array(context.get_input(i)) for i in range(4))
    assert q is not None and scale is not None and bits is not None
    shape, kind = q.shape, _TYPES[int(bits)]
    if scale.shape[1] > 1:
        q = q.reshape(shape[0], scale.shape[1], -1, *shape[2:])
        scale = np.expand_dims(scale, 2)
        zero_point = None if zero_point is None else np.expand_dims(zero_point, 2)
    weight = ops.convert(_constant(q, kind), floats)
    if zero_point is not None:
        weight = ops.subtract(weight, ops.convert(_constant(zero_point, kind), floats))
    weight = ops.multiply(weight, ops.constant(scale.astype(np.float16 if floats == "f16" else np.float32)))
    if q.shape != shape:
        weight = ops.reshape(weight, ops.constant(np.array(shape, np.int64)), False)
    return (weight if floats == "f32" else ops.convert(weight, "f32")).outputs()


def _quantize_activation(context: Any) -> Any:
    scale, zero_point = (_array(context.get_input(i)) for i in (1, 2))
    assert scale is not None and zero_point is not None
    low, high = (ops.constant(np.float32((q - int(zero_point)) * np.float32(scale))) for q in (0, 255))
    return ops.fake_quantize(context.get_input(0), low, high, low, high, 256).outputs()


def _array(output: Any) -> NDArray[Any] | None:
    """The constant's value, or None for an argument that is None."""
    node = output.get_node()
    return np.array(node.data) if node.get_type_name() == "Constant" else None


def _constant(values: NDArray[np.int8], kind: openvino.Type) -> Any:
    if kind != openvino.Type.i4:
        return ops.constant(values, dtype=kind)
    flat = values.reshape(-1).astype(np.uint8) & 15
    flat = np.pad(flat, (0, flat.size % 2))
    packed = flat[0::2] | (flat[1::2] << 4)  # the first value lies in the low four bits
    return Constant(openvino.Tensor(packed, list(values.shape), kind), shared_memory=False)
