"""Brief names for a Core ML program's constants.

A program names each constant three times: where it is, in an attribute, and in every use. Small models have
thousands of them (an axis, a stride, a bias), and their names, made of the path of the module that they came
from, are a sixth of the description. Operations keep their names, which performance reports show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def shorten_constants(model: Any) -> None:
    """Call the constants of every function c0, c1, …, in place; ``model`` is a Model message of coremltools.

    Names that the program uses otherwise are left out; other values keep theirs.
    """
    for _, function in sorted(model.mlProgram.functions.items()):
        for _, block in sorted(function.block_specializations.items()):
            _shorten(block, {value.name for value in function.inputs})


def _shorten(block: Any, taken: set[str]) -> None:
    ops = list(_operations(block))
    taken = taken | {out.name for op in ops if not _constant(op) for out in op.outputs} | set(block.outputs)
    free = (name for i in range(10**9) if (name := f"c{i}") not in taken)
    brief = {
        out.name: next(free)
        for op in ops
        if _constant(op)
        for out in op.outputs
        if out.name not in block.outputs
    }
    for op in ops:
        for out in op.outputs:
            if _constant(op) and out.name in brief:
                new = brief[out.name]
                out.name = new
                if "name" in op.attributes:
                    op.attributes["name"].immediateValue.tensor.strings.values[0] = new
        for given in op.inputs.values():
            for argument in given.arguments:
                if argument.WhichOneof("binding") == "name":
                    argument.name = brief.get(argument.name, argument.name)


def _constant(op: Any) -> bool:
    """A constant, or a weight that is one once it is decompressed."""
    return op.type == "const" or op.type.startswith("constexpr_")


def _operations(block: Any) -> Iterator[Any]:
    """All operations, of blocks inside operations as well."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _operations(inner)
