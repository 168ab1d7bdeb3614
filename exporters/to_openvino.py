"""Lower a program to OpenVINO's IR. fp16 stores the weights as float16; a device computes as it is told."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from edgeflow.telemetry import no_telemetry

with no_telemetry():
    import openvino

from edgeflow.bundle import TOKENIZER
from edgeflow.errors import ExportError
from edgeflow.exporters.layouts import DIFFUSERS, graph_spec
from edgeflow.exporters.openvino_dequantize import convert_quantized
from edgeflow.exporters.openvino_fold import fold_constants
from edgeflow.exporters.openvino_tokenizer import check_installed, write_tokenizer
from edgeflow.exporters.program import Program, has_quantized_weights
from edgeflow.spec import GraphSpec, TensorSpec

COMPONENTS_LAYOUT = "components"


class OpenVinoExporter:
    """``<folder>/openvino_model.xml`` and ``.bin``."""

    backend: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    tools: ClassVar[tuple[str, ...]] = ("openvino", "openvino-tokenizers")

    def lower(self, program: Program, folder: Path, *, precision: str, layout: str) -> GraphSpec:
        """See edgeflow.registry.Exporter."""
        spec = graph_spec(program.spec, layout, DIFFUSERS, "/openvino_model.xml")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), no_telemetry():
            warnings.simplefilter("ignore")
            try:
                if has_quantized_weights(program):
                    model = convert_quantized(program, precision)
                else:
                    model = openvino.convert_model(program.exported)
            except Exception as error:  # the frontend raises bare exceptions
                reason = str(error).strip().splitlines()[0]
                raise ExportError(f"export: openvino: {spec.name}: {reason}") from error
        _make_static(model, spec)
        if layout == COMPONENTS_LAYOUT:
            spec = _take_int64(model, spec)
        if has_quantized_weights(program):  # the converter has folded the others
            fold_constants(model)
        _name(model, spec)
        path = folder / spec.file
        path.parent.mkdir(parents=True)
        openvino.save_model(model, path, compress_to_fp16=precision == "fp16")
        _unindent(path)
        return spec

    def check(self, layout: str) -> None:
        """Raises BackendMissing where something is absent that only this layout needs."""
        if layout == COMPONENTS_LAYOUT:
            check_installed()

    def finish(self, folder: Path, layout: str) -> None:
        """What OpenVINO GenAI needs besides the graphs, whose tokenizer it runs as graphs too."""
        if layout == COMPONENTS_LAYOUT:
            write_tokenizer(folder / TOKENIZER)


def _unindent(path: Path) -> None:
    """A sixth of the description is white space between tags, which no reader looks at."""
    path.write_text(re.sub(r">\s+<", "><", path.read_text(encoding="utf-8")), encoding="utf-8")


def _take_int64(model: Any, spec: GraphSpec) -> GraphSpec:
    """Token ids and the timestep as int64: what GenAI's tokenizer gives and its schedulers feed."""
    settings = openvino.preprocess.PrePostProcessor(model)
    inputs = list(spec.inputs)
    for i, tensor in enumerate(spec.inputs):
        if tensor.name in ("input_ids", "timestep"):
            settings.input(i).tensor().set_element_type(openvino.Type.i64)
            inputs[i] = replace(tensor, dtype="int64")
    settings.build()
    return replace(spec, inputs=tuple(inputs))


def _make_static(model: Any, spec: GraphSpec) -> None:
    """The frontend leaves dimensions open that the program fixes."""
    model.reshape({i: list(t.shape) for i, t in enumerate(spec.inputs)})
    model.validate_nodes_and_infer_types()


def _name(model: Any, spec: GraphSpec) -> None:
    """Give inputs and outputs their names, and nodes names without the process-wide counters they got."""
    model.set_friendly_name(spec.name)
    for op in model.get_ops():
        for output in op.outputs():
            output.get_tensor().set_names(set())
    for i, op in enumerate(model.get_ordered_ops()):
        if "/" not in op.get_friendly_name() or op.get_type_name() == "Constant":
            op.set_friendly_name(f"{op.get_type_name()}_{i}")
    ports: list[tuple[Any, TensorSpec]] = [
        *zip(model.inputs, spec.inputs, strict=True),
        *zip(model.outputs, spec.outputs, strict=True),
    ]
    for port, tensor in ports:
        port.get_tensor().set_names({tensor.key})
    for parameter, tensor in zip(model.get_parameters(), spec.inputs, strict=True):
        parameter.set_friendly_name(tensor.key)
    for result, tensor in zip(model.get_results(), spec.outputs, strict=True):
        result.set_friendly_name(f"{tensor.key}/result")
