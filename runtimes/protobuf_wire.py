"""Protobuf's wire format (protobuf.dev, "Encoding"), as far as ONNX files need it.

Each field is a varint of number · 8 + kind; kind 0 is a varint, 1 eight bytes, 2 a length and as many bytes,
5 four bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
#: Seven bits a byte, 64 in all.
_LONGEST_VARINT = 10


class Field(NamedTuple):
    """A field by its places in the data: its tag begins at ``at``, its content at ``start``."""

    number: int
    at: int
    start: int
    end: int
    value: int  # a varint's; 0 of any other


def fields(data: bytes | mmap.mmap, start: int, end: int) -> Iterator[Field]:
    """Every field between two places, in order. Raises ValueError for what is not of this format."""
    at = start
    while at < end:
        begin = at
        tag, at = _varint(data, at, end)
        number, kind, value = tag >> 3, tag & 7, 0
        if kind == _VARINT:
            content = at
            value, at = _varint(data, at, end)
            yield Field(number, begin, content, at, value)
            continue
        if kind == _BYTES:
            size, at = _varint(data, at, end)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"expected an ONNX file, got a field of kind {kind}")
        if at + size > end:
            raise ValueError("expected an ONNX file, got one that is cut off")
        yield Field(number, begin, at, at + size, value)
        at += size


def varints(data: bytes | mmap.mmap, field: Field) -> list[int]:
    """The numbers of a repeated varint field: one a field, or all of them packed into one."""
    if data[field.at] & 7 == _VARINT:
        return [field.value]
    found, at = [], field.start
    while at < field.end:
        value, at = _varint(data, at, field.end)
        found.append(value)
    return found


def text(data: bytes | mmap.mmap, field: Field) -> str:
    """The content as text. Raises ValueError for what is not UTF-8."""
    return data[field.start : field.end].decode()


def message(number: int, content: bytes) -> bytes:
    """A field of bytes, of text or of another message."""
    return opening(number, len(content)) + content


def opening(number: int, size: int) -> bytes:
    """What stands before the ``size`` bytes of such a field."""
    return _number(number << 3 | _BYTES) + _number(size)


def number_field(number: int, value: int) -> bytes:
    """A varint field; ``value`` is not negative."""
    return _number(number << 3 | _VARINT) + _number(value)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: bytes | mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(_LONGEST_VARINT):
        if at + i >= end:
            raise ValueError("expected an ONNX file, got one that is cut off")
        byte = data[at + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("expected an ONNX file, got a number of more than 64 bits")
