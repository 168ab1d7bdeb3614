"""Which operations of a graph cannot be computed in float16, and how a bundle says so. Torch-free.

A value counts as too large from half of float16's largest on: ranges are measured on a few prompts, and
another may well give a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeflow.errors import ExportError

#: float16's largest finite value, 65504, with a margin of 2.
LIMIT = 65504.0 / 2


@dataclass(frozen=True)
class Range:
    """One node of a program: its operation, the module it comes from and the largest magnitudes seen."""

    node: str
    op: str
    module: str
    largest: float  # of its output
    inside: float = 0.0  # of what it computes on the way: a group norm's squares, an attention's logits

    @property
    def finite(self) -> bool:
        return math.isfinite(self.largest) and math.isfinite(self.inside)

    @property
    def place(self) -> str:
        return f"{self.module or self.node} ({self.op})"


@dataclass(frozen=True)
class Wide:
    """What must stay float32 in a float16 graph, by the program's node names.

    ``values`` are tensors that float16 cannot hold: what makes or takes one stays float32. ``inside`` are
    operations whose own arithmetic would overflow. ``squares`` are group norms whose squares would, which
    matters where a backend takes them apart.
    """

    values: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()
    squares: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()  # every node of the program, to tell its values from a backend's own

    def __bool__(self) -> bool:
        return bool(self.values or self.inside or self.squares)


def merged(runs: Sequence[Iterable[Range]]) -> list[Range]:
    """The ranges of several runs of one program: the largest of each node."""
    found: dict[str, Range] = {}
    for run in runs:
        for r in run:
            old = found.get(r.node, r)
            largest, inside = max(old.largest, r.largest), max(old.inside, r.inside)
            found[r.node] = Range(r.node, r.op, r.module, largest, inside)
    return list(found.values())


def wide_nodes(ranges: Iterable[Range]) -> Wide:
    """What of a program float16 cannot compute."""
    ranges = list(ranges)
    over = {r.node for r in ranges if r.inside > LIMIT}
    squares = {r.node for r in ranges if r.op == "group_norm"}
    return Wide(
        values=frozenset(r.node for r in ranges if r.largest > LIMIT),
        inside=frozenset(over - squares),
        squares=frozenset(over & squares),
        nodes=frozenset(r.node for r in ranges),
    )


def described(ranges: Iterable[Range], wide: Wide, squares: bool) -> tuple[str, ...]:
    """What a manifest lists: ``decoder.conv_in (conv2d): 1.2e+05``. ``squares``: norms' too."""
    names = wide.values | wide.inside | (wide.squares if squares else frozenset())
    return tuple(f"{r.place}: {max(r.largest, r.inside):.1e}" for r in ranges if r.node in names)


def check_strict(found: Mapping[str, Sequence[str]]) -> None:
    """Raise ExportError naming the first operation of each graph that must stay float32, if any."""
    listed = [f"{graph}: {len(ops)} operations, the first {ops[0]}" for graph, ops in found.items() if ops]
    if listed:
        raise ExportError(
            "export: --strict-precision: expected every operation of an fp16 graph in float16, whose largest "
            f"value is 65504; {'; '.join(listed)} would overflow"
        )
