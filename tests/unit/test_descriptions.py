"""Descriptions of graphs are made shorter: what a graph computes stays, and so do compressed weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
ct = pytest.importorskip("coremltools")

import openvino.opset13 as ops  # noqa: E402

from edgeflow.exporters.coreml_names import shorten_constants  # noqa: E402
from edgeflow.exporters.openvino_fold import fold_constants  # noqa: E402


def quantized_model() -> Any:
    """y = reshape(x, rows × 4) · (int8 → f32 · scale)ᵀ + bias, with detours through constants."""
    x = ops.parameter([2, 3, 4], np.float32, name="x")
    shape = ops.shape_of(x, "i64")
    rows = ops.reduce_prod(ops.gather(shape, np.array([0, 1]), np.array(0)), np.array(0), keep_dims=True)
    flat = ops.reshape(x, ops.concat([rows, np.array([4])], 0), False)
    q = ops.constant(np.arange(20, dtype=np.int8).reshape(5, 4) - 9)
    weight = ops.multiply(ops.convert(q, "f32"), ops.constant(np.full((5, 1), 0.25, np.float32)))
    bias = ops.convert(ops.constant(np.arange(5, dtype=np.float32)), "f32")  # of a type to itself
    y = ops.add(ops.matmul(flat, weight, False, True), ops.broadcast(bias, np.array([1, 5])))
    return ov.Model([y], [x], "m")


def kinds(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def test_constants_are_folded_and_weights_stay_compressed() -> None:
    model = quantized_model()
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    before = ov.compile_model(model, "CPU")([x])[0]
    fold_constants(model)
    model.validate_nodes_and_infer_types()
    found = kinds(model)
    assert not {"ShapeOf", "Gather", "ReduceProd", "Concat", "Broadcast"} & set(found)
    assert found["Convert"] == found["Multiply"] == 1  # the weight's decompression
    assert ov.Type.i8 in {n.get_element_type() for n in model.get_ops() if n.get_type_name() == "Constant"}
    np.testing.assert_array_equal(ov.compile_model(model, "CPU")([x])[0], before)


def test_a_shape_that_a_run_decides_is_left_alone() -> None:
    x = ops.parameter([-1, 4], np.float32, name="x")
    model = ov.Model([ops.shape_of(x)], [x], "m")
    fold_constants(model)
    assert kinds(model)["ShapeOf"] == 1


def program() -> Any:
    """x + bias, x + other: two constants with long names, one called like the scheme's own first choice."""
    model = ct.proto.Model_pb2.Model()
    function = model.mlProgram.functions["main"]
    function.inputs.add().name = "c0"
    block = function.block_specializations["CoreML8"]
    for name in ("a_long_name_to_fp16", "another_long_name_to_fp16"):
        op = block.operations.add(type="const")
        op.outputs.add().name = name
        op.attributes["name"].immediateValue.tensor.strings.values.append(name)
    for i, name in enumerate(("a_long_name_to_fp16", "another_long_name_to_fp16")):
        op = block.operations.add(type="add")
        op.outputs.add().name = ("middle", "y")[i]
        op.inputs["x"].arguments.add().name = ("c0", "middle")[i]
        op.inputs["y"].arguments.add().name = name
    block.outputs.append("y")
    return model


def test_constants_get_brief_names_and_nothing_else_does() -> None:
    model = program()
    shorten_constants(model)
    first, second, add, last = model.mlProgram.functions["main"].block_specializations["CoreML8"].operations
    assert [op.outputs[0].name for op in (first, second, add, last)] == ["c1", "c2", "middle", "y"]
    assert first.attributes["name"].immediateValue.tensor.strings.values[0] == "c1"
    assert [add.inputs[k].arguments[0].name for k in "xy"] == ["c0", "c1"]
    assert [last.inputs[k].arguments[0].name for k in "xy"] == ["middle", "c2"]
