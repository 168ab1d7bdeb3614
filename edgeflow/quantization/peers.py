"""edgeflow's quantization beside each backend's own tool, at equal bits, in one run.

    python -m edgeflow.quantization.peers emoji --num-prompts 8

The float model is exported once a backend, as one graph; each tool quantizes that graph by itself
(edgeflow.quantization.peer_tools), the result is run by its backend, and its pictures are compared with
PyTorch's float ones of the same prompts and noise. No two tools quantize the same layers, so rows are grouped
by what is stored how, and edgeflow has a row for every group: a shipped recipe where there is one, else a
recipe that stores the very kinds of layers so that the group's tools do. edgeflow's pictures are those of its
quantized checkpoint in PyTorch, whose integers every bundle holds; tools that look at activations have the
prompts and noise that edgeflow's gptq has. Bytes are of the graph: fp32, with OpenVINO fp16, in which NNCF
writes its scales. A tool that is not installed has a row that says so.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

import click
import numpy as np

from edgeflow import metrics
from edgeflow.apple import AppleSettings
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import options
from edgeflow.errors import EdgeflowError
from edgeflow.export import export_model
from edgeflow.generate import load_runtime, run_pipeline
from edgeflow.noise import gaussian_noise
from edgeflow.parity_reference import Sample, reference_from_checkpoint
from edgeflow.quantization import peer_tools as tools
from edgeflow.quantization.peer_tools import RUN, TOOLS, Feed
from edgeflow.quantization.recipe import (
    GPTQ,
    NEAREST,
    Recipe,
    parse_recipe,
    read_recipe,
    rounds_activations,
)
from edgeflow.quantization.schemes import FLOAT

#: What the graphs of a backend are exported and weighed in.
PRECISION = {"onnx": "fp32", "openvino": "fp16", "coreml": "fp32"}
#: Calibration pictures, for edgeflow's gptq and for the tools that look at activations.
PICTURES = 64


@dataclass(frozen=True)
class Row:
    """One tool at one setting; ``psnr_db`` by prompt, empty where ``said`` tells why; bytes by backend."""

    stored: str
    tool: str
    setting: str
    psnr_db: tuple[float, ...] = ()
    graph_bytes: Mapping[str, int] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True)
class Ours:
    """One recipe of edgeflow's: a shipped one by name, or schemes by kind of layer."""

    stored: str
    recipe: str | Mapping[str, str]
    backends: tuple[str, ...]
    roundings: tuple[str, ...] = (NEAREST, GPTQ)


def _kinds(linear: str, embedding: str, convolution: str) -> dict[str, str]:
    return {"linear": linear, "embedding": embedding, "convolution": convolution}


OURS = (
    Ours(tools.EIGHT, "w8", ("openvino", "coreml")),
    Ours(tools.EIGHT_INPUTS, "w8a8", ("onnx",), (NEAREST,)),
    Ours(tools.EIGHT_PRODUCTS, _kinds("w8g32", FLOAT, FLOAT), ("onnx",)),
    Ours(tools.FOUR, _kinds("w4g32", "w4g32", "w4g32"), ("coreml",)),
    Ours(tools.FOUR_AND_EIGHT, _kinds("w4g32", "w4g32", "w8"), ("openvino",)),
    Ours(tools.FOUR_PRODUCTS, _kinds("w4g32", FLOAT, FLOAT), ("onnx",)),
    Ours(tools.SIX_TABLE, "w6", ("coreml",), (NEAREST,)),
    Ours(tools.FOUR_TABLE, "w4", ("coreml",), (NEAREST,)),
)


def recipe_of(checkpoint: Checkpoint, asked: str | Mapping[str, str]) -> Recipe:
    """A shipped recipe, or one rule a layer by its kind; the timestep's layers, which graphs fold,
    stay float.

    A layer that does not divide into groups is stored in 8 bits in its stead.
    """
    from edgeflow.loading import load_part
    from edgeflow.quantization.apply import PLACES, layers_of

    if isinstance(asked, str):
        return read_recipe(asked)
    rules = []
    for component, (part, _) in PLACES.items():
        for name, layer in layers_of(component, load_part(checkpoint, part)).items():
            shape = layer.weight.shape
            kind = "convolution" if len(shape) == 4 else "embedding" if "embeddings." in name else "linear"
            scheme = FLOAT if "time_emb" in name else asked[kind]
            rules.append({"component": component, "pattern": name, "scheme": scheme, "fallback": "w8"})
    name = ", ".join(f"{kind}s {scheme}" for kind, scheme in asked.items() if scheme != FLOAT)
    if len(set(asked.values())) == 1:
        name = f"{asked['linear']} throughout"
    return parse_recipe({"schema": 1, "name": name, "rules": rules, "found_by": "by kind of layer"}, name)


def our_rows(
    checkpoint: Checkpoint, samples: tuple[Sample, ...], work: Path, prompts: str | None
) -> Iterator[Row]:
    from edgeflow.quantization.apply import calibrated_recipe, quantize_checkpoint

    for i, ours in enumerate(OURS):
        plain = recipe_of(checkpoint, ours.recipe)
        weighed: dict[str, int] = {}
        for rounding in ours.roundings:
            out = work / f"ours{i}-{rounding}"
            source = prompts if rounding != NEAREST or rounds_activations(plain.raw) else None
            recipe, drawn = calibrated_recipe(checkpoint, plain, rounding, source, PICTURES)
            quantize_checkpoint(checkpoint, recipe, out, calibration=drawn)
            model = Checkpoint.open(out)
            for backend in ours.backends if not weighed else ():  # integers of other values, no other bytes
                where, precision = work / f"ours{i}-bundles", PRECISION[backend]
                (bundle,) = export_model(model, backends=[backend], precisions=[precision], out=where)
                weighed[backend] = _bytes(bundle)
            setting = plain.name if rounding == NEAREST else f"{plain.name}, {rounding}"
            yield Row(ours.stored, "edgeflow", setting, _drawn(model, samples), dict(weighed))


