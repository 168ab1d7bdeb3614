"""Bits for every layer under a budget: the allocation of least error, by integer programming.

Each layer takes one scheme; the sum of the layers' errors (edgeflow.quantization.sensitivity) is least under
a limit on bytes or on integer bits, or bytes are least under a limit on the error: a multiple-choice
knapsack, which scipy's HiGHS solves. That errors add up is an assumption, which the search's curve holds
against what the allocations really give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeflow.errors import UsageError
from edgeflow.quantization.recipe import SCHEMA, Recipe, parse_recipe
from edgeflow.quantization.schemes import FLOAT, SCHEMES
from edgeflow.quantization.sensitivity import LayerErrors, Sensitivity

#: Bytes of a value that stays float, of a scale and of a zero point: those of an fp16 bundle.
FLOAT_BYTES, SCALE_BYTES, ZERO_BYTES = 2, 2, 1
MIB = 2**20


def stored_bytes(shape: tuple[int, ...], scheme: str) -> int:
    """Bytes of one weight: integers, scales and zero points, or fp16."""
    values = math.prod(shape)
    if scheme == FLOAT:
        return FLOAT_BYTES * values
    how = SCHEMES[scheme]
    blocks = math.prod(how.scale_shape(shape))
    return values * how.bits // 8 + blocks * (SCALE_BYTES + (ZERO_BYTES if how.zero_point else 0))


def integer_bits(scheme: str) -> int:
    """Bits of one stored value, scales apart."""
    return 8 * FLOAT_BYTES if scheme == FLOAT else SCHEMES[scheme].bits


@dataclass(frozen=True)
class Allocation:
    """A scheme for each layer of a Sensitivity, in its order; ``bytes`` with what stays float."""

    schemes: tuple[str, ...]
    bytes: int
    average_bits: float  # of the layers' values, scales apart
    error: float  # the sum of the layers' own: what the picture's would be if errors added up

    def plan(self, sensitivity: Sensitivity) -> dict[str, dict[str, str]]:
        """component → layer → scheme."""
        plan: dict[str, dict[str, str]] = {}
        for layer, scheme in zip(sensitivity.layers, self.schemes, strict=True):
            plan.setdefault(layer.component, {})[layer.layer] = scheme
        return plan


class Allocator:
    """Allocations of one measured model."""

    def __init__(self, sensitivity: Sensitivity):
        self.sensitivity = sensitivity
        self._choices = [_choices(layer) for layer in sensitivity.layers]
        self._rest = FLOAT_BYTES * sensitivity.float_values
        self._values = sum(math.prod(layer.shape) for layer in sensitivity.layers)
        self.least_bytes = self._rest + sum(min(c[1] for c in layer) for layer in self._choices)
        self.most_bytes = self._rest + sum(max(c[1] for c in layer) for layer in self._choices)

    def under_bytes(self, budget: int) -> Allocation:
        """Least error in ``budget`` bytes. Raises UsageError, naming the least that can be."""
        if budget < self.least_bytes:
            raise UsageError(
                f"budget: {budget / MIB:.2f} MiB: expected {_up(self.least_bytes / MIB, 2)} MiB or more, "
                "the least that this model's weights can be stored in"
            )
        return self._solve(costs=1, limit=budget - self._rest, least=2)

    def under_bits(self, average: float) -> Allocation:
        """Least error with ``average`` integer bits a value, scales apart. Raises UsageError as above."""
        least = sum(min(c[3] for c in layer) for layer in self._choices) / self._values
        if average < least:
            raise UsageError(
                f"average bits: {average:g}: expected {_up(least, 3)} or more, the least of this model"
            )
        return self._solve(costs=3, limit=int(average * self._values), least=2)

    def under_error(self, error: float) -> Allocation:
        """Least bytes with the summed error at most ``error``; all float has none."""
        if error <= 0:
            return self.of([FLOAT] * len(self._choices))
        return self._solve(costs=2, limit=error, least=1)

    def of(self, schemes: Sequence[str]) -> Allocation:
        chosen = [
            next(c for c in layer if c[0] == s) for layer, s in zip(self._choices, schemes, strict=True)
        ]
        size = self._rest + sum(c[1] for c in chosen)
        return Allocation(
            tuple(schemes), size, sum(c[3] for c in chosen) / self._values, sum(c[2] for c in chosen)
        )

    def _solve(self, costs: int, limit: float, least: int) -> Allocation:
        """Least sum of column ``least``, one choice a layer, the sum of column ``costs`` within ``limit``."""
        allowed = limit
        for _ in range(4):
            taken = self._milp(costs, allowed, least)
            over = sum(c[costs] for c in taken) - limit
            if over <= 0:
                return self.of([c[0] for c in taken])
            allowed -= max(2 * over, 4e-6 * limit)  # the solver keeps limits to within a tolerance
        raise RuntimeError("allocation: the solver found none within the limit")

    def _milp(self, costs: int, limit: float, least: int) -> list[Any]:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        rows: list[Any] = [(i, c) for i, layer in enumerate(self._choices) for c in layer]
        goal = np.array([c[least] for _, c in rows], dtype=float)
        cost = np.array([c[costs] for _, c in rows], dtype=float)
        unit = limit if 0 < limit < 1 else 1.0  # errors are small numbers, bytes and bits are large ones
        one = csr_array((np.ones(len(rows)), ([i for i, _ in rows], range(len(rows)))))
        solved = milp(
            goal / (goal.max() or 1.0),
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(cost[None] / unit, -np.inf, limit / unit),
            ],
            options={"mip_rel_gap": 1e-6, "node_limit": 20000},  # no time limit: equal inputs, equal bits
        )
        if solved.x is None:
            raise RuntimeError(f"allocation: the solver found none: {solved.message}")
        return [c for (_, c), x in zip(rows, solved.x, strict=True) if x > 0.5]


def _choices(layer: LayerErrors) -> list[tuple[str, int, float, int]]:
    """(scheme, bytes, error, bits) of a layer, float among them."""
    errors = {FLOAT: 0.0, **layer.errors}
    values = math.prod(layer.shape)
    return [(s, stored_bytes(layer.shape, s), e, integer_bits(s) * values) for s, e in errors.items()]


def _up(value: float, digits: int) -> str:
    """Rounded up, so that what an error message asks for is enough."""
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def recipe_of(
    allocation: Allocation, sensitivity: Sensitivity, name: str, found_by: str, measured: dict[str, Any]
) -> Recipe:
    """One rule a layer; it fits every model of the same architecture."""
    rules = [
        {"component": layer.component, "pattern": _literal(layer.layer), "scheme": scheme}
        for layer, scheme in zip(sensitivity.layers, allocation.schemes, strict=True)
    ]
    raw = {"schema": SCHEMA, "name": name, "rules": rules, "found_by": found_by, "measured": measured}
    return parse_recipe(raw, name)


def _literal(name: str) -> str:
    """The pattern that this name alone matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
