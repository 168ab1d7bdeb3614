"""The tables of edgeflow.training.full_size_table, in Markdown, from the pieces' JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

GIB_IN_MIB = 1024
_EXPORT = ("export", "s", "peak GiB", "load", "reference s (GiB)", "parity's PyTorch s (GiB)", "gates")
_BUNDLES = ("bundle", "graphs MiB", "lowering s (GiB)", "parity s (GiB)", "lowering dB", "end to end dB")
_PICTURES = ("picture", "picture s", "command s", "peak GiB", "limit GiB", "load")


class Group(Protocol):
    """See edgeflow.training.full_size_table.Group."""

    @property
    def name(self) -> str: ...

    def bundle(self, backend: str) -> str: ...


def render(rows: Mapping[str, Any], groups: Sequence[Group], backends: Sequence[str]) -> str:
    """Three tables: the export commands, their bundles, their pictures; pieces not measured are left out."""
    exports = [_export(g.name, rows[f"{g.name}.export"]) for g in groups if f"{g.name}.export" in rows]
    bundles = [
        line
        for g in groups
        if f"{g.name}.export" in rows
        for backend in backends
        for line in _bundle(g, backend, rows[f"{g.name}.export"])
    ]
    pictures = [
        _picture(f"{g.name} {backend}{suffix.replace('-', ' --', 1)}", rows[name], bool(suffix))
        for g in groups
        for backend in backends
        for suffix in ("", "-low-memory")
        if (name := f"{g.name}.{backend}{suffix}") in rows
    ]
    tables = (_table(_EXPORT, exports), _table(_BUNDLES, bundles), _table(_PICTURES, pictures))
    return "\n\n".join(tables)


def _export(name: str, row: Mapping[str, Any]) -> list[str]:
    parity = row["said"]["parity"]
    return [
        name,
        f"{row['wall_s']:.0f}",
        _gib(row["peak_rss_mib"]),
        f"{row['load_before'][0]:.1f}",
        _steps(row, lambda what: what == "reference pictures"),
        _steps(row, lambda what: what.endswith((": references in PyTorch", ": rewrite"))),
        "hold" if parity["passed"] else "; ".join(parity["failures"]),
    ]


def _bundle(group: Group, backend: str, row: Mapping[str, Any]) -> Iterable[list[str]]:
    folder = group.bundle(backend)
    for facts in row["said"]["bundles"]:
        if facts["backend"] != backend:
            continue
        yield [
            f"{group.name} {backend}",
            f"{facts['graphs_mib']:.0f}",
            _steps(row, lambda what: what.startswith(f"{folder}: ") and what != f"{folder}: {backend}"),
            _steps(row, lambda what: what == f"{folder}: {backend}"),
            ", ".join(_gaps(row, folder, "lowering")),
            ", ".join(_gaps(row, folder, "end_to_end")),
        ]


def _gaps(row: Mapping[str, Any], folder: str, gap: str) -> Iterable[str]:
    """Every graph's worst value; the reason where there is none."""
    for found in row["said"]["parity"]["measurements"]:
        if found["gap"] == gap and found["bundle"] == folder:
            worst = found["worst"]
            value = f"{worst:.1f}" if isinstance(worst, float | int) else str(worst or found["reason"])
            yield value if found["component"] == "pipeline" else f"{found['component']} {value}"


def _picture(name: str, row: Mapping[str, Any], low_memory: bool) -> list[str]:
    limit = 1.25 * row["largest_graph_bytes"] / 2**30 + 1
    picture = row["said"]["pictures"][0]
    return [
        name,
        f"{picture['latency_ms'] / 1000:.1f}",
        f"{row['wall_s']:.1f}",
        _gib(row["peak_rss_mib"]),
        f"{limit:.2f}" if low_memory else "",
        f"{row['load_before'][0]:.1f}",
    ]


def _steps(row: Mapping[str, Any], wanted: Any) -> str:
    """Seconds and peak of the steps of an export whose words ``wanted`` takes."""
    found = [step for step in row["steps"] if wanted(step["what"])]
    if not found:
        return ""
    return f"{sum(s['seconds'] for s in found):.0f} ({_gib(max(s['peak_mib'] for s in found))})"


def _gib(mib: float) -> str:
    return f"{mib / GIB_IN_MIB:.2f}"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
