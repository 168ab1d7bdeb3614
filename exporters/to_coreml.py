"""Lower a program to a Core ML ML Program package. Converts and saves on any machine."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

logging.getLogger("coremltools").setLevel(logging.ERROR)  # off macOS it reports each missing native part

import coremltools as ct  # noqa: E402

from edgeflow.errors import ExportError  # noqa: E402
from edgeflow.exporters import coreml_chunks, coreml_dequantize  # noqa: E402
from edgeflow.exporters.coreml_names import shorten_constants  # noqa: E402
from edgeflow.exporters.coreml_speed import quickly  # noqa: E402
from edgeflow.exporters.layouts import APPLE, graph_spec  # noqa: E402
from edgeflow.exporters.program import Program  # noqa: E402
from edgeflow.exporters.regions import Op, wide_ops  # noqa: E402
from edgeflow.overflow import Wide  # noqa: E402
from edgeflow.spec import GraphSpec  # noqa: E402

_PRECISION = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
#: A map from the program's nodes for a debugger, which the package's manifest does not name.
_DEBUG_FILE = "executorch_debug_handle_mapping.json"
_SPEC_FILE = "com.apple.CoreML/model.mlmodel"

coreml_dequantize.register()


class CoreMLExporter:
    """``<Name>.mlpackage``."""

    backend: ClassVar[str] = "coreml"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    palettes: ClassVar[bool] = True  # look-up tables, of schemes w6 and w4
    squares_norms: ClassVar[bool] = True  # group norms are taken apart, and their squares rounded
    tools: ClassVar[tuple[str, ...]] = ("coremltools",)

    def __init__(self, target: str = "iOS18", chunks: int = 1):
        """``target`` is one of edgeflow.apple.TARGETS; ``chunks``: how many packages a UNet is cut into."""
        self.target, self.chunks = target, chunks

    def lower(self, program: Program, folder: Path, *, precision: str, layout: str) -> GraphSpec:
        """See edgeflow.registry.Exporter."""
        spec = graph_spec(program.spec, layout, APPLE, ".mlpackage")
        if any(t.dtype == "uint8" for t in spec.outputs):
            raise ExportError(f"export: coreml: {spec.name}: Core ML has no uint8; expected float32")
        package = folder / spec.file
        _convert(program, spec, precision, self.target).save(str(package))
        _settle_spec(package / "Data" / _SPEC_FILE, spec)
        _settle_manifest(package / "Manifest.json")
        (package / _DEBUG_FILE).unlink(missing_ok=True)
        return _in_chunks(spec, folder) if self.chunks == 2 and spec.name == "unet" else spec


def _in_chunks(spec: GraphSpec, folder: Path) -> GraphSpec:
    """The package cut in two, in its place."""
    whole = folder / spec.file
    names = tuple(f"{whole.stem}Chunk{i}{whole.suffix}" for i in (1, 2))
    coreml_chunks.cut(whole, folder / names[0], folder / names[1])
    shutil.rmtree(whole)
    return replace(spec, file=names[0], chunks=names)


def _convert(program: Program, spec: GraphSpec, precision: str, target: str) -> ct.models.MLModel:
    quiet = io.StringIO()  # its progress bars know no switch
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with quickly():
                model = ct.convert(
                    program.exported.run_decompositions({}),
                    outputs=[ct.TensorType(name=t.key, dtype=np.float32) for t in spec.outputs],
                    convert_to="mlprogram",
                    compute_precision=_compute_precision(precision, program.wide),
                    minimum_deployment_target=getattr(ct.target, target),
                    skip_model_load=True,
                )
        except (NotImplementedError, ValueError, RuntimeError, TypeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"export: coreml: {spec.name}: {reason}") from error
    return model


def _compute_precision(precision: str, wide: Wide) -> Any:
    """coremltools' name for it; where some operations stay float32, its rule for each operation."""
    if precision != "fp16" or not wide:
        return _PRECISION[precision]
    single: dict[int, set[str]] = {}

    def is_half(op: Any) -> bool:
        block = op.enclosing_block
        if id(block) not in single:  # before the pass has changed anything in it
            single[id(block)] = _single_ops(block, wide)
        return op.name not in single[id(block)]

    return ct.transform.FP16ComputePrecision(op_selector=is_half)


def _single_ops(block: Any, wide: Wide) -> set[str]:
    """Names of the operations that stay float32; group norms are taken apart here, squares and all."""

    def names(values: Iterable[Any]) -> tuple[str, ...]:
        return tuple(v.name for v in values)

    def inputs(op: Any) -> Iterator[Any]:
        for value in op.inputs.values():
            yield from value if isinstance(value, (list, tuple)) else (value,)

    constants = {v.name for op in block.operations if op.op_type.startswith("const") for v in op.outputs}
    ops = [
        Op(op.name, names(v for v in inputs(op) if v is not None), names(op.outputs))
        for op in block.operations
        if not op.op_type.startswith("const")
    ]
    return wide_ops(ops, wide, constants, squares=True)


def _settle_spec(path: Path, spec: GraphSpec) -> None:
    """Give inputs their names, drop the conversion date and the like, write map fields in a fixed order."""
    model = ct.proto.Model_pb2.Model()
    model.ParseFromString(path.read_bytes())
    for tensor in spec.inputs:  # a converted program's inputs are called as the module's arguments
        if tensor.key != tensor.name:
            ct.utils.rename_feature(model, tensor.name, tensor.key, rename_outputs=False)
    model.description.metadata.ClearField("userDefined")
    shorten_constants(model)
    path.unlink()  # the converter makes it readable by its owner alone
    path.write_bytes(model.SerializeToString(deterministic=True))


def _settle_manifest(path: Path) -> None:
    """The package's items get identifiers made from their paths instead of random ones."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    items = {}
    for old, item in manifest["itemInfoEntries"].items():
        new = str(uuid.uuid5(uuid.NAMESPACE_URL, f"edgeflow:{item['path']}")).upper()
        items[new] = item
        if manifest["rootModelIdentifier"] == old:
            manifest["rootModelIdentifier"] = new
    manifest["itemInfoEntries"] = items
    path.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")
