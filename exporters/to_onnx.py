"""Lower a program to ONNX, with torch's own exporter.

fp16 is a graph whose weights and activations are float16 between float32 inputs and outputs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import torch

from edgeflow.errors import ExportError
from edgeflow.exporters import onnx_dequantize, onnx_norm
from edgeflow.exporters.layouts import DIFFUSERS, graph_spec
from edgeflow.exporters.program import Program
from edgeflow.exporters.regions import Op, wide_ops
from edgeflow.overflow import Wide
from edgeflow.spec import GraphSpec

#: 21 has LayerNormalization that sums in float32, and blocked DequantizeLinear.
OPSET = 21
#: A protobuf file ends at 2 GiB; beyond this many bytes of weights they go to one file beside the graph.
INLINE_BYTES = 1 << 30
_NOTHING = Wide()
#: Inputs that the standard keeps float32 whatever the data's type: Resize's roi and scales.
_FLOAT32_INPUTS = {"Resize": (1, 2)}


class OnnxExporter:
    """``<folder>/model.onnx``, and ``model.onnx.data`` beside it for more than a GiB of weights."""

    backend: ClassVar[str] = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    tools: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnx-ir")

    def lower(self, program: Program, folder: Path, *, precision: str, layout: str) -> GraphSpec:
        """See edgeflow.registry.Exporter."""
        spec = graph_spec(program.spec, layout, DIFFUSERS, "/model.onnx")
        model = _convert(program, spec)
        onnx_dequantize.settle(model, program)
        _strip(model)
        if precision == "fp16":
            to_half(model, program.wide)
        path = folder / spec.file
        path.parent.mkdir(parents=True)
        weights = [value.const_value for value in model.graph.initializers.values()]
        size = sum(weight.nbytes for weight in weights if weight is not None)
        ir.save(model, path, external_data=f"{path.name}.data" if size > INLINE_BYTES else None)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"export: onnx: {spec.name}: the checker refuses the graph: {error}") from error
        for value in model.graph.initializers.values():
            value.const_value = None  # torch's exporter keeps the last graph's values, and with them weights
        return spec


def _convert(program: Program, spec: GraphSpec) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is not there
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            converted = torch.onnx.export(
                program.exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=[t.key for t in spec.inputs],
                output_names=[t.key for t in spec.outputs],
                custom_translation_table={**onnx_dequantize.TRANSLATIONS, **onnx_norm.TRANSLATIONS},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"export: onnx: {spec.name}: {reason}") from error
    assert converted is not None
    return converted.model


def _strip(model: ir.Model) -> None:
    """Drop what the exporter records of the machine it ran on: stack traces and source paths."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "edgeflow"
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def to_half(model: ir.Model, wide: Wide = _NOTHING) -> None:
    """Turn the graph's float32 weights and activations into float16, its inputs and outputs apart.

    What ``wide`` names stays float32, with Casts around it.
    """
    graph = model.graph
    single = _single_nodes(graph, wide)
    kept = {
        node.inputs[i]
        for node in graph
        for i in _FLOAT32_INPUTS.get(node.op_type, ())
        if i < len(node.inputs) and node.inputs[i] is not None
    }
    floats = _float_values(graph) if single else set()
    kept |= {value for node in single for value in node.outputs}
    for value in graph.initializers.values():
        if single and any(use.node in single for use in value.uses()):
            kept.add(value)
        if value.dtype == ir.DataType.FLOAT and value not in kept:
            _halve_initializer(value)
    for node in graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value not in kept:
                value.dtype = ir.DataType.FLOAT16
        to_float = node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT
        if to_float and node not in single:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    _cast_inputs(graph)
    _cast_between(graph, single, floats)
    _cast_outputs(graph)


def _float_values(graph: ir.Graph) -> set[ir.Value]:
    made = {value for node in graph for value in node.outputs}
    return {v for v in (made | set(graph.initializers.values())) if v.dtype == ir.DataType.FLOAT}


def _single_nodes(graph: ir.Graph, wide: Wide) -> set[ir.Node]:
    """The nodes that stay float32. A graph's output, which got another name, is the value before it."""
    sums = {node for node in graph if node.op_type == onnx_norm.SINGLE}
    if not wide:
        return sums
    nodes = {f"{i}": node for i, node in enumerate(graph)}

    def names(values: Iterable[ir.Value | None]) -> tuple[str, ...]:
        return tuple(str(v.name) for v in values if v is not None and v.dtype == ir.DataType.FLOAT)

    ops = [Op(key, names(node.inputs), names(node.outputs)) for key, node in nodes.items()]
    found = wide_ops(ops, wide, graph.initializers, squares=False)
    return sums | {nodes[key] for key in found}


def _cast_between(graph: ir.Graph, single: set[ir.Node], floats: set[ir.Value]) -> None:
    """Casts where a value changes its width; the weights of both widths are cast for the float16 side."""
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph) if single else ():
        for i, value in enumerate(node.inputs):
            if value is None or i in _FLOAT32_INPUTS.get(node.op_type, ()):
                continue
            if value not in floats and not str(value.name).endswith("_float16"):
                continue
            wanted = ir.DataType.FLOAT if node in single else ir.DataType.FLOAT16
            if value.dtype == wanted or node.op_type == "Cast":
                continue
            if (value, wanted) not in casts:
                made = _cast(value, wanted, f"{value.name}_{wanted.name.lower()}")
                graph.insert_before(node, made)
                casts[value, wanted] = made.outputs[0]
            node.replace_input_with(i, casts[value, wanted])


def _halve_initializer(value: ir.Value) -> None:
    assert value.const_value is not None
    limit = float(np.finfo(np.float16).max)
    array = value.const_value.numpy()
    weights = torch.from_numpy(array if array.flags.writeable else array.copy())
    half = weights.clamp(-limit, limit).half().numpy()  # NumPy rounds a number at a time, torch eight
    value.const_value = ir.tensor(half, name=value.name)
    value.dtype = ir.DataType.FLOAT16


def _cast(source: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [source], {"to": dtype}, name=f"node_{name}")
    out = node.outputs[0]
    out.name, out.dtype, out.shape = name, dtype, source.shape
    return node


def _cast_inputs(graph: ir.Graph) -> None:
    for value in graph.inputs:
        if value.dtype != ir.DataType.FLOAT:
            continue
        uses = list(value.uses())
        node = _cast(value, ir.DataType.FLOAT16, f"{value.name}_float16")
        graph.insert_before(graph[0], node)
        for user, index in uses:
            user.replace_input_with(index, node.outputs[0])


def _cast_outputs(graph: ir.Graph) -> None:
    for i, value in enumerate(graph.outputs):
        if value.dtype != ir.DataType.FLOAT16:
            continue
        name = value.name
        value.name = f"{name}_float16"
        node = _cast(value, ir.DataType.FLOAT, str(name))
        graph.append(node)
        graph.outputs[i] = node.outputs[0]
