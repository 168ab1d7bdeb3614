"""An ONNX graph run a piece at a time, for the least memory (edgeflow.runtimes.pieces).

ONNX Runtime's CPU makes float32 of all halves before it runs the first operation. Here each piece is a model
of its own, made of the file's own bytes: a run of nodes in the file's order, which is one that they can run
in, and the weights that they use. Nodes that depend on weights alone travel with each piece that needs them.

A cut rounds a value to the type that the file gives it. Elsewhere ONNX Runtime may leave what the file has in
float16 float32 from one operation to the next, so a float16 graph's values are not the whole's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from edgeflow.runtimes import pieces
from edgeflow.runtimes.onnx_file import Graph, Node, mapped, write_piece
from edgeflow.runtimes.pieces import Piece, Step

#: What makes other numbers each time it runs, so that it may stand in one piece only.
_RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
#: A weight by its name, or a node that depends on weights alone by its place.
Constant = str | int


def float32_bytes(graph: Graph) -> int:
    """Bytes of a graph's weights in float32."""
    numbers = [
        *(tensor.numbers for tensor in graph.tensors.values()),
        *(node.numbers for node in graph.nodes),
    ]
    return 4 * sum(numbers)


class Pieces:
    """One graph from its file, cut; holds nothing of it between two runs."""

    def __init__(
        self, path: Path, graph: Graph, open_session: Callable[[bytes], ort.InferenceSession], largest: int
    ):
        """``open_session`` opens a model from its bytes. Raises ValueError for a graph that cannot be cut."""
        self._path, self._graph, self._open = path, graph, open_session
        self._behind: dict[str, frozenset[Constant]] = {name: frozenset([name]) for name in graph.tensors}
        self._places: list[int] = []  # of the nodes that are steps
        _expect_whole(graph)
        self._settle()
        self.pieces = pieces.cut(self._steps(), list(graph.outputs), largest)

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays by the graph's input names → arrays by its output names. Raises what ONNX Runtime raises."""
        return pieces.run(self.pieces, feeds, list(self._graph.outputs), self._run)

    def _run(self, piece: Piece[str], arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        session = self._open(self.model(piece, arrays))
        found: list[NDArray[Any]] = session.run(
            list(piece.gives), dict(zip(piece.takes, arrays, strict=True))
        )
        return found

    def model(self, piece: Piece[str], arrays: list[NDArray[Any]]) -> bytes:
        """A piece as an ONNX model; ``arrays`` are what it takes, in order."""
        own = self._places[piece.start : piece.end]
        used = {key for place in own for key in self._constants(self._graph.nodes[place])}
        places = sorted({*own, *(key for key in used if isinstance(key, int))})
        tensors = [tensor for name, tensor in self._graph.tensors.items() if name in used]
        inputs = [
            (name, array.dtype.name, array.shape) for name, array in zip(piece.takes, arrays, strict=True)
        ]
        with mapped(self._path) as data:
            nodes = [self._graph.nodes[place] for place in places]
            return write_piece(self._graph, data, nodes, tensors, inputs, piece.gives)

    def _settle(self) -> None:
        """Tell steps from nodes that depend on weights alone."""
        known = {*self._graph.inputs, *self._behind, ""}
        for place, node in enumerate(self._graph.nodes):
            if unknown := [name for name in node.takes if name not in known]:
                raise ValueError(
                    f"node {place} ({node.type}): input {unknown[0]!r}: nothing before it makes it"
                )
            known.update(node.makes)
            if self._is_constant(node):
                behind = self._constants(node) | {place}
                self._behind |= {name: behind for name in node.makes}
            else:
                self._places.append(place)
        made = {name for place in self._places for name in self._graph.nodes[place].makes}
        if loose := [name for name in self._graph.outputs if name not in made]:
            raise ValueError(f"output {loose[0]!r}: expected one that an operation makes")

    def _is_constant(self, node: Node) -> bool:
        if node.type in _RANDOM or not self._graph.outputs.keys().isdisjoint(node.makes):
            return False
        takes = [name for name in node.takes if name]
        return node.type == "Constant" or (bool(takes) and all(name in self._behind for name in takes))

    def _constants(self, node: Node) -> frozenset[Constant]:
        """Weights, and nodes that depend on them alone, that a node needs."""
        return frozenset().union(*(self._behind.get(name, ()) for name in node.takes))

    def _steps(self) -> list[Step[str]]:
        """A value whose size the file does not tell counts as one like the largest that it tells."""
        sizes, nodes = self._graph.value_bytes, self._graph.nodes
        largest = max(sizes.values(), default=1)
        steps = []
        for node in (nodes[place] for place in self._places):
            takes = tuple(name for name in node.takes if name and name not in self._behind)
            makes = {name: sizes.get(name, largest) for name in node.makes if name}
            weights = {key: 4 * self._numbers(key) for key in self._constants(node)}
            steps.append(Step(takes, makes, weights))
        return steps

    def _numbers(self, key: Constant) -> int:
        return self._graph.nodes[key].numbers if isinstance(key, int) else self._graph.tensors[key].numbers


def _expect_whole(graph: Graph) -> None:
    """Refuse what may use values that no list of inputs names, and weights in a form that is not read."""
    for place, node in enumerate(graph.nodes):
        if node.has_subgraph:
            raise ValueError(
                f"node {place} ({node.type}): expected operations that can be cut apart, got one with a "
                "graph of its own"
            )
    if graph.is_sparse:
        raise ValueError("expected dense weights, got sparse ones")
