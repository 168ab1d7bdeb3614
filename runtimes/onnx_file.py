"""What an ONNX file holds, from its bytes: a device that runs one need not have the package onnx.

The numbers of fields are onnx.proto's. Weights are passed over: of each the place in the file is kept.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgeflow.runtimes.protobuf_wire import Field, fields, message, number_field, opening, text, varints

#: ModelProto.
_GRAPH = 7
#: GraphProto.
_NODE, _NAME, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO, _SPARSE = 1, 2, 5, 11, 12, 13, 15
#: NodeProto: inputs, outputs, a type of a domain ("" is the standard's own), attributes.
_TAKES, _MAKES, _TYPE, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7
#: AttributeProto: a tensor, a graph, graphs.
_TENSOR, _SUBGRAPHS = 5, (6, 11)
#: TensorProto.
_DIMS, _TENSOR_NAME = 1, 8
#: ValueInfoProto → TypeProto → TypeProto.Tensor → TensorShapeProto → Dimension.
_VALUE_NAME, _VALUE_TYPE, _TENSOR_TYPE, _ELEMENT, _SHAPE, _DIM, _DIM_VALUE = 1, 2, 1, 1, 2, 1, 1
#: TensorProto.DataType → bytes. Others (complex, strings, 4 bits) are none that steps hand on.
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
#: NumPy's name of a type → TensorProto.DataType.
_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9,
    "float16": 10, "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip
#: A field's first byte and the one behind its last, in the file.
Span = tuple[int, int]


@dataclass(frozen=True)
class Node:
    """An operation. ``numbers``: how many its attributes hold as tensors."""

    span: Span
    type: str
    domain: str
    takes: tuple[str, ...]  # "" is an input that is left out
    makes: tuple[str, ...]
    numbers: int
    has_subgraph: bool


@dataclass(frozen=True)
class Tensor:
    """A stored weight."""

    span: Span
    numbers: int


@dataclass
class Graph:
    """A model's graph: its parts by name. ``header`` is all of the model that is not its graph."""

    header: bytes = b""
    name: bytes = b""
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, bytes] = field(default_factory=dict)  # name → its field, tag and all
    outputs: dict[str, bytes] = field(default_factory=dict)
    value_bytes: dict[str, int] = field(default_factory=dict)  # of values whose type and shape the file tells
    is_sparse: bool = False


def node_types(path: Path) -> Iterator[tuple[str, str]]:
    """(domain, type) of every node of a model's graph, in order; "" is the standard's own domain.

    Raises ValueError for a file that is not of this format.
    """
    return ((node.domain, node.type) for node in read_graph(path).nodes)


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, read as they are touched. Raises ValueError for an empty file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def read_graph(path: Path) -> Graph:
    """The one graph of a model's file. Raises ValueError for a file that is not of this format."""
    with mapped(path) as data:
        found = list(fields(data, 0, len(data)))
        graphs = [each for each in found if each.number == _GRAPH]
        if len(graphs) != 1:
            raise ValueError(f"expected an ONNX file of one graph, got {len(graphs)}")
        graph = Graph(b"".join(data[each.at : each.end] for each in found if each.number != _GRAPH))
        for part in fields(data, graphs[0].start, graphs[0].end):
            _add(graph, data, part)
    graph.inputs = {name: own for name, own in graph.inputs.items() if name not in graph.tensors}
    return graph


def write_piece(
    graph: Graph,
    data: mmap.mmap,
    nodes: Sequence[Node],
    tensors: Sequence[Tensor],
    inputs: Sequence[tuple[str, str, tuple[int, ...]]],
    outputs: Sequence[str],
) -> bytes:
    """A model of some nodes and weights, made of the file's bytes (``data``).

    ``inputs``: name, NumPy's name of the type, and shape. The graph's own inputs and outputs are declared as
    in the file; of other outputs ONNX Runtime infers the type. Raises ValueError for a type unknown to ONNX.
    """
    parts = [message(_NAME, graph.name)]
    spans = [*(node.span for node in nodes), *(tensor.span for tensor in tensors)]
    parts += [data[start:end] for start, end in spans]
    parts += [graph.inputs.get(name) or _declared(name, dtype, shape) for name, dtype, shape in inputs]
    parts += [
        graph.outputs.get(name) or message(_OUTPUT, message(_VALUE_NAME, name.encode())) for name in outputs
    ]
    return b"".join([graph.header, opening(_GRAPH, sum(map(len, parts))), *parts])


