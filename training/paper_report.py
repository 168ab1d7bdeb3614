"""Tables of several seeds as one: JSON and Markdown. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from edgeflow.errors import DataError, UsageError

SCHEMA = 1
#: Figures of the table: key, heading, digits.
_FIGURES = (
    ("frechet", "FD ↓", 1),
    ("kid", "KID ↓", 3),
    ("precision", "Precision ↑", 3),
    ("recall", "Recall ↑", 3),
    ("r_at_1", "R@1 ↑", 3),
)
#: What two tables must share to be one.
_COMMON = ("settings", "data", "quality", "versions")

Table = dict[str, Any]


def read_tables(folders: Sequence[Path]) -> list[Table]:
    """Raises DataError for a folder without a table."""
    tables = []
    for folder in folders:
        file = folder / "table.json"
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"table: {file}: expected a finished table, got: {error}") from error
        if (table.get("kind"), table.get("schema")) != ("paper-table", SCHEMA):
            raise DataError(f"table: {file}: expected a paper-table of schema {SCHEMA}, got another JSON")
        tables.append(table)
    return tables


def combine(tables: Sequence[Table]) -> Table:
    """One table: every number becomes {"mean", "seeds": [one a table]}.

    Raises UsageError for tables of the same seed or made with other settings, data or versions.
    """
    seeds = [t["seed"] for t in tables]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"table: --combine: expected tables of different seeds, got {seeds}")
    first = tables[0]
    for key in _COMMON:
        if any(t[key] != first[key] for t in tables):
            got = " and ".join(json.dumps(t[key], sort_keys=True) for t in tables)
            raise UsageError(f"table: --combine: expected tables of equal {key}, got {got}")
    rows = []
    for group in zip(*(t["rows"] for t in tables), strict=True):
        row = {k: group[0][k] for k in ("label", "run", "steps", "guidance", "stages")}
        row["minutes"] = _several([r["minutes"] for r in group])
        row["figures"] = {k: _several([r["figures"][k] for r in group]) for k in group[0]["figures"]}
        row["paths"] = {k: _several([r["paths"][k] for r in group]) for k in group[0]["paths"]}
        rows.append(row)
    stages = {
        name: {k: _several([t["stages"][name][k] for t in tables]) for k in first["stages"][name]}
        for name in first["stages"]
    }
    return {
        "schema": SCHEMA,
        "kind": "paper-table-combined",
        "seeds": seeds,
        **{key: first[key] for key in _COMMON},
        "machines": [t["machine"] for t in tables],
        "pairs": [t["pairs"] for t in tables],
        "models": [t["models"] for t in tables],
        "stages": stages,
        "floor": {k: _several([t["floor"][k] for t in tables]) for k in first["floor"]},
        "rows": rows,
    }


def _several(values: list[float | None]) -> dict[str, Any] | None:
    numbers = [v for v in values if v is not None]
    if len(numbers) < len(values):
        return None
    return {"mean": fmean(numbers), "seeds": numbers}


def render(table: Table) -> str:
    """The combined table as Markdown: caption, quality, paths, cost."""
    return "\n".join([*_caption(table), "", *_quality(table), "", *_paths(table), "", *_cost(table), ""])


def _caption(table: Table) -> list[str]:
    data, quality, settings = table["data"], table["quality"], table["settings"]
    count = data["prompts"] * quality["per_prompt"]
    each = "one picture" if quality["per_prompt"] == 1 else f"{quality['per_prompt']} pictures"
    names = " and ".join(dict.fromkeys(f"{m['name']}" for m in table["machines"]))
    seeds = ", ".join(map(str, table["seeds"]))
    m = settings["minutes"]
    budget = (
        f"{m:g} minutes of reflow, {m:g} of distillation, {2 * m:g} direct, {2 * m / 3:.3g} small student"
    )
    budget = budget if m else "by the preset's steps"
    targets = (
        f"targets of the distillations from the flow: its own ODE in {settings['target_steps']} Euler steps"
        if settings["target_steps"]
        else "targets of all distillations: the teacher's pictures"
    )
    v = table["versions"]
    return [
        f"Preset `{settings['preset']}`, seed{'s' * (len(table['seeds']) > 1)} {seeds}, on {names}, "
        f"torch {v['torch']}, diffusers {v['diffusers']}.",
        f"Budgets: {budget} (wall time of training, compilation apart; the minutes below include it); "
        f"{targets}.",
        f"{each.capitalize()} for each of {data['prompts']} captions of split `{data['split']}` of "
        f"{data['name']} ({count} drawn), the same noise for every row and seed, judged by "
        f"{quality['features'][0]} against the captions' {data['prompts']} real pictures;",
        f"KID over {quality['kid_subsets']} subsets of {quality['kid_subset_size']}. Paths from the noise "
        f"and captions of {settings['num_paths']} pairs. Where seeds differ: mean (each seed).",
    ]


def _quality(table: Table) -> list[str]:
    head = ["Model", "steps", *(title for _, title, _ in _FIGURES), "minutes"]
    floor = [_cell(table["floor"].get(key), digits) for key, _, digits in _FIGURES]
    lines = [["real pictures (floor)", "–", *floor, "–"]]
    for row in table["rows"]:
        figures = [_cell(row["figures"][key], digits) for key, _, digits in _FIGURES]
        lines.append([row["label"], str(row["steps"]), *figures, _cell(row["minutes"], 2)])
    return _markdown(head, lines)


def _paths(table: Table) -> list[str]:
    head = ["Paths", "steps", "E‖x₁ − x₀‖²", "a coordinate", "S", "in the first segment", "S / E‖x₁ − x₀‖²"]
    stored = _several([p["transport"] for p in table["pairs"]])
    lines = [["pairs, as stored", "–", _cell(stored, 1), *"––––"]]
    for row in table["rows"]:
        p = row["paths"]
        cells = [_cell(p["transport"], 1), _cell(p["transport_per_coordinate"], 4)]
        cells += [
            _cell(p["straightness"], 1),
            _cell(p["first_segment"], 1),
            _cell(p["straightness_share"], 4),
        ]
        lines.append([row["label"], str(row["steps"]), *cells])
    return _markdown(head, lines)


def _cost(table: Table) -> list[str]:
    head = ["Stage", "minutes", "with start and sheets", "steps", "million pictures", "UNet, M parameters"]
    batch = {m["batch_size"] for models in table["models"] for m in models.values()}
    head.append(f"a forward pass, ms a picture (batch {', '.join(map(str, sorted(batch)))})")
    lines = []
    for name in table["models"][0]:
        stage = table["stages"].get(name, {})
        models = [seed[name] for seed in table["models"]]
        lines.append(
            [
                name,
                _cell(stage.get("seconds"), 2, 1 / 60),
                _cell(stage.get("wall_seconds"), 2, 1 / 60),
                _cell(stage.get("steps"), 0),
                _cell(stage.get("pictures"), 2, 1e-6),
                _cell(_several([m["unet_parameters"] for m in models]), 2, 1e-6),
                _cell(_several([m["forward_ms"] for m in models]), 3),
            ]
        )
    return _markdown(head, lines)


def _cell(value: Mapping[str, Any] | None, digits: int, scale: float = 1.0) -> str:
    """The mean, and each seed's value where they differ as shown."""
    if value is None:
        return "–"
    show: Callable[[float], str] = lambda v: f"{v * scale:.{digits}f}"  # noqa: E731
    each = [show(v) for v in value["seeds"]]
    return each[0] if len(set(each)) == 1 else f"{show(value['mean'])} ({', '.join(each)})"


def _markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]
