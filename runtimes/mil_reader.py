"""Reads a saved ``.mlpackage``: the program from its protobuf, the weights from their blob file. NumPy only.

Nothing here comes from the converter's memory: what is read is what ships. The blob file's layout
(coremltools, ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp``), little-endian:

- a 64-byte header: u32 number of blobs, u32 version (2);
- per blob, at the offset that the program names, 64 bytes of metadata: u32 0xDEADBEEF, u32 type,
  u64 bytes, u64 offset of the data, u64 unused bits at the data's end;
- types narrower than a byte are packed from the least significant bit on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import mmap
import struct
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflow.errors import RuntimeFailure

#: A constant of a program: an array, or a string.
Value = NDArray[Any] | str

_SENTINEL = 0xDEADBEEF
_METADATA = struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class ElementType:
    """How one MIL element type is stored (``blob`` is its number in a weight file) and held in NumPy."""

    blob: int | None
    bits: int
    numpy: str
    signed: bool = False

    def num_bytes(self, count: int) -> int:
        return math.ceil(count * self.bits / 8)


ELEMENT_TYPES = {
    "BOOL": ElementType(None, 8, "bool"),
    "FLOAT16": ElementType(1, 16, "float16"),
    "FLOAT32": ElementType(2, 32, "float32"),
    "FLOAT64": ElementType(None, 64, "float64"),
    "UINT8": ElementType(3, 8, "uint8"),
    "INT8": ElementType(4, 8, "int8", signed=True),
    "INT16": ElementType(6, 16, "int16", signed=True),
    "UINT16": ElementType(7, 16, "uint16"),
    "INT4": ElementType(8, 4, "int8", signed=True),
    "UINT1": ElementType(9, 1, "uint8"),
    "UINT2": ElementType(10, 2, "uint8"),
    "UINT4": ElementType(11, 4, "uint8"),
    "UINT3": ElementType(12, 3, "uint8"),
    "UINT6": ElementType(13, 6, "uint8"),
    "INT32": ElementType(14, 32, "int32", signed=True),
    "UINT32": ElementType(15, 32, "uint32"),
    "INT64": ElementType(None, 64, "int64", signed=True),
    "UINT64": ElementType(None, 64, "uint64"),
}


@dataclass(frozen=True)
class TensorType:
    """A named tensor: ``element`` is MIL's name of its type, None in ``shape`` a size known only when run."""

    name: str
    element: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Operation:
    """One operation. An argument is the name of an earlier output, or a value written in place.

    A parameter always holds a list of arguments; most hold one. Attributes are parameters with values.
    """

    type: str
    parameters: dict[str, list[str | Constant]]
    outputs: tuple[TensorType, ...]


@dataclass(frozen=True)
class Constant:
    """A value written in the program or kept in its weight file."""

    value: Value