def _declared(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    if dtype not in _TYPES:
        raise ValueError(f"value {name!r}: expected a type of ONNX, got {dtype}")
    dims = b"".join(message(_DIM, number_field(_DIM_VALUE, size)) for size in shape)
    tensor = number_field(_ELEMENT, _TYPES[dtype]) + message(_SHAPE, dims)
    kind = message(_VALUE_TYPE, message(_TENSOR_TYPE, tensor))
    return message(_INPUT, message(_VALUE_NAME, name.encode()) + kind)


def _add(graph: Graph, data: mmap.mmap, part: Field) -> None:
    if part.number == _NODE:
        graph.nodes.append(_node(data, part))
    elif part.number == _NAME:
        graph.name = data[part.start : part.end]
    elif part.number == _INITIALIZER:
        own = list(fields(data, part.start, part.end))
        name = _first(data, own, _TENSOR_NAME)
        graph.tensors[name] = Tensor((part.at, part.end), _numbers(data, own))
    elif part.number in (_INPUT, _OUTPUT, _VALUE_INFO):
        own = list(fields(data, part.start, part.end))
        name, size = _first(data, own, _VALUE_NAME), _size(data, own)
        if part.number != _VALUE_INFO:
            ports = graph.inputs if part.number == _INPUT else graph.outputs
            ports[name] = data[part.at : part.end]
        if size is not None:
            graph.value_bytes[name] = size
    elif part.number == _SPARSE:
        graph.is_sparse = True


def _first(data: mmap.mmap, own: Sequence[Field], number: int) -> str:
    return next((text(data, each) for each in own if each.number == number), "")


def _node(data: mmap.mmap, part: Field) -> Node:
    own = list(fields(data, part.start, part.end))
    inner = [
        each
        for attribute in own
        if attribute.number == _ATTRIBUTE
        for each in fields(data, attribute.start, attribute.end)
    ]
    tensors = [list(fields(data, each.start, each.end)) for each in inner if each.number == _TENSOR]
    return Node(
        (part.at, part.end),
        _first(data, own, _TYPE),
        _first(data, own, _DOMAIN),
        tuple(text(data, each) for each in own if each.number == _TAKES),
        tuple(text(data, each) for each in own if each.number == _MAKES),
        sum(_numbers(data, tensor) for tensor in tensors),
        any(each.number in _SUBGRAPHS for each in inner),
    )


def _numbers(data: mmap.mmap, tensor: Sequence[Field]) -> int:
    return math.prod(size for each in tensor if each.number == _DIMS for size in varints(data, each))


def _size(data: mmap.mmap, value: Sequence[Field]) -> int | None:
    """Bytes of a tensor whose every dimension is a number, else None."""
    tensor = list(_inside(data, list(_inside(data, value, _VALUE_TYPE)), _TENSOR_TYPE))
    element = next((each.value for each in tensor if each.number == _ELEMENT), None)
    if element not in _BYTES or not any(each.number == _SHAPE for each in tensor):
        return None
    size = _BYTES[element]
    for dim in _inside(data, tensor, _SHAPE):
        numbers = [each.value for each in fields(data, dim.start, dim.end) if each.number == _DIM_VALUE]
        if not numbers:
            return None
        size *= numbers[0]
    return size


def _inside(data: mmap.mmap, own: Sequence[Field], number: int) -> Iterator[Field]:
    return (each for outer in own if outer.number == number for each in fields(data, outer.start, outer.end))
