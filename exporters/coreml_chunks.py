"""One Core ML package cut into two that run one after the other and give the very same values.

The Neural Engine takes programs of about a gigabyte, and Apple's own package looks for ``UnetChunk1`` and
``UnetChunk2``. The saved program is cut, not the model: every operation, type and weight goes to one of the
two as it is, and what crosses the cut is an output of the first and an input of the second under one name.

The cut lies where the weights are halved to within 5 %, and there where the least data crosses. coremltools'
own ``bisect_model`` converts both halves again, which makes float16 of every float32 operation and gives
other bytes each time.

A weight file (coremltools, ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp``): a header of 64 bytes, u32 number
of blobs and u32 version; then for each blob 64 bytes of metadata, u32 0xDEADBEEF, u32 type, u64 bytes, u64
offset of the data, u64 unused bits at its end; all of it begins at multiples of 64.
"""

from __future__ import annotations

import math
import mmap
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import coremltools as ct

from edgeflow.errors import ExportError

SPEC = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
_METADATA = struct.Struct("<IIQQQ")
_ALIGNMENT = 64
#: How far from half of the weights the cut may lie, of the whole.
_UNEVEN = 0.05
#: MIL's element types that may cross: bits, and the feature type of a package's interface.
_MIL, _FEATURE = ct.proto.MIL_pb2, ct.proto.FeatureTypes_pb2.ArrayFeatureType
_CROSSING = {
    _MIL.FLOAT16: (16, _FEATURE.FLOAT16),
    _MIL.FLOAT32: (32, _FEATURE.FLOAT32),
    _MIL.INT32: (32, _FEATURE.INT32),
}


def cut(package: Path, first: Path, second: Path) -> None:
    """Cut a saved package in two; it itself stays. Raises ExportError for a program that cannot be cut."""
    model = ct.proto.Model_pb2.Model()
    model.ParseFromString((package / SPEC).read_bytes())
    with (package / WEIGHTS).open("rb") as file:
        weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with weights:
        plan = _Plan(model, weights, package.name)
        at = plan.place()
        crossing = plan.crossing(at)
        _write(package, first, weights, plan.half(at, crossing, is_first=True))
        _write(package, second, weights, plan.half(at, crossing, is_first=False))


@dataclass(frozen=True)
class _Step:
    """One computing operation: its place among all, the values it takes and makes."""

    index: int
    takes: frozenset[str]
    makes: tuple[str, ...]


