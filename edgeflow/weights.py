"""What a safetensors file holds, read from its header alone. Torch-free.

The format (github.com/huggingface/safetensors, README "Format"): a little-endian u64 header length, that many
bytes of JSON, then the tensors' bytes one after the other without a hole.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgeflow.errors import CheckpointError

#: Bits of one value of each dtype, by safetensors' name.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
#: safetensors' own limit on the header.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file stores it; ``dtype`` is safetensors' name (F16, BF16, F32, I8 …)."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name → tensor of a safetensors file, once it is certain that no byte of the file is missing.

    Raises CheckpointError for a file that is truncated, padded, unreadable or not safetensors at all.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise CheckpointError(
                    f"weights: {path}: the safetensors file is truncated, or is not one ({size} bytes)"
                )
            text = file.read(length) if length <= _MAX_HEADER else b""
    except OSError as error:
        raise CheckpointError(f"weights: {path}: expected a readable file, got: {error.strerror}") from error
    tensors = _parse(text, path)
    _check_layout(tensors, size - 8 - length, path)
    return tensors


def _parse(text: bytes, path: Path) -> dict[str, StoredTensor]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _stored(raw) for name, raw in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"weights: {path}: expected a safetensors header, got {type(error).__name__}: {error}"
        ) from error


def _stored(raw: dict[str, Any]) -> StoredTensor:
    start, end = raw["data_offsets"]
    tensor = StoredTensor(raw["dtype"], tuple(raw["shape"]), start, end)
    if tensor.dtype not in DTYPE_BITS:
        raise ValueError(f"the dtype {tensor.dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*tensor.shape, start, end)):
        raise ValueError(f"the shape {raw['shape']} at {raw['data_offsets']}")
    return tensor


def _check_layout(tensors: dict[str, StoredTensor], available: int, path: Path) -> None:
    """Every tensor is as long as its shape says, follows the one before, and the last ends the file."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        bits = tensor.numel * DTYPE_BITS[tensor.dtype]
        if tensor.start != position or (tensor.end - tensor.start) * 8 != bits:
            raise CheckpointError(
                f"weights: {path}: tensor {name!r}: expected {bits // 8} bytes from byte {position}, "
                f"got bytes {tensor.start} to {tensor.end}"
            )
        position = tensor.end
    if position != available:
        kind = "truncated" if available < position else "longer than its header says"
        raise CheckpointError(
            f"weights: {path}: the safetensors file is {kind}: "
            f"expected {position} bytes of tensors, got {available}"
        )
