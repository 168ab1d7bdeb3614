"""``edgeflow inspect``: what a checkpoint or a bundle is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeflow import terminal
from edgeflow.cli import options

if TYPE_CHECKING:
    from rich.table import Table


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example("edgeflow inspect emoji", "edgeflow inspect bundles/onnx-pipeline-fp32"),
)
@click.argument("path", metavar="PATH_OR_NAME")
@click.option(
    "--fused/--no-fused",
    default=None,
    help="Count the operations of a bundle's graphs where they run, and how many of them are fused.  "
    "[default: graphs up to 256 MiB]",
)
@options.json_option
@options.verbosity
def command(path: str, fused: bool | None, as_json: bool) -> None:
    """Say what a checkpoint or a bundle is: parts, sizes, inputs, licence, hashes.

    PATH_OR_NAME is a built-in model (emoji), a checkpoint folder, a hub id, or an exported bundle. Opening
    it verifies it: a checkpoint's files are whole, a bundle's have the hashes its manifest says.

    Exit codes: 0 done, 1 failed, 2 usage.
    """
    from edgeflow.inspect import describe

    facts = describe(path, fused=fused)
    if as_json:
        options.print_json(facts)
        return
    terminal.show(_bundle_tables(facts) if facts["what"] == "bundle" else _checkpoint_tables(facts))


def _checkpoint_tables(facts: dict[str, Any]) -> list[Table]:
    shown = {
        "kind": facts["kind"],
        "steps": facts["steps"],
        "guidance": facts["guidance"],
        "picture": _picture(facts),
        "latent": _latent(facts),
        "prompt": f"up to {facts['max_tokens']} tokens" if "max_tokens" in facts else None,
        "licence": facts["licence"],
        "origin": facts["origin"],
        "recipe": _recipe((facts["quantization"] or {}).get("recipe")),
        "quantized from": _source(facts["quantization"]),
        "hash": facts["hash"],
        "path": facts["path"],
    }
    parts = _table("part", "class", "parameters", "dtype", "size", right=("parameters", "size"))
    for part in facts["parts"]:
        parameters = f"{part['parameters']:,}" if part["parameters"] else ""
        dtypes = ", ".join(part["dtypes"])
        parts.add_row(part["name"], part["class"], parameters, dtypes, size(part["bytes"]))
    parts.add_section()
    parts.add_row("all", "", f"{facts['parameters']:,}", "", size(facts["bytes"]))
    return [_facts(f"checkpoint {facts['name']}", shown), parts]


def _bundle_tables(facts: dict[str, Any]) -> list[Table]:
    model = facts["model"]
    shown = {
        "backend": facts["backend"],
        "precision": facts["precision"],
        "layout": facts["layout"],
        **facts["settings"],
        "model": model.get("name"),
        "picture": _picture(model),
        "latent": _latent(model),
        "steps": model.get("steps"),
        "prompt": f"up to {model.get('max_tokens')} tokens",
        "licence": model.get("licence"),
        "origin": model.get("origin"),
        "checkpoint": model.get("checkpoint_hash"),
        "recipe": _recipe(facts["recipe"]) or "none: weights as trained, in the precision above",
        "made with": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "size": f"{size(facts['bytes'])}, of which graphs {size(facts['graph_bytes'])}",
        "path": facts["path"],
    }
    graphs = _table("graph", "file", "", "tensor", "shape", "dtype", "called")
    for graph in facts["graphs"]:
        tensors = [("in", t) for t in graph["inputs"]] + [("out", t) for t in graph["outputs"]]
        for i, (way, t) in enumerate(tensors):
            files = " + ".join(graph["chunks"]) or graph["file"]
            first = (graph["name"], files) if i == 0 else ("", "")
            graphs.add_row(*first, way, t["name"], _shape(t["shape"]), t["dtype"], t["key"])
        graphs.add_section()
    files = _table("file", "size", "sha256", right=("size",))
    for name, entry in facts["files"].items():
        files.add_row(name, size(entry["bytes"]), entry["sha256"])
    tables = [_facts(f"bundle {facts['path']}", shown), graphs]
    if facts["operations"]:
        tables.append(_operations(facts["operations"]))
    return [*tables, files]


def _operations(graphs: dict[str, Any]) -> Table:
    """Operations of each graph as stored and as run, and what runs as one."""
    kinds = list(next(iter(graphs.values()))["kinds"])
    numbers = ("stored", "run", *kinds)
    table = _table("operations", *numbers, "fused where they run", right=numbers)
    for name, found in graphs.items():
        fused = ", ".join(f"{count} {kind}" for kind, count in found["fused"].items())
        counts = [found["stored"], found["run"], *found["kinds"].values()]
        table.add_row(name, *map(str, counts), fused)
    return table


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _facts(title: str, facts: dict[str, Any]) -> Table:
    """Key and value a line; what is not known is left out."""
    table = _table("", "")
    table.show_header, table.title, table.title_style = False, title, "bold"
    for key, value in facts.items():
        if value is not None:
            table.add_row(key, str(value))
    return table


def _recipe(recipe: dict[str, Any] | None) -> str | None:
    """A recipe's name and its rules, in the order in which they are tried."""
    if not recipe:
        return None
    rules = (f"{r['component']} {r['pattern']} {r['scheme']}" for r in recipe["rules"])
    return f"{recipe['name']}: {', '.join(rules)}"


def _source(quantization: dict[str, Any] | None) -> str | None:
    return f"{quantization['source']['name']} {quantization['source']['hash']}" if quantization else None


def _picture(facts: dict[str, Any]) -> str | None:
    side = facts.get("picture_size")
    return f"{side} × {side} pixels" if side else None


def _latent(facts: dict[str, Any]) -> str | None:
    if "latent_shape" not in facts:
        return None
    return f"{_shape(facts['latent_shape'])}, scale {facts['latent_scale']:g}"


def _shape(shape: list[int] | tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def size(count: int) -> str:
    """Bytes in words: B below 1 KiB, then KiB, then MiB."""
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.2f} MiB"
