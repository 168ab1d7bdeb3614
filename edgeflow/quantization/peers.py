"""edgeflow's quantization beside each backend's own tool, at equal bits, in one run.

    python -m edgeflow.quantization.peers emoji --num-prompts 8

The float model is exported once a backend (fp32, one graph); each tool quantizes that graph by itself, the
result is run by its backend, and its pictures are compared with PyTorch's float ones of the same prompts and
noise. edgeflow's rows are its quantized checkpoint in PyTorch, whose integers every bundle holds, and the
bytes of its fp32 bundle's graph. A tool that is not installed has a row that says so.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from edgeflow import metrics
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import options
from edgeflow.errors import EdgeflowError
from edgeflow.export import export_model
from edgeflow.generate import load_runtime, run_pipeline
from edgeflow.parity_reference import Sample, reference_from_checkpoint
from edgeflow.quantization.recipe import read_recipe

GROUP = 32


@dataclass(frozen=True)
class Row:
    """One tool at one setting; ``psnr_db`` by prompt, empty where ``said`` tells why."""

    bits: str
    tool: str
    setting: str
    graph_bytes: int | None
    psnr_db: tuple[float, ...]
    said: str = ""


#: bits, recipe, rounding, backend whose graph is weighed.
OURS = (
    ("8", "w8", "nearest", "onnx"),
    ("8", "w8", "gptq", "onnx"),
    ("4", "w4g32", "nearest", "onnx"),
    ("4", "w4g32", "gptq", "onnx"),
    ("6, table", "w6", "nearest", "coreml"),
    ("4, table", "w4", "nearest", "coreml"),
)


def our_rows(
    checkpoint: Checkpoint, samples: tuple[Sample, ...], work: Path, prompts: str | None
) -> Iterator[Row]:
    from edgeflow.quantization.apply import calibrated_recipe, quantize_checkpoint
    from edgeflow.quantization.calibration import PICTURES

    for bits, name, rounding, backend in OURS:
        out = work / f"{name}-{rounding}"
        source = None if rounding == "nearest" else prompts
        recipe, drawn = calibrated_recipe(checkpoint, read_recipe(name), rounding, source, PICTURES)
        quantize_checkpoint(checkpoint, recipe, out, calibration=drawn)
        model = Checkpoint.open(out)
        (bundle,) = export_model(model, backends=[backend], out=work / f"{name}-{rounding}-bundles")
        setting = name if rounding == "nearest" else f"{name}, {rounding}"
        yield Row(bits, "edgeflow", setting, _bytes(bundle), _drawn(model, None, samples))


def _drawn(model: Checkpoint | Bundle, runtime: str | None, samples: tuple[Sample, ...]) -> tuple[float, ...]:
    """PSNR of each prompt's picture against PyTorch's float one, in dB."""
    loaded = load_runtime(model, runtime)
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


# --- onnxruntime ----------------------------------------------------------------------------------------


def ort_dynamic(source: Path, out: Path) -> None:
    """Weights and, as they come, activations in 8 bits: MatMulInteger and ConvInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, out, per_channel=True, weight_type=QuantType.QInt8)


def ort_nbits(bits: int) -> Callable[[Path, Path], None]:
    """MatMulNBits: products alone, in blocks of 32; convolutions stay float."""

    def quantize(source: Path, out: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        tool = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=GROUP, is_symmetric=True)
        tool.process()
        tool.model.save_model_to_file(str(out), use_external_data_format=False)

    return quantize


def run_onnx(path: Path, sample: Sample) -> np.ndarray:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    feeds = {
        i.name: sample.arrays["input_ids" if "ids" in i.name else "noise"].astype(kinds[i.type])
        for i in session.get_inputs()
    }
    return session.run(None, feeds)[0]


# --- OpenVINO and Core ML -------------------------------------------------------------------------------


def nncf_weights(mode: str) -> Callable[[Path, Path], None]:
    def quantize(source: Path, out: Path) -> None:
        import nncf
        import openvino

        more = {"group_size": GROUP, "ratio": 1.0, "all_layers": True} if "INT4" in mode else {}
        how = getattr(nncf.CompressWeightsMode, mode)
        model = nncf.compress_weights(openvino.Core().read_model(source), mode=how, **more)
        out.mkdir()
        openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)

    return quantize


def run_openvino(path: Path, sample: Sample) -> np.ndarray:
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", config)
    return np.array(model({name: sample.arrays[name] for name in ("input_ids", "noise")})[0])


