"""An OpenVINO graph run a piece at a time, for the least memory.

OpenVINO's CPU makes float32 of every weight when it compiles a graph, and lays convolutions' out anew: twice
to three times what a file of halves holds, all at once. Here the program is cut into pieces of at most
``LARGEST`` bytes of float32 weights; each is compiled, run and freed before the next, and what later pieces
take is handed on as arrays. A cut lies where the least data crosses. Weights stay where the file has them
until their piece is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edgeflow.low_memory import give_back

#: Bytes of float32 weights that one piece may hold; a single operation with more is a piece of its own.
LARGEST = 1 << 29
#: A cut lies behind at least this part of what a piece may hold.
_SLACK = 0.75
#: An output of an operation: the operation's place in the program, and which of its outputs.
Value = tuple[int, int]


@dataclass(frozen=True)
class _Step:
    """An operation that depends on inputs: what it takes and makes, the weights it is first to use."""

    place: int
    takes: tuple[Value, ...]
    makes: Mapping[Value, int]  # value → bytes
    weights: int


class Pieces:
    """One graph from its file, cut; holds nothing of it between two runs."""

    def __init__(self, path: Path, compile_model: Callable[[ov.Model], ov.CompiledModel], largest: int):
        """``compile_model`` compiles one piece. Raises RuntimeError for a file that cannot be read."""
        self._path, self._compile = path, compile_model
        program = _Program(ov.Core().read_model(str(path)))
        self.ranges = program.cut(largest)
        self.inputs = [name for port in program.model.inputs for name in port.get_names()]
        self.outputs = [name for port in program.model.outputs for name in port.get_names()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays by the graph's input names → arrays by its output names. Raises RuntimeError."""
        values: dict[Value, NDArray[Any]] = {}
        results: dict[str, NDArray[Any]] = {}
        for number in range(len(self.ranges)):
            program = _Program(ov.Core().read_model(str(self._path)))
            if number == 0:
                values |= program.fed(feeds)
            wanted, final = program.wanted(self.ranges, number), program.results()
            taken = program.isolate(self.ranges[number], wanted)
            compiled = self._compile(taken.model)
            del program
            found = compiled([values[value] for value in taken.inputs], share_inputs=True)
            made = {value: np.array(found[i]) for i, value in enumerate(taken.outputs)}
            del compiled, taken, found
            results |= {name: made[value] for name, value in final.items() if value in made}
            needed = {value for later in self.ranges[number + 1 :] for value in later.takes}
            values = {value: array for value, array in (values | made).items() if value in needed}
            give_back()
        return results


@dataclass(frozen=True)
class Range:
    """A piece: its steps' places, and the values that it takes from before."""

    places: frozenset[int]
    takes: set[Value]


@dataclass(frozen=True)
class _Piece:
    model: ov.Model
    inputs: Sequence[Value]
    outputs: Sequence[Value]


class _Program:
    """A model just read, its operations by their place in the order that OpenVINO gives them."""

    def __init__(self, model: ov.Model):
        self.model = model
        self._operations = model.get_ordered_ops()
        self._places = {op.get_name(): i for i, op in enumerate(self._operations)}
        self._constant: set[int] = set()
        for place, op in enumerate(self._operations):
            sources = [self._value(port)[0] for port in op.inputs()]
            if op.get_type_name() == "Constant" or (sources and self._constant.issuperset(sources)):
                self._constant.add(place)

    def _value(self, port: Any) -> Value:
        source = port.get_source_output()
        return self._places[source.get_node().get_name()], source.get_index()

    def _steps(self) -> list[_Step]:
        seen: set[int] = set()
        steps = []
        for place, op in enumerate(self._operations):
            if place in self._constant or op.get_type_name() in ("Parameter", "Result"):
                continue
            takes = [self._value(port) for port in op.inputs()]
            live = tuple(value for value in takes if value[0] not in self._constant)
            weights = sum(self._weights(value[0], seen) for value in takes if value[0] in self._constant)
            makes = {(place, i): _bytes(port) for i, port in enumerate(op.outputs())}
            steps.append(_Step(place, live, makes, weights))
        return steps

    def _weights(self, place: int, seen: set[int]) -> int:
        """Bytes in float32 of the constants behind a constant operation that no step before has used."""
        if place in seen:
            return 0
        seen.add(place)
        op = self._operations[place]
        if op.get_type_name() == "Constant":
            return 4 * math.prod(op.get_output_shape(0))
        return sum(self._weights(self._value(port)[0], seen) for port in op.inputs())

    def cut(self, largest: int) -> list[Range]:
        """Pieces whose weights take at most ``largest`` bytes in float32, cut where the least crosses."""
        steps = self._steps()
        last = {value: i for i, step in enumerate(steps) for value in step.takes}
        sizes = {value: size for step in steps for value, size in step.makes.items()}
        first = {value: i for i, step in enumerate(steps) for value in step.makes}
        change = [0] * (len(steps) + 1)  # bytes that begin to cross behind a step, less those that end
        for value, end in last.items():
            if value in first:
                change[first[value]] += sizes[value]
                change[end] -= sizes[value]
        crossing = np.cumsum(change)
        ranges, start = [], 0
        while start < len(steps):
            held = np.cumsum([step.weights for step in steps[start:]])
            fit = max(1, int(np.searchsorted(held, largest, side="right")))
            low = int(np.searchsorted(held, largest * _SLACK)) if fit < len(held) else fit - 1
            end = start + min(range(min(low, fit - 1), fit), key=lambda i: (crossing[start + i], -i)) + 1
            places = frozenset(step.place for step in steps[start:end])
            takes = {v for step in steps[start:end] for v in step.takes if v[0] not in places}
            ranges.append(Range(places, takes))
            start = end
        return ranges

    def results(self) -> dict[str, Value]:
        """Output name → the value that it names."""
        return {
            name: self._value(port.get_node().inputs()[0])
            for port in self.model.outputs
            for name in port.get_names()
        }

    def fed(self, feeds: Mapping[str, NDArray[Any]]) -> dict[Value, NDArray[Any]]:
        """Arrays by input name → by the value that the input is."""
        return {
            (self._places[port.get_node().get_name()], 0): feeds[name]
            for port in self.model.inputs
            for name in port.get_names()
        }

    def wanted(self, ranges: Sequence[Range], number: int) -> list[Value]:
        """What piece ``number`` makes that a later one takes, or that is a result; in order."""
        taken = {v for later in ranges[number + 1 :] for v in later.takes} | set(self.results().values())
        return sorted(value for value in taken if value[0] in ranges[number].places)

    def isolate(self, piece: Range, wanted: Sequence[Value]) -> _Piece:
        """A model of the piece alone. The program is no longer whole afterwards."""
        outputs = {value: self._operations[value[0]].output(value[1]) for value in (*piece.takes, *wanted)}
        parameters = {}
        for value in sorted(piece.takes):
            port = outputs[value]
            parameters[value] = ov.op.Parameter(port.get_element_type(), port.get_partial_shape())
            for target in port.get_target_inputs():
                if self._places.get(target.get_node().get_name()) in piece.places:
                    target.replace_source_output(parameters[value].output(0))
        results = [ov.op.Result(outputs[value]) for value in wanted]
        model = ov.Model(results, list(parameters.values()), "piece")
        return _Piece(model, list(parameters), list(wanted))


def _bytes(port: Any) -> int:
    return math.prod(port.get_shape()) * port.get_element_type().size
