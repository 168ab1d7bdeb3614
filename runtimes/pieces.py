"""A graph run a piece at a time: where it is cut, and how values are handed from piece to piece.

A backend that makes float32 of every weight holds up to eight times what its file holds, all at once. In
pieces of at most ``LARGEST`` bytes of float32 weights, each made ready, run and freed before the next, it
holds those of one piece. A cut lies where the least data crosses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from edgeflow.low_memory import give_back

#: Bytes of float32 weights that one piece may hold; a single operation with more is a piece of its own.
LARGEST = 1 << 29
#: A cut lies behind at least this part of what a piece may hold.
_SLACK = 0.75
#: How a backend names what one operation hands to another.
Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Step(Generic[Value]):
    """An operation that depends on inputs. Constants are none: they travel with each piece that uses them."""

    takes: tuple[Value, ...]
    makes: Mapping[Value, int]  # value → bytes
    weights: Mapping[Any, int]  # constant that it uses, by any key → bytes in float32


@dataclass(frozen=True)
class Piece(Generic[Value]):
    """A run of steps, from ``start`` up to and without ``end``."""

    start: int
    end: int
    takes: tuple[Value, ...]  # made before it, in the order of their first use
    gives: tuple[Value, ...]  # what a later piece takes, or is a result; in the order they are made


def cut(steps: Sequence[Step[Value]], results: Sequence[Value], largest: int) -> list[Piece[Value]]:
    """Pieces whose weights take at most ``largest`` bytes in float32; ``results`` are the graph's."""
    crossing = _crossing(steps)
    ends, start = [], 0
    while start < len(steps):
        held = list(_held(steps[start:], largest))
        fit = max(1, sum(size <= largest for size in held))
        low = sum(size < largest * _SLACK for size in held) if start + fit < len(steps) else fit - 1
        start += min(range(min(low, fit - 1), fit), key=lambda i: (crossing[start + i], -i)) + 1
        ends.append(start)
    return _pieces(steps, results, ends)


def _held(steps: Sequence[Step[Value]], largest: int) -> Iterator[int]:
    """Bytes of weights of the steps up to each, as far as they fit; what two steps share counts once."""
    seen: dict[Any, int] = {}
    for step in steps:
        seen |= step.weights
        yield sum(seen.values())
        if sum(seen.values()) > largest:
            return


def _crossing(steps: Sequence[Step[Value]]) -> list[int]:
    """Bytes that a cut behind each step would hand on. What is fed lies there in any case."""
    last = {value: i for i, step in enumerate(steps) for value in step.takes}
    change = [0] * (len(steps) + 1)
    for i, step in enumerate(steps):
        for value, size in step.makes.items():
            if value in last:
                change[i] += size
                change[last[value]] -= size
    return list(accumulate(change))


def _pieces(
    steps: Sequence[Step[Value]], results: Sequence[Value], ends: Sequence[int]
) -> list[Piece[Value]]:
    pieces: list[Piece[Value]] = []
    wanted = set(results)
    for start, end in reversed(list(zip([0, *ends], ends, strict=False))):
        own = steps[start:end]
        made = [value for step in own for value in step.makes]
        taken = dict.fromkeys(value for step in own for value in step.takes)
        takes = tuple(value for value in taken if value not in set(made))
        pieces.append(Piece(start, end, takes, tuple(value for value in made if value in wanted)))
        wanted |= set(takes)
    return pieces[::-1]


def run(
    pieces: Sequence[Piece[Value]],
    fed: Mapping[Value, NDArray[Any]],
    results: Sequence[Value],
    run_piece: Callable[[Piece[Value], list[NDArray[Any]]], Sequence[NDArray[Any]]],
) -> dict[Value, NDArray[Any]]:
    """Arrays by the values that are fed → arrays by ``results``.

    ``run_piece`` is given a piece and what it takes, in order, and answers with what it gives, in order.
    An array is held until the last piece that takes it has run.
    """
    values = dict(fed)
    for number, piece in enumerate(pieces):
        made = run_piece(piece, [values[value] for value in piece.takes])
        values |= dict(zip(piece.gives, made, strict=True))
        del made
        needed = set(results).union(*(later.takes for later in pieces[number + 1 :]))
        values = {value: array for value, array in values.items() if value in needed}
        give_back()
    return {value: values[value] for value in results}
