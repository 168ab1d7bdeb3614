"""Which operations an ONNX file holds, from its bytes: a device that runs one need not have the package onnx.

Protobuf's wire format (protobuf.dev, "Encoding"): each field is a varint of number · 8 + kind; kind 0 is a
varint, 1 eight bytes, 2 a length and as many bytes, 5 four bytes. ONNX's numbers (onnx.proto): a model's
graph is 7, a graph's nodes are 1, a node's type is 4 and its domain 7.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

_GRAPH, _NODE, _TYPE, _DOMAIN = 7, 1, 4, 7
_FIXED = {1: 8, 5: 4}


def node_types(path: Path) -> Iterator[tuple[str, str]]:
    """(domain, type) of every node of a model's graph, in order; "" is the standard's own domain.

    Weights are passed over. Raises ValueError for a file that is not of this format.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, start, end in _fields(data, 0, len(data)):
            if number == _GRAPH:
                yield from (
                    _node(data, *span) for field, *span in _fields(data, start, end) if field == _NODE
                )


def _node(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    texts = {number: data[a:b] for number, a, b in _fields(data, start, end) if number in (_TYPE, _DOMAIN)}
    return texts.get(_DOMAIN, b"").decode(), texts.get(_TYPE, b"").decode()


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of every field between two places; of a varint the span is empty."""
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, at = _varint(data, at)
            yield number, at, at
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"expected an ONNX file, got a field of kind {kind}")
        if at + size > end:
            raise ValueError("expected an ONNX file, got one that is cut off")
        yield number, at, at + size
        at += size


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
