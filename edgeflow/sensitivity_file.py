"""Layers' sensitivities as a recipe's search wrote them: how much each layer's integers cost at the picture.

Read from any JSON that holds, at any depth, a list of objects with ``component``, ``layer`` and a number, or
``errors``, a number for each scheme.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeflow.errors import DataError
from edgeflow.verdict import VerdictReport
from edgeflow.verdict_page import Sensitivity

#: The number that is shown, the first of these that the objects have. More is worse, but for decibels.
_KEYS = ("sensitivity", "drop", "damage", "cost", "error", "psnr_db", "sqnr_db")


def read_sensitivity(path: Path) -> Sensitivity:
    """The sensitivities of a file. Raises DataError for one that cannot be read or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"sensitivity: {path}: expected a JSON file, got: {error}") from error
    found = find_sensitivity(value, path.name)
    if found is None:
        raise DataError(
            f"sensitivity: {path}: expected a list of objects with component, layer and one of errors, "
            f"{', '.join(_KEYS)}, found none"
        )
    return found


def find_sensitivity(value: Any, source: str) -> Sensitivity | None:
    """The first list of layers' costs within a JSON value, or None."""
    for items in _lists(value):
        if all(_by_scheme(item) for item in items):
            return _dearest(items, source)
        for key in _KEYS:
            if not all(isinstance(item.get(key), int | float) for item in items):
                continue
            values, figure = [float(item[key]) for item in items], key
            if key.endswith("_db"):
                values = [max(values) - value for value in values]
                figure = f"{key.removesuffix('_db').upper()}, in dB below the least sensitive layer's"
            named = zip(map(_name, items), values, strict=True)
            return Sensitivity(source, figure, tuple(named))
    return None


def _by_scheme(item: dict[str, Any]) -> bool:
    errors = item.get("errors")
    return (
        isinstance(errors, dict) and bool(errors) and all(isinstance(v, int | float) for v in errors.values())
    )


def _dearest(items: list[dict[str, Any]], source: str) -> Sensitivity:
    """The form of ``edgeflow quantize``'s search: each layer under the scheme that costs it most."""
    layers = []
    for item in items:
        scheme, error = max(item["errors"].items(), key=lambda entry: float(entry[1]))
        layers.append((_name({**item, "scheme": scheme}), float(error)))
    figure = "Mean squared error of the pictures in [0, 1], under the scheme that costs the layer most"
    return Sensitivity(source, figure, tuple(layers))


def carried_sensitivity(report: VerdictReport) -> list[Sensitivity]:
    """What the recipes of the rows carry of their own search, once a recipe."""
    recipes = {row.recipe["name"]: row.recipe for row in report.rows if row.recipe is not None}
    found = [find_sensitivity(recipe, f"recipe {name}") for name, recipe in recipes.items()]
    return [one for one in found if one is not None]


def _name(item: dict[str, Any]) -> str:
    scheme = item.get("scheme")
    return f"{item['component']} {item['layer']}" + (f", {scheme}" if isinstance(scheme, str) else "")


def _lists(value: Any) -> Iterator[list[dict[str, Any]]]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _lists(inner)
    elif isinstance(value, list) and value:
        if all(isinstance(v, dict) and {"component", "layer"} <= set(v) for v in value):
            yield value
        else:
            for inner in value:
                yield from _lists(inner)