class _Plan:
    """A program as steps between constants."""

    def __init__(self, model: Any, weights: mmap.mmap, where: str):
        self.model, self._weights, self._where = model, weights, where
        self._block = _main_block(model)
        operations = self._block.operations
        self._constants = {o.outputs[0].name: i for i, o in enumerate(operations) if _is_constant(o)}
        self._steps = [
            _Step(i, frozenset(_names(o)), tuple(v.name for v in o.outputs))
            for i, o in enumerate(operations)
            if not _is_constant(o)
        ]
        self._types = {v.name: v.type.tensorType for o in operations for v in o.outputs}

    def place(self) -> int:
        """How many steps the first half has."""
        sizes = {name: self._size(index) for name, index in self._constants.items()}
        total, so_far = sum(sizes.values()), 0
        seen: set[str] = set()
        found: list[tuple[float, int]] = []
        for count, step in enumerate(self._steps[:-1], 1):
            new = set(self._needed({step.index})) - seen
            seen |= new
            so_far += sum(sizes[name] for name in new)
            found.append((abs(so_far - total / 2) / max(total, 1), count))
        if not found:
            raise ExportError(f"export: coreml: {self._where}: expected a program of two operations to cut")
        least = min(found)[0]
        close = [count for distance, count in found if distance <= max(least, _UNEVEN)]
        return min(close, key=lambda count: (self._crossing_bytes(count), count))

    def crossing(self, at: int) -> tuple[str, ...]:
        """Names of what the first half makes and the second takes, or gives."""
        wanted = set().union(*(step.takes for step in self._steps[at:]), self._block.outputs)
        return tuple(name for step in self._steps[:at] for name in step.makes if name in wanted)

    def half(self, at: int, crossing: tuple[str, ...], *, is_first: bool) -> Any:
        """The model of one half. The weights' offsets are the whole's."""
        steps = self._steps[:at] if is_first else self._steps[at:]
        places = {step.index for step in steps}
        places |= {self._constants[name] for name in self._needed(places)}
        half = ct.proto.Model_pb2.Model()
        half.CopyFrom(self.model)
        block = _main_block(half)
        kept = [self._block.operations[i] for i in sorted(places)]
        del block.operations[:]
        block.operations.extend(kept)
        taken = set().union(*(step.takes for step in steps))
        self._keep_inputs(half, taken)
        if is_first:
            del block.outputs[:], half.description.output[:]
            block.outputs.extend(crossing)
            half.description.output.extend(self._feature(name) for name in crossing)
        else:
            function = half.mlProgram.functions["main"]
            for name in crossing:
                half.description.input.append(self._feature(name))
                value = function.inputs.add(name=name)
                value.type.tensorType.CopyFrom(self._types[name])
        return half

    def _keep_inputs(self, half: Any, taken: set[str]) -> None:
        function = half.mlProgram.functions["main"]
        for values in (function.inputs, half.description.input):
            kept = [value for value in values if value.name in taken]
            del values[:]
            values.extend(kept)

    def _needed(self, places: set[int]) -> Iterator[str]:
        """Constants that operations take, and those that these take."""
        for place in places:
            for name in _names(self._block.operations[place]):
                if name in self._constants:
                    yield name
                    yield from self._needed({self._constants[name]})

    def _size(self, index: int) -> int:
        return sum(self._blob(v.blobFileValue.offset)[2] for v in _blobs(self._block.operations[index]))

    def _blob(self, offset: int) -> tuple[int, ...]:
        return _METADATA.unpack_from(self._weights, offset)

    def _crossing_bytes(self, at: int) -> float:
        return sum(self._bits(name) / 8 for name in self.crossing(at))

    def _bits(self, name: str) -> float:
        kind = self._types[name]
        if kind.dataType not in _CROSSING:
            return math.inf
        return math.prod(_shape(kind)) * _CROSSING[kind.dataType][0]

    def _feature(self, name: str) -> Any:
        kind = self._types[name]
        if kind.dataType not in _CROSSING:
            raise ExportError(f"export: coreml: {self._where}: expected a float value at the cut, got {name}")
        feature = ct.proto.Model_pb2.FeatureDescription(name=name)
        feature.type.multiArrayType.shape.extend(_shape(kind))
        feature.type.multiArrayType.dataType = _CROSSING[kind.dataType][1]
        return feature


def _main_block(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def _is_constant(operation: Any) -> bool:
    return operation.type.startswith("const")


def _names(operation: Any) -> Iterator[str]:
    for parameter in operation.inputs.values():
        yield from (a.name for a in parameter.arguments if a.WhichOneof("binding") == "name")


def _blobs(operation: Any) -> Iterator[Any]:
    """The values of an operation that lie in the weight file."""
    given = [
        a.value for p in operation.inputs.values() for a in p.arguments if a.WhichOneof("binding") == "value"
    ]
    yield from (
        v for v in (*given, *operation.attributes.values()) if v.WhichOneof("value") == "blobFileValue"
    )


def _shape(kind: Any) -> list[int]:
    return [d.constant.size for d in kind.dimensions]


# --- writing --------------------------------------------------------------------------------------------


def _write(package: Path, target: Path, weights: mmap.mmap, model: Any) -> None:
    """The half with its own weights at ``target``; offsets in ``model`` become the new file's."""
    (target / WEIGHTS).parent.mkdir(parents=True)
    shutil.copyfile(package / "Manifest.json", target / "Manifest.json")
    blobs = [v.blobFileValue for o in _main_block(model).operations for v in _blobs(o)]
    moved: dict[int, int] = {}
    with (target / WEIGHTS).open("wb") as file:
        offsets = sorted({blob.offset for blob in blobs})
        file.write(struct.pack("<II", len(offsets), 2).ljust(_ALIGNMENT, b"\0"))
        for offset in offsets:
            moved[offset] = _copy_blob(weights, offset, file)
    for blob in blobs:
        blob.offset = moved[blob.offset]
    (target / SPEC).write_bytes(model.SerializeToString(deterministic=True))


def _copy_blob(weights: mmap.mmap, offset: int, file: IO[bytes]) -> int:
    """Append one blob with its metadata; its new offset."""
    mark, kind, size, start, unused = _METADATA.unpack_from(weights, offset)
    _pad(file)
    place = file.tell()
    file.write(_METADATA.pack(mark, kind, size, place + _ALIGNMENT, unused).ljust(_ALIGNMENT, b"\0"))
    file.write(memoryview(weights)[start : start + size])
    return place


def _pad(file: IO[bytes]) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
