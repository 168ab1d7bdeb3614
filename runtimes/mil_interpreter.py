"""Executes a saved Core ML program op by op in PyTorch, on any machine.

The semantics are those of coremltools' own definitions. Precision: every tensor is held in the element type
that the program declares for it. An operation on float16 computes in float32 and its result is rounded to
float16 once, which is what a device with wide accumulators does; a real device may round inside an operation
too, so this is the artifact's own error without that device's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeflow.errors import RuntimeFailure
from edgeflow.runtimes import checks, mil_constexpr_ops, mil_layout_ops, mil_quantize_ops  # noqa: F401
from edgeflow.runtimes.mil_ops import OPERATIONS, Definition
from edgeflow.runtimes.mil_reader import Constant, Operation, Program, TensorType, Value, read_package

#: What torch holds each element type in; types torch cannot compute with sit in a wider one.
DTYPES = {
    "BOOL": torch.bool,
    "FLOAT16": torch.float16,
    "FLOAT32": torch.float32,
    "FLOAT64": torch.float64,
    "INT4": torch.int8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT1": torch.uint8,
    "UINT2": torch.uint8,
    "UINT3": torch.uint8,
    "UINT4": torch.uint8,
    "UINT6": torch.uint8,
    "UINT8": torch.uint8,
    "UINT16": torch.int32,
    "UINT32": torch.int64,
}
#: The parameters that take several tensors; every other takes one.
_MANY = ("values",)

Held: TypeAlias = Tensor | str


@dataclass(frozen=True)
class _Step:
    """One operation, ready to run. ``last_uses`` are the tensors that no later step needs."""

    operation: Operation
    definition: Definition
    last_uses: tuple[str, ...]


class MilInterpreter:
    """A program whose every operation is known. ``run`` may be called many times."""

    def __init__(self, program: Program, where: object):
        """Raises RuntimeFailure naming every operation and parameter that has no meaning here."""
        self.inputs = {t.name: t for t in program.inputs}
        self.outputs = program.outputs
        self._where = where
        constants = [o for o in program.operations if o.type == "const"]
        computed = [o for o in program.operations if o.type != "const"]
        _expect_known(computed, where)
        self._constants = {o.outputs[0].name: _held(_written(o, "val")) for o in constants}
        self._steps = _plan(computed, set(program.outputs))

    @classmethod
    def open(cls, package: Path) -> MilInterpreter:
        """Read and check a saved ``.mlpackage``. Raises RuntimeFailure for one that cannot be executed."""
        return cls(read_package(package), package)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays by the program's input names → arrays by its output names, in the declared element types.

        Raises ValueError for other names or shapes, RuntimeFailure for an operation that cannot be computed.
        """
        tensors: dict[str, Held] = {name: self._input(name, inputs) for name in self.inputs}
        for step in self._steps:
            arguments = {
                name: self._arguments(name, p, tensors) for name, p in step.operation.parameters.items()
            }
            for output, tensor in self._compute(step, arguments).items():
                tensors[output] = tensor
            for name in step.last_uses:
                tensors.pop(name, None)
        return {name: np.array(self._lookup(name, tensors).numpy()) for name in self.outputs}

    def _input(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Tensor:
        declared = self.inputs[name]
        if set(inputs) != set(self.inputs):
            raise ValueError(f"program: expected inputs {sorted(self.inputs)}, got {sorted(inputs)}")
        array = np.asarray(inputs[name])
        if array.shape != declared.shape:
            raise ValueError(f"program: input {name}: expected shape {declared.shape}, got {array.shape}")
        return torch.tensor(array).to(DTYPES[declared.element])

    def _lookup(self, name: str, tensors: Mapping[str, Held]) -> Any:
        return tensors[name] if name in tensors else self._constants[name]

    def _arguments(self, parameter: str, bound: list[str | Constant], tensors: Mapping[str, Held]) -> Any:
        values = [_held(b.value) if isinstance(b, Constant) else self._lookup(b, tensors) for b in bound]
        return values if parameter in _MANY else values[0]

    def _compute(self, step: _Step, arguments: dict[str, Any]) -> dict[str, Tensor]:
        operation = step.operation
        if not step.definition.moves:
            arguments = {name: _widened(a) for name, a in arguments.items()}
        try:
            result = step.definition.function(**arguments)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise RuntimeFailure(
                f"coreml: {self._where}: operation {operation.type} (output {_output(operation)}) failed: "
                f"{checks.one_line(error)}"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        return {
            t.name: self._as_declared(operation, t, r)
            for t, r in zip(operation.outputs, results, strict=True)
        }

    def _as_declared(self, operation: Operation, declared: TensorType, tensor: Tensor) -> Tensor:
        """The result in its declared type. A shape the program does not declare would be a wrong meaning."""
        expected = declared.shape
        fits = len(expected) == tensor.dim() and all(
            e in (None, s) for e, s in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            raise RuntimeFailure(
                f"coreml: {self._where}: operation {operation.type} (output {declared.name}): expected the "
                f"declared shape {expected}, got {tuple(tensor.shape)}"
            )
        return tensor.to(DTYPES[declared.element])


def _held(value: Value) -> Held:
    """A constant as the interpreter holds it; unsigned 16 and 32 bits widen to what torch can add."""
    if isinstance(value, str):
        return value
    wider = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64}.get(value.dtype)
    # Small immediate values come from protobuf's own read-only bytes.
    array = value if value.flags.writeable else value.copy()
    return torch.from_numpy(array if wider is None else array.astype(wider))


def _written(operation: Operation, parameter: str) -> Value:
    bound = operation.parameters[parameter][0]
    assert isinstance(bound, Constant)
    return bound.value


def _widened(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_widened(a) for a in argument]
    return argument.float() if isinstance(argument, Tensor) and argument.dtype == torch.float16 else argument


def _expect_known(operations: list[Operation], where: object) -> None:
    unknown = [o for o in operations if o.type not in OPERATIONS]
    if unknown:
        named = ", ".join(f"{o.type} (output {_output(o)})" for o in unknown)
        raise RuntimeFailure(
            f"coreml: {where}: operations without a definition: {named}; "
            f"known: {', '.join(sorted(OPERATIONS))}"
        )
    for o in operations:
        here = f"coreml: {where}: operation {o.type} (output {_output(o)})"
        known = sorted(inspect.signature(OPERATIONS[o.type].function).parameters)
        if strange := sorted(set(o.parameters) - set(known)):
            raise RuntimeFailure(
                f"{here}: parameters without a definition: {', '.join(strange)}; known: {', '.join(known)}"
            )
        if untyped := [t.element for t in o.outputs if t.element not in DTYPES]:
            raise RuntimeFailure(
                f"{here}: element type {untyped[0]} is not known; known: {', '.join(DTYPES)}"
            )


def _output(operation: Operation) -> str:
    return operation.outputs[0].name if operation.outputs else "none"


def _plan(operations: list[Operation], kept: set[str]) -> list[_Step]:
    """The steps in the program's order, each with the tensors that die after it. Outputs never die."""
    last: dict[str, int] = {}
    for i, o in enumerate(operations):
        produced = [t.name for t in o.outputs]
        read = [b for bound in o.parameters.values() for b in bound if isinstance(b, str)]
        last |= dict.fromkeys([*produced, *read], i)
    dying: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in kept:
            dying.setdefault(i, []).append(name)
    return [_Step(o, OPERATIONS[o.type], tuple(dying.get(i, ()))) for i, o in enumerate(operations)]