def _drawn(model: Checkpoint, samples: tuple[Sample, ...]) -> tuple[float, ...]:
    """PSNR of each prompt's picture against PyTorch's float one, in dB."""
    loaded = load_runtime(model, None)
    values = []
    for sample in samples:
        ids, noise = sample.arrays["input_ids"], sample.arrays["noise"]
        picture = run_pipeline(loaded, model.generation, ids, noise, fused=True)
        values.append(metrics.psnr_db(sample.picture, picture, peak=1.0))
    return tuple(values)


def _bytes(path: Path) -> int:
    """The bytes of a bundle's graph, or of a graph's file or folder."""
    if (path / "manifest.json").is_file():
        return Bundle.open(path).graph_bytes()
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def calibration_feeds(checkpoint: Checkpoint, prompts: str | None, like: Feed) -> list[Feed]:
    """The prompts and noise of edgeflow's own calibration, in the dtypes of ``like``."""
    from edgeflow.quantization.calibration import SEED
    from edgeflow.quantization.prompts import calibration_prompts
    from edgeflow.tokenizer import ClipTokenizer

    texts, _ = calibration_prompts(checkpoint, prompts)
    spec = checkpoint.generation
    tokenizer = ClipTokenizer.from_folder(spec.tokenizer_dir)
    return [
        {
            "input_ids": np.asarray(tokenizer.encode(texts[i % len(texts)])).astype(like["input_ids"].dtype),
            "noise": gaussian_noise(SEED + i, (1, *spec.latent_shape)).astype(like["noise"].dtype),
        }
        for i in range(PICTURES)
    ]


def peer_rows(
    checkpoint: Checkpoint, samples: tuple[Sample, ...], work: Path, prompts: str | None
) -> Iterator[Row]:
    @cache
    def graph(backend: str) -> Path:
        apple = AppleSettings(target="iOS18") if backend == "coreml" else AppleSettings()  # int4 needs it
        (bundle,) = export_model(checkpoint, backends=[backend], out=work / "float", apple=apple)
        return bundle / Bundle.open(bundle).manifest.graphs[0].file

    @cache
    def feeds() -> list[Feed]:
        return calibration_feeds(checkpoint, prompts, samples[0].arrays)

    for i, tool in enumerate(TOOLS):
        run, end = RUN[tool.backend]
        out = work / f"peer{i}{end}"
        try:
            importlib.import_module(tool.package)
            with _quiet():
                tool.quantize(graph(tool.backend), out, feeds)
                pictures = [run(out, sample.arrays) for sample in samples]
        except Exception as error:  # a peer's failure is its row, whatever it raises
            reason = str(error).strip().splitlines() or [""]
            yield Row(tool.stored, tool.tool, tool.setting, said=f"{type(error).__name__}: {reason[0]:.120}")
            continue
        pairs = zip(samples, pictures, strict=True)
        values = tuple(metrics.psnr_db(s.picture, np.clip(p, 0, 1), peak=1.0) for s, p in pairs)
        yield Row(tool.stored, tool.tool, tool.setting, values, {tool.backend: _bytes(out)})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tools print tables and bars on both streams."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # for good: this program shows none of its tools' warnings
            yield
    finally:
        logging.disable(before)


def table(rows: list[Row]) -> str:
    """Groups in their order, in each the best median first, as Markdown."""
    lines = ["| stored | tool | setting | worst | median | graph |", "|---|---|---|---:|---:|---|"]
    order = {stored: i for i, stored in enumerate(tools.STORED)}
    for row in sorted(rows, key=lambda r: (order[r.stored], -median(r.psnr_db) if r.psnr_db else 0.0)):
        lines.append(f"| {row.stored} | {row.tool} | {row.setting} | {_figures(row, ' | ')} |")
    return "\n".join(lines)


def _figures(row: Row, between: str) -> str:
    """Worst and median picture, and the graph's size by backend; or why there are none."""
    if not row.psnr_db:
        return row.said or "–"
    sizes = " / ".join(f"{size / 2**20:.2f} MiB {backend}" for backend, size in row.graph_bytes.items())
    return between.join((f"{min(row.psnr_db):.1f} dB", f"{median(row.psnr_db):.1f} dB", sizes))


@click.command(context_settings=options.CONTEXT)
@click.argument("model")
@click.option("--num-prompts", type=click.IntRange(min=1), default=8, show_default=True, metavar="N")
@click.option("--calibration", metavar="NAME|FILE", help="Prompts, as in edgeflow quantize.")
@options.json_option
def main(model: str, num_prompts: int, calibration: str | None, as_json: bool) -> None:
    """Quantize MODEL by edgeflow and by each backend's own tool, and print how far the pictures move."""
    try:
        checkpoint = Checkpoint.open(model)
        samples = reference_from_checkpoint(checkpoint, checkpoint.generation.prompts, num_prompts).samples
        rows = []
        with tempfile.TemporaryDirectory() as work:
            peers = peer_rows(checkpoint, samples, Path(work), calibration)
            ours = our_rows(checkpoint, samples, Path(work), calibration)
            for row in itertools.chain(peers, ours):
                print(f"{row.stored}: {row.tool}, {row.setting}: {_figures(row, ', ')}", file=sys.stderr)
                rows.append(row)
    except EdgeflowError as error:
        raise SystemExit(f"Error: {error}") from error
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
