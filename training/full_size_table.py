"""What a full-size model costs on this machine: backend × precision × graph, a row at a time.

    python -m edgeflow.training.full_size_table instaflow-random -o rows

Each *piece* is one command in processes of its own, watched by edgeflow.measure_tree: an export of all
backends with its parity, then one picture of each bundle, and for bundles of components one with
``--low-memory``. A piece that has ended well has a JSON file in ``-o`` and is not measured again; ``--only``
picks pieces by name, so that the table can be had in parts. Bundles are deleted when all their pieces are
done. The table of all that has been measured is printed at the end. Linux only, as measure_tree is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from edgeflow.bundle import MANIFEST, Manifest
from edgeflow.measure_tree import watch
from edgeflow.training.full_size_rows import render

BACKENDS = ("onnx", "openvino", "coreml")
#: Recipe, precision and graph of the bundles that one export command writes, in the order of their use.
GROUPS = (
    *(("", "fp16", "pipeline"), ("", "fp16", "components"), ("w8", "fp16", "pipeline")),
    *(("w4g32", "fp16", "pipeline"), ("", "fp32", "pipeline"), ("w8", "fp16", "components")),
    *(("w4g32", "fp16", "components"), ("", "fp32", "components")),
)
PROMPT = "a red bicycle beside a brick wall"
GIB = 1 << 30
#: What a line of ``edgeflow export -v`` that begins a step begins with.
STEP = "debug: step:"


@dataclass(frozen=True)
class Group:
    """The bundles of one export command."""

    recipe: str
    precision: str
    graph: str

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.recipe, self.precision, self.graph)))

    def bundle(self, backend: str) -> str:
        """The folder's name that the export gives."""
        return f"{backend}-{self.graph}-{self.precision}"


class Table:
    """A folder of measured pieces, and how each is measured."""

    def __init__(self, model: str, out: Path, backends: Sequence[str]):
        self.model, self.out, self.backends = model, out, backends
        self.commands = [sys.executable, "-P", "-m", "edgeflow.cli"]

    def pieces(self) -> Iterator[tuple[str, Group, Callable[[], dict[str, Any]]]]:
        """Name, group and measurement of every piece, in order."""
        for group in (Group(*g) for g in GROUPS):
            yield f"{group.name}.export", group, partial(self.export, group)
            for backend in self.backends:
                yield f"{group.name}.{backend}", group, partial(self.picture, group, backend, False)
                if group.graph == "components" and backend != "coreml":
                    name = f"{group.name}.{backend}-low-memory"
                    yield name, group, partial(self.picture, group, backend, True)

    def file(self, piece: str) -> Path:
        return self.out / f"{piece}.json"

    def bundles(self, group: Group) -> Path:
        return self.out / "bundles" / group.name

    def run(self, patterns: Sequence[str], keep: bool) -> int:
        """Measure what is absent and asked for; 1 if a piece failed, which is then left absent."""
        self.out.mkdir(parents=True, exist_ok=True)
        failed = False
        for name, group, measure in self.pieces():
            if self.file(name).exists() or not any(fnmatch(name, pattern) for pattern in patterns):
                continue
            if not name.endswith(".export") and not self.bundles(group).exists():
                print(f"{name}: left out: {group.name}.export comes first", file=sys.stderr)
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            row = measure()
            done = row["exit_code"] in (0, 3)  # 3: a gate failed, which the row says
            failed |= not done
            file = self.file(name) if done else self.out / f"{name}.failed"
            file.write_text(json.dumps(row, indent=1) + "\n")
            print(
                f"{name}: {row['wall_s']} s, {row['peak_rss_mib']} MiB, exit {row['exit_code']}",
                file=sys.stderr,
            )
            if not keep:
                self._clear(group)
        return int(failed)

    def _clear(self, group: Group) -> None:
        if all(self.file(name).exists() for name, own, _ in self.pieces() if own == group):
            shutil.rmtree(self.bundles(group), ignore_errors=True)

    def export(self, group: Group) -> dict[str, Any]:
        """All backends in one command, parity included."""
        model = self._quantized(group.recipe) if group.recipe else self.model
        asked = [f for b in self.backends for f in ("--to", b)]
        asked += ["--precision", group.precision, "--graph", group.graph, "--force", "--json", "-v"]
        row, said = self._watched(["export", model, *asked, "-o", str(self.bundles(group))], STEP)
        return row | {"said": said}

    def picture(self, group: Group, backend: str, low_memory: bool) -> dict[str, Any]:
        """One picture from a prompt, loading included, and how large the largest graph's files are."""
        bundle = self.bundles(group) / group.bundle(backend)
        asked = ["generate", str(bundle), PROMPT, "--json", "--force", "-o", str(self.out / "picture.png")]
        row, said = self._watched([*asked, *(["--low-memory"] if low_memory else [])])
        return row | {"said": said, "largest_graph_bytes": largest_graph(bundle)}

    def _quantized(self, recipe: str) -> str:
        """The model in a recipe's integers, made once, beside the rows."""
        folder = self.out / f"model-{recipe}"
        if not folder.exists():
            row, said = self._watched(
                ["quantize", self.model, "--recipe", recipe, "--json", "-o", str(folder)]
            )
            self.file(f"{recipe}.quantize").write_text(json.dumps(row | {"said": said}, indent=1) + "\n")
        return str(folder)

    def _watched(self, asked: list[str], step: str = "") -> tuple[dict[str, Any], Any]:
        """The command's report, and the JSON that it printed, if any."""
        output = self.out / "output.part"
        with output.open("w") as file:
            row = watch([*self.commands, *asked], stdout=file, step=step)
        text = output.read_text()
        output.unlink()
        command = ["edgeflow", *(a.replace(f"{self.out}/", "") for a in asked)]
        return {"command": " ".join(command), **row}, json.loads(text) if text.strip() else None


def largest_graph(bundle: Path) -> int:
    """Bytes of the largest graph of a bundle with its weights; from the manifest, without verifying."""
    manifest = Manifest.from_json((bundle / MANIFEST).read_bytes(), bundle)
    places = [graph.file.partition("/")[0] for graph in manifest.graphs]
    return max(sum(e.bytes for n, e in manifest.files.items() if n.startswith(f"{p}/")) for p in places)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeflow.training.full_size_table", description=__doc__)
    parser.add_argument(
        "model", help="a checkpoint: edgeflow.training.random_checkpoint --width full writes one"
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="folder of the rows; goes on in an old one"
    )
    parser.add_argument("--to", action="append", choices=BACKENDS, help="a backend (default: all)")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="names of pieces, as 'fp16-*.onnx'"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of all pieces, and measure nothing"
    )
    parser.add_argument("--keep", action="store_true", help="leave the bundles where they are")
    asked = parser.parse_args(argv)
    table = Table(asked.model, asked.out, asked.to or BACKENDS)
    if asked.list:
        for name, _, _ in table.pieces():
            print(name, "(measured)" if table.file(name).exists() else "")
        return 0
    code = table.run(asked.only or ["*"], asked.keep)
    rows = {p.stem: json.loads(p.read_text()) for p in sorted(asked.out.glob("*.json"))}
    print(render(rows, [Group(*g) for g in GROUPS], BACKENDS))
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