def coreml_weights(kind: str, bits: int) -> Callable[[Path, Path], None]:
    def quantize(source: Path, out: Path) -> None:
        import coremltools as ct
        import coremltools.optimize.coreml as cto

        if kind == "palette":
            how: Any = cto.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0)
            tool: Any = cto.palettize_weights
        else:
            block = {"granularity": "per_block", "block_size": GROUP} if bits == 4 else {}
            how = cto.OpLinearQuantizerConfig(
                mode="linear_symmetric", dtype=f"int{bits}", weight_threshold=0, **block
            )
            tool = cto.linear_quantize_weights
        model = ct.models.MLModel(str(source), skip_model_load=True)
        tool(model, cto.OptimizationConfig(global_config=how)).save(str(out))

    return quantize


def run_coreml(path: Path, sample: Sample) -> np.ndarray:
    from edgeflow.runtimes.mil_interpreter import MilInterpreter

    program = MilInterpreter.open(path)
    feeds = {name: sample.arrays["input_ids" if "ids" in name else "noise"] for name in program.inputs}
    return next(iter(program.run(feeds).values()))


_PACKAGE = ".mlpackage"
_linear, _kmeans = partial(coreml_weights, "linear"), partial(coreml_weights, "palette")
#: bits, tool, setting, backend, the package it takes, what quantizes, what runs, end of the file's name.
PEERS: tuple[tuple[Any, ...], ...] = (
    ("8", "onnxruntime", "quantize_dynamic", "onnx", "onnxruntime", ort_dynamic, run_onnx, ".onnx"),
    ("8", "onnxruntime", "MatMulNBits", "onnx", "onnxruntime", ort_nbits(8), run_onnx, ".onnx"),
    ("4", "onnxruntime", "MatMulNBits", "onnx", "onnxruntime", ort_nbits(4), run_onnx, ".onnx"),
    ("8", "nncf", "INT8_SYM", "openvino", "nncf", nncf_weights("INT8_SYM"), run_openvino, ""),
    ("4", "nncf", "INT4_SYM g32", "openvino", "nncf", nncf_weights("INT4_SYM"), run_openvino, ""),
    ("8", "coremltools", "linear", "coreml", "coremltools", _linear(8), run_coreml, _PACKAGE),
    ("4", "coremltools", "linear g32", "coreml", "coremltools", _linear(4), run_coreml, _PACKAGE),
    ("6, table", "coremltools", "kmeans", "coreml", "sklearn", _kmeans(6), run_coreml, _PACKAGE),
    ("4, table", "coremltools", "kmeans", "coreml", "sklearn", _kmeans(4), run_coreml, _PACKAGE),
)  # fmt: skip


def peer_rows(checkpoint: Checkpoint, samples: tuple[Sample, ...], work: Path) -> Iterator[Row]:
    graphs: dict[str, Path] = {}
    for i, (bits, tool, setting, backend, package, quantize, run, end) in enumerate(PEERS):
        try:
            importlib.import_module(package)
            if backend not in graphs:
                (bundle,) = export_model(checkpoint, backends=[backend], out=work / "float")
                graphs[backend] = bundle / Bundle.open(bundle).manifest.graphs[0].file
            out = work / f"peer{i}{end}"
            with _quiet():
                quantize(graphs[backend], out)
                pictures = [run(out, sample) for sample in samples]
        except Exception as error:  # a peer's failure is its row, whatever it raises
            reason = str(error).strip().splitlines() or [type(error).__name__]
            yield Row(bits, tool, setting, None, (), f"{type(error).__name__}: {reason[0]:.120}")
            continue
        pairs = zip(samples, pictures, strict=True)
        values = tuple(metrics.psnr_db(s.picture, np.clip(p, 0, 1), peak=1.0) for s, p in pairs)
        yield Row(bits, tool, setting, _bytes(out), values)


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
    """Rows of equal bits together, best median first, as Markdown."""
    lines = ["| bits | tool | setting | worst | median | graph |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r.bits, -median(r.psnr_db) if r.psnr_db else 0.0)):
        lines.append(f"| {row.bits} | {row.tool} | {row.setting} | {_figures(row, ' | ')} |")
    return "\n".join(lines)


def _figures(row: Row, between: str) -> str:
    """Worst and median picture, and the graph's size; or why there are none."""
    if not row.psnr_db or row.graph_bytes is None:
        return row.said or "–"
    size = f"{row.graph_bytes / 2**20:.2f} MiB"
    return between.join((f"{min(row.psnr_db):.1f} dB", f"{median(row.psnr_db):.1f} dB", size))


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
            peers = peer_rows(checkpoint, samples, Path(work))
            ours = our_rows(checkpoint, samples, Path(work), calibration)
            for row in itertools.chain(peers, ours):
                print(f"{row.bits} bits, {row.tool}, {row.setting}: {_figures(row, ', ')}", file=sys.stderr)
                rows.append(row)
    except EdgeflowError as error:
        raise SystemExit(f"Error: {error}") from error
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