@dataclass(frozen=True)
class Program:
    """The ``main`` function of a package. ``outputs`` are names."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


def read_package(package: Path) -> Program:
    """Read ``main`` from a saved package. Raises RuntimeFailure naming the file that is missing or broken."""
    model = _root_model(package)
    spec = _proto("Model_pb2").Model()
    try:
        spec.ParseFromString(model.read_bytes())
    except Exception as error:  # protobuf's DecodeError; its class differs between protobuf's backends
        raise RuntimeFailure(f"coreml: {model}: expected a Core ML specification, got: {error}") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise RuntimeFailure(f"coreml: {model}: expected an ML program, got {spec.WhichOneof('Type')}")
    return _Parser(model).program(spec.mlProgram)


def _root_model(package: Path) -> Path:
    """The specification that the package's manifest names."""
    manifest = package / "Manifest.json"
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        model = package / "Data" / raw["itemInfoEntries"][raw["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeFailure(
            f"coreml: {package}: expected a package with {manifest.name}, got {error!r}"
        ) from error
    if not model.is_file() or not model.resolve().is_relative_to(package.resolve()):
        raise RuntimeFailure(f"coreml: {package}: expected the specification {model.name} inside, found none")
    return model


def _proto(name: str) -> Any:
    """A protobuf module of coremltools without running coremltools itself.

    Its ``__init__`` imports every converter (and torch, slowly and loudly); the message classes need none of
    it. Raises ModuleNotFoundError when coremltools is not installed.
    """
    package = "_edgeflow_coreml_proto"
    if package not in sys.modules:
        spec = importlib.util.find_spec("coremltools")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'coremltools'", name="coremltools")
        shell = types.ModuleType(package)
        shell.__path__ = [str(Path(spec.origin).parent / "proto")]
        sys.modules[package] = shell
    return importlib.import_module(f"{package}.{name}")


class WeightFile:
    """A blob file, mapped into memory: arrays are views, their pages read on first use."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                # Copy-on-write, so that an array over it may be handed to torch, which knows no read-only.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise RuntimeFailure(f"coreml: {path}: the weight file cannot be read: {error}") from error
        _, version = self._unpack("<II", 0)
        if version != 2:
            raise RuntimeFailure(f"coreml: {path}: expected a weight file of version 2, got {version}")

    def read(self, offset: int, element: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The array whose metadata lies at ``offset``. Raises RuntimeFailure when it is not what is said."""
        kind = ELEMENT_TYPES[element]
        sentinel, blob, num_bytes, start, _ = self._unpack(_METADATA.format, offset)
        if sentinel != _SENTINEL or blob != kind.blob:
            raise RuntimeFailure(
                f"coreml: {self.path}: offset {offset}: expected a blob of {element} ({kind.blob}), "
                f"got type {blob} marked {sentinel:#x}"
            )
        expected = kind.num_bytes(math.prod(shape))
        if num_bytes != expected:
            raise RuntimeFailure(
                f"coreml: {self.path}: offset {offset}: expected {expected} bytes for {element} {shape}, "
                f"got {num_bytes}"
            )
        if start + num_bytes > len(self._data):
            raise self._truncated(start + num_bytes)
        return unpack(memoryview(self._data)[start : start + num_bytes], element, shape)

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        end = offset + struct.calcsize(layout)
        if end > len(self._data):
            raise self._truncated(end)
        return struct.unpack(layout, self._data[offset:end])

    def _truncated(self, end: int) -> RuntimeFailure:
        return RuntimeFailure(
            f"coreml: {self.path}: the weight file is truncated: expected at least {end} bytes, "
            f"got {len(self._data)}"
        )


def unpack(data: bytes | memoryview, element: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Stored bytes → an array; types narrower than a byte become int8 or uint8."""
    kind = ELEMENT_TYPES[element]
    if kind.bits >= 8:
        return np.frombuffer(data, dtype=kind.numpy).reshape(shape)
    count = math.prod(shape)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * kind.bits]
    weights = (1 << np.arange(kind.bits)).astype(np.uint8)
    values = (bits.reshape(count, kind.bits) * weights).sum(axis=1, dtype=np.uint8)
    if kind.signed:
        half = 1 << (kind.bits - 1)
        values = (values.astype(np.int16) ^ half) - half
    return values.astype(kind.numpy).reshape(shape)


class _Parser:
    """Protobuf messages → the classes above. Keeps each weight file open once."""

    def __init__(self, model: Path):
        self._model = model
        self._element_names = {v: k for k, v in _proto("MIL_pb2").DataType.items()}
        self._weights: dict[str, WeightFile] = {}

    def program(self, proto: Any) -> Program:
        if "main" not in proto.functions:
            known = ", ".join(sorted(proto.functions)) or "none"
            raise RuntimeFailure(f"coreml: {self._model}: expected a function main; known: {known}")
        function = proto.functions["main"]
        if function.opset not in function.block_specializations:
            raise RuntimeFailure(
                f"coreml: {self._model}: expected a block for {function.opset!r}, found none"
            )
        block = function.block_specializations[function.opset]
        return Program(
            inputs=tuple(self._tensor(i) for i in function.inputs),
            outputs=tuple(block.outputs),
            operations=tuple(self._operation(o) for o in block.operations),
        )

    def _operation(self, proto: Any) -> Operation:
        parameters: dict[str, list[str | Constant]] = {
            name: [a.name if a.WhichOneof("binding") == "name" else self._value(a.value) for a in p.arguments]
            for name, p in proto.inputs.items()
        }
        parameters |= {name: [self._value(v)] for name, v in proto.attributes.items() if name != "name"}
        return Operation(proto.type, parameters, tuple(self._tensor(o) for o in proto.outputs))

    def _tensor(self, proto: Any) -> TensorType:
        element, shape = self._type(proto.type)
        return TensorType(proto.name, element, shape)

    def _type(self, proto: Any) -> tuple[str, tuple[int | None, ...]]:
        """Element and shape; a list or a tuple, which no operation here takes, is named as the element."""
        kind = proto.WhichOneof("type")
        if kind != "tensorType":
            return str(kind), ()
        tensor = proto.tensorType
        sizes = (
            d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions
        )
        return self._element_names[tensor.dataType], tuple(sizes)

    def _value(self, proto: Any) -> Constant:
        element, dynamic = self._type(proto.type)
        shape = tuple(0 if size is None else size for size in dynamic)
        if proto.WhichOneof("value") == "blobFileValue":
            blob = proto.blobFileValue
            return Constant(self._weight_file(blob.fileName).read(blob.offset, self._known(element), shape))
        tensor = proto.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if element == "STRING":
            return Constant(str(tensor.strings.values[0]))
        if field == "bytes":
            return Constant(unpack(tensor.bytes.values, self._known(element), shape))
        if field is None:
            raise RuntimeFailure(
                f"coreml: {self._model}: a constant holds a {element}, which is not supported"
            )
        values = list(getattr(tensor, field).values)
        return Constant(np.array(values, dtype=ELEMENT_TYPES[self._known(element)].numpy).reshape(shape))

    def _known(self, element: str) -> str:
        if element not in ELEMENT_TYPES:
            raise RuntimeFailure(
                f"coreml: {self._model}: element type {element} is not known; "
                f"known: {', '.join(ELEMENT_TYPES)}"
            )
        return element

    def _weight_file(self, name: str) -> WeightFile:
        """``@model_path`` stands for the folder that the specification lies in."""
        if name not in self._weights:
            path = self._model.parent / name.removeprefix("@model_path/")
            if not path.resolve().is_relative_to(self._model.parent.resolve()):
                raise RuntimeFailure(f"coreml: {self._model}: the weight file {name!r} leaves the package")
            self._weights[name] = WeightFile(path)
        return self._weights[name]
