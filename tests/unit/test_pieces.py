"""Where a graph is cut, and what is handed on: graphs made by hand, whose best cuts can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeflow.runtimes.pieces import Piece, Step, cut, run

#: Bytes that each step of an hourglass hands to the next: narrow in the middle and at the end.
WIDTHS = (90, 80, 70, 3, 60, 50, 40, 2)


def chain(widths: Sequence[int], weight: int = 10) -> list[Step[int]]:
    """Step i takes value i, makes value i + 1 of so many bytes, and uses a weight of its own."""
    return [Step((i,), {i + 1: width}, {f"w{i}": weight}) for i, width in enumerate(widths)]


def handed_on(pieces: Sequence[Piece[int]], widths: Sequence[int]) -> int:
    return sum(widths[value - 1] for piece in pieces[:-1] for value in piece.gives)


def weights(piece: Piece[int], steps: Sequence[Step[int]]) -> int:
    used: dict[Any, int] = {}
    for step in steps[piece.start : piece.end]:
        used |= step.weights
    return sum(used.values())


@pytest.mark.parametrize("largest", [10, 20, 35, 50, 79, 80, 1000])
def test_pieces_hold_every_step_once_and_keep_to_the_limit(largest: int) -> None:
    steps = chain(WIDTHS)
    pieces = cut(steps, [len(WIDTHS)], largest)
    assert [i for piece in pieces for i in range(piece.start, piece.end)] == list(range(len(steps)))
    assert all(weights(piece, steps) <= largest for piece in pieces)


def test_a_cut_lies_where_the_least_crosses() -> None:
    """Five steps fit; behind the fourth, 3 bytes cross in place of 60."""
    pieces = cut(chain(WIDTHS), [len(WIDTHS)], 50)
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 4), (4, 8)]
    assert handed_on(pieces, WIDTHS) == 3 < WIDTHS[4]


def test_a_cut_is_not_moved_so_far_that_pieces_are_small() -> None:
    """Behind the first step one byte would cross, but a piece holds three quarters of what it may."""
    pieces = cut(chain((1, 90, 80, 85, 90)), [5], 40)
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 3), (3, 5)]


def test_a_step_beyond_the_limit_is_a_piece_of_its_own() -> None:
    steps = [*chain((5,) * 2), Step((2,), {3: 5}, {"table": 100}), *chain((5,) * 5)[3:]]
    pieces = cut(steps, [5], 30)
    assert (2, 3) in [(piece.start, piece.end) for piece in pieces]


def test_a_shared_weight_counts_once_in_every_piece_that_uses_it() -> None:
    """Six steps of one weight fit into one piece; with others of their own, it counts in each piece."""
    shared = [Step((i,), {i + 1: 4}, {"table": 20}) for i in range(6)]
    assert len(cut(shared, [6], 20)) == 1
    steps = [Step((i,), {i + 1: 4}, {"table": 20, i: 10}) for i in range(6)]
    assert [weights(piece, steps) for piece in cut(steps, [6], 50)] == [50, 50]


def test_what_a_later_piece_takes_is_handed_on_and_no_longer_held() -> None:
    """A skip: value 1 goes past the second piece to the third, and what is fed is taken by the last."""
    steps: list[Step[Any]] = [
        Step(("in",), {1: 4}, {"a": 10}),
        Step((1,), {2: 4}, {"b": 10}),
        Step((2, 1), {3: 4, "unused": 4}, {"c": 10}),
        Step((3, "in"), {4: 4}, {"d": 10}),
    ]
    pieces = cut(steps, [4, 2], 10)
    assert [piece.takes for piece in pieces] == [("in",), (1,), (2, 1), (3, "in")]
    assert [piece.gives for piece in pieces] == [(1,), (2,), (3,), (4,)]
    rules = {1: lambda x: x + 1, 2: lambda x: x * 2, 3: lambda x, y: x - y, 4: lambda x, y: x * y}

    def run_piece(piece: Piece[Any], arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        return [rules[piece.gives[0]](*arrays)]

    found = run(pieces, {"in": np.array([3.0])}, [4, 2], run_piece)
    assert {value: float(array[0]) for value, array in found.items()} == {4: 12.0, 2: 8.0}
