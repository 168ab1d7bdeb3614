"""An OpenVINO graph run a piece at a time, for the least memory (edgeflow.runtimes.pieces).

OpenVINO's CPU makes float32 of every weight when it compiles a graph, and lays convolutions' out anew: twice
to three times what a file of halves holds, all at once. Here each piece is compiled, run and freed before the
next. Weights stay where the file has them until their piece is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edgeflow.runtimes import pieces
from edgeflow.runtimes.pieces import Piece, Step

#: An output of an operation: the operation's place in the program, and which of its outputs.
Value = tuple[int, int]


class Pieces:
    """One graph from its file, cut; holds nothing of it between two runs."""

    def __init__(self, path: Path, compile_model: Callable[[ov.Model], ov.CompiledModel], largest: int):
        """``compile_model`` compiles one piece. Raises RuntimeError for a file that cannot be read."""
        self._path, self._compile = path, compile_model
        program = _Program(ov.Core().read_model(str(path)))
        self._fed, self._results = program.fed(), program.results()
        self.pieces = pieces.cut(program.steps, list(self._results.values()), largest)
        self.inputs = [name for port in program.model.inputs for name in port.get_names()]
        self.outputs = list(self._results)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays by the graph's input names → arrays by its output names. Raises RuntimeError."""
        fed = {value: feeds[name] for name, value in self._fed.items()}
        found = pieces.run(self.pieces, fed, list(self._results.values()), self._run)
        return {name: found[value] for name, value in self._results.items()}

    def _run(self, piece: Piece[Value], arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        program = _Program(ov.Core().read_model(str(self._path)))
        compiled = self._compile(program.isolate(piece))
        del program
        found = compiled(arrays, share_inputs=True)
        return [np.array(found[i]) for i in range(len(piece.gives))]


class _Program:
    """A model just read, its operations by their place in the order that OpenVINO gives them."""

    def __init__(self, model: ov.Model):
        self.model = model
        self._operations = model.get_ordered_ops()
        self._places = {op.get_name(): i for i, op in enumerate(self._operations)}
        self._constant: set[int] = set()
        self._stepping: list[int] = []  # the places of steps
        for place, op in enumerate(self._operations):
            sources = [self._value(port)[0] for port in op.inputs()]
            if op.get_type_name() == "Constant" or (sources and self._constant.issuperset(sources)):
                self._constant.add(place)
            elif op.get_type_name() not in ("Parameter", "Result"):
                self._stepping.append(place)

    def _value(self, port: Any) -> Value:
        source = port.get_source_output()
        return self._places[source.get_node().get_name()], source.get_index()

    @property
    def steps(self) -> list[Step[Value]]:
        """The operations that depend on inputs."""
        steps = []
        for place in self._stepping:
            op = self._operations[place]
            takes = [self._value(port) for port in op.inputs()]
            live = tuple(value for value in takes if value[0] not in self._constant)
            makes = {(place, i): _bytes(port) for i, port in enumerate(op.outputs())}
            constants = (value[0] for value in takes if value[0] in self._constant)
            steps.append(Step(live, makes, {k: v for c in constants for k, v in self._weights(c)}))
        return steps

    def _weights(self, place: int) -> Iterator[tuple[int, int]]:
        """(place, bytes in float32) of the constants behind a constant operation."""
        op = self._operations[place]
        if op.get_type_name() == "Constant":
            yield place, 4 * math.prod(op.get_output_shape(0))
        for port in op.inputs():
            yield from self._weights(self._value(port)[0])

    def results(self) -> dict[str, Value]:
        """Output name → the value that it names."""
        return {
            name: self._value(port.get_node().inputs()[0])
            for port in self.model.outputs
            for name in port.get_names()
        }

    def fed(self) -> dict[str, Value]:
        """Input name → the value that the input is."""
        return {
            name: (self._places[port.get_node().get_name()], 0)
            for port in self.model.inputs
            for name in port.get_names()
        }

    def isolate(self, piece: Piece[Value]) -> ov.Model:
        """A model of the piece alone. The program is no longer whole afterwards."""
        places = set(self._stepping[piece.start : piece.end])
        outputs = {v: self._operations[v[0]].output(v[1]) for v in (*piece.takes, *piece.gives)}
        parameters = []
        for value in piece.takes:
            port = outputs[value]
            parameters.append(ov.op.Parameter(port.get_element_type(), port.get_partial_shape()))
            for target in port.get_target_inputs():
                if self._places.get(target.get_node().get_name()) in places:
                    target.replace_source_output(parameters[-1].output(0))
        return ov.Model([ov.op.Result(outputs[value]) for value in piece.gives], parameters, "piece")


def _bytes(port: Any) -> int:
    return math.prod(port.get_shape()) * port.get_element_type().size
