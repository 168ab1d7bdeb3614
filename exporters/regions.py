"""Which of a backend's operations stand for which of the program's, by the names that values keep.

A backend takes some of the program's nodes apart. What lies between two values that bear the names of
program nodes is one region: it stays float32 together, or is float16 together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgeflow.overflow import Wide


@dataclass(frozen=True)
class Op:
    """One operation of a backend's graph: the names of the float values it takes and makes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def wide_ops(ops: Iterable[Op], wide: Wide, constants: Iterable[str], *, squares: bool) -> set[str]:
    """Names of the operations that must stay float32.

    An operation does if some value that its region takes or makes is one of ``wide.values``, or if the region
    makes one of ``wide.inside`` (with ``squares``, of ``wide.squares`` too). ``constants`` are values that
    belong to no region, as weights do.
    """
    ops = list(ops)
    if not wide:
        return set()
    over = wide.inside | (wide.squares if squares else frozenset())
    region = _regions(ops, wide, set(constants))
    found = {
        region[op.name]
        for op in ops
        if wide.values & {*op.inputs, *op.outputs} or over.intersection(op.outputs)
    }
    return {op.name for op in ops if region[op.name] in found}


def _regions(ops: list[Op], wide: Wide, constants: set[str]) -> dict[str, str]:
    """Operation → its region's first operation; an unnamed value joins its maker's and its takers'."""
    region = {op.name: op.name for op in ops}

    def root(name: str) -> str:
        while region[name] != name:
            region[name] = region[region[name]]
            name = region[name]
        return name

    producer = {value: op.name for op in ops for value in op.outputs}
    for op in ops:
        for value in op.inputs:
            if value in producer and value not in wide.nodes and value not in constants:
                region[root(op.name)] = root(producer[value])
    return {name: root(name) for name in region}
