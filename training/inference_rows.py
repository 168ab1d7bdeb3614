"""The rows of edgeflow.training.inference_benchmark: how each is built, timed and compared."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow import aot_package, gpu_device, gpu_precision, gpu_rewrites, metrics
from edgeflow.bundle import TOKENIZER, Manifest, write_bundle_files
from edgeflow.components import BytePipeline, ComponentSpec
from edgeflow.gpu_precision import DTYPES, Tail
from edgeflow.runtimes.cuda_graph import Captured
from edgeflow.runtimes.cuda_quantized import float8_linears, integer_linears, to_integers
from edgeflow.spec import FIRST_TIMESTEP, TensorSpec
from edgeflow.tokenizer import END
from edgeflow.training.inference_model import Model
from edgeflow.training.random_checkpoint import SHAPES
from edgeflow.training.random_vocabulary import write_tokenizer

ALL = tuple(gpu_rewrites.REWRITES)
_SIZES = {"cuda": 8192, "cpu": 128}
_TOP = 16


@dataclass(frozen=True)
class Variant:
    """One way to draw: what is run, on how many pictures at once, in what arithmetic."""

    graph: str = "pipeline"  # pipeline, unet or decoder
    precision: str = "fp16"
    batch: int = 1
    tiny: bool = False  # the tiny decoder in place of the full one
    without: tuple[str, ...] = ()  # rewrites left out
    integers: str | None = None  # w8, w8a8 or fp8 for the UNet's linear layers
    profile: bool = False


# --- building -------------------------------------------------------------------------------------------


def compiled(model: Model, variant: Variant) -> dict[str, Any]:
    """edgeflow's path: rewritten, cast, compiled as one graph, captured."""
    began, base = time.monotonic(), _allocated(model)
    module, facts = build(model, variant)
    inputs = [t.to(model.device) for t in model.inputs(variant.graph, variant.batch, variant.tiny)]
    order = _attention(model, module, inputs, variant.precision, facts)
    function: Callable[..., Tensor] = (
        torch.compile(module, fullgraph=True, dynamic=False) if model.compile else module
    )
    with gpu_device.attention_order(order), torch.no_grad():
        if model.device == "cuda":
            function = Captured(function, inputs)
        output = function(*inputs).cpu()
    facts["first_call_s"] = round(time.monotonic() - began, 1)
    row = facts | timed(model, function, variant) | compared(model, output, variant)
    if variant.profile:
        row["kernels"] = top_kernels(model, lambda: function(*inputs))
    if model.device == "cuda":
        row["own_peak_gib"] = round((torch.cuda.max_memory_allocated() - base) / 2**30, 2)
    return row


def build(model: Model, variant: Variant) -> tuple[nn.Module, dict[str, Any]]:
    """The module on the device, not compiled, and what was made of it."""
    source = model.module(variant.graph, variant.tiny)
    if variant.integers in ("w8", "w8a8"):
        source = to_integers(source, activations=variant.integers == "w8a8")
    names = [name for name in ALL if name not in variant.without]
    module, counts = gpu_rewrites.rewritten(source, names)
    if variant.graph == "pipeline":
        module = BytePipeline(module).eval()
    tail = find_tail(model, variant)
    module = gpu_precision.assembled(module, DTYPES[variant.precision], model.device, tail)
    integer_linears(module, DTYPES[variant.precision])
    if variant.integers == "fp8":
        counts["float8 linear"] = float8_linears(module)
    facts = {
        "graph": variant.graph,
        "precision": variant.precision,
        "batch": variant.batch,
        "rewrites": counts,
        "tail": None if tail is None else tail.start,
        "weights_mib": round(_weight_bytes(module) / 2**20, 1),
    }
    return module, facts


def find_tail(model: Model, variant: Variant) -> Tail | None:
    """Where float16 would overflow in the decoder, from its float32 form on the benchmark's own latent."""
    if variant.precision != "fp16" or variant.graph == "unet":
        return None
    module = model.module(variant.graph, variant.tiny).to(model.device)
    inputs = [t.to(model.device) for t in model.inputs(variant.graph, 1, variant.tiny)]
    return gpu_precision.find_tail(gpu_precision.decoder_of(module), lambda: module(*inputs))


def _attention(
    model: Model, module: nn.Module, inputs: Sequence[Tensor], precision: str, facts: dict[str, Any]
) -> str | None:
    if model.device != "cuda":
        return None
    shapes = gpu_device.attention_shapes(module, inputs)
    if not shapes:
        return None
    name, total = gpu_device.choose_attention(shapes, DTYPES[precision])
    facts["attention"], facts["attention_ms"] = name, {k: round(v, 4) for k, v in total.items()}
    return name


def _weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights, those of torchao's tensors by what they hold."""
    total = 0
    for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
        held = [getattr(tensor, name, None) for name in ("qdata", "scale")]
        parts = [t for t in held if isinstance(t, Tensor)] or [tensor]
        total += sum(t.numel() * t.element_size() for t in parts)
    return total


def eager(model: Model, precision: str) -> dict[str, Any]:
    """The untouched modules as diffusers' pipeline calls them; PyTorch's settings as they come."""
    dtype, base = DTYPES[precision], _allocated(model)
    parts = (model.text, model.unet, model.vae(False))
    if precision != "fp32":
        parts = tuple(copy.deepcopy(part).to(dtype) for part in parts)
    text, unet, vae = parts

    def draw(ids: Tensor, noise: Tensor) -> Tensor:
        start = noise.to(dtype)
        hidden = text(ids).last_hidden_state
        timestep = torch.tensor([FIRST_TIMESTEP], device=ids.device, dtype=dtype)
        latent = start + unet(start, timestep, encoder_hidden_states=hidden).sample
        image = vae.decode(latent / model.scale(False)).sample
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    variant = Variant(precision=precision)
    with torch.no_grad():
        output = draw(*(t.to(model.device) for t in model.inputs("pipeline", 1, False))).cpu()
        row = {"precision": precision, **timed(model, draw, variant), **compared(model, output, variant)}
    if model.device == "cuda":
        row["own_peak_gib"] = round((torch.cuda.max_memory_allocated() - base) / 2**30, 2)
    return row


# --- measuring ------------------------------------------------------------------------------------------


def timed(model: Model, function: Callable[..., Tensor], variant: Variant) -> dict[str, Any]:
    """``ms``: inputs on the host to the result on the host; ``gpu_ms``: the GPU alone, inputs in place."""
    host = model.inputs(variant.graph, variant.batch, variant.tiny)
    placed = [t.to(model.device) for t in host]
    on_host = function.on_host if isinstance(function, Captured) else _plainly_on_host(model, function)
    with torch.no_grad():
        for _ in range(3):
            function(*placed)
        _wait(model)
        walls = []
        for _ in range(model.runs):
            start = time.perf_counter()
            on_host(*host)
            walls.append(1000 * (time.perf_counter() - start))
        alone = _events(model, lambda: function(*placed)) if model.device == "cuda" else walls
    name = {"pipeline": "pipeline", "unet": "unet", "decoder": "decoder"}[variant.graph]
    name = {"pipeline": "pipeline, tiny decoder", "decoder": "tiny decoder"}[name] if variant.tiny else name
    gpu_ms = statistics.median(alone)
    return {
        "ms": round(statistics.median(walls), 3),
        "p90_ms": round(sorted(walls)[int(0.9 * (len(walls) - 1))], 3),
        "gpu_ms": round(gpu_ms, 3),
        "gpu_range_ms": [round(min(alone), 3), round(max(alone), 3)],
        "pictures_per_s": round(1000 * variant.batch / gpu_ms, 2),
        "gflop": round(variant.batch * model.gflop[name]["plain"], 1),
    }


def _plainly_on_host(model: Model, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *host: function(*(t.to(model.device) for t in host)).cpu()


def _events(model: Model, call: Callable[[], object]) -> list[float]:
    """Milliseconds of each call on the GPU's own clock."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(model.runs)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _wait(model: Model) -> None:
    if model.device == "cuda":
        torch.cuda.synchronize()


def _allocated(model: Model) -> int:
    """Bytes held now, from which on the peak is counted: the float32 originals are not the row's."""
    if model.device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def compared(model: Model, output: Tensor, variant: Variant) -> dict[str, Any]:
    """Against the float32 modules on the same inputs. Raises ValueError where a value is not finite."""
    count = min(variant.batch, 2)
    reference = model.reference(variant.graph, variant.batch, variant.tiny, count).numpy()
    got = output[:count]
    if got.dtype == torch.uint8:
        return {"psnr_db": round(metrics.psnr_db(reference, got.float().numpy() / 255, peak=1.0), 1)}
    if not bool(torch.isfinite(got).all()):
        raise ValueError("expected finite values, got others")
    return {"sqnr_db": round(metrics.sqnr_db(reference, got.float().numpy()), 1)}


def top_kernels(model: Model, call: Callable[[], object], calls: int = 5) -> list[dict[str, Any]]:
    """The kernels that take longest: milliseconds and launches a call, and their part of all."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = model.device == "cuda"
    with (
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen,
    ):
        for _ in range(calls):
            call()
        _wait(model)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = sorted(seen.key_averages(), key=lambda e: -getattr(e, key))
    whole = sum(getattr(e, key) for e in found) or 1.0
    return [
        {
            "kernel": e.key[:120],
            "ms": round(getattr(e, key) / 1000 / calls, 4),
            "launches": e.count // calls,
            "part": round(getattr(e, key) / whole, 3),
        }
        for e in found[:_TOP]
    ]


def matrix_rate(device: str) -> dict[str, dict[str, Any]]:
    """TFLOP/s of the median of twenty products of n × n, random data, by precision."""
    size, found = _SIZES[device], {}
    for name in ("fp16", "bf16"):
        a, b = torch.randn(2, size, size, device=device).to(DTYPES[name])
        for _ in range(3):
            a @ b
        seconds = []
        for _ in range(20):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rate = 2 * size**3 / statistics.median(seconds) / 1e12
        found[name] = {"tflop_per_s": round(rate, 6), "size": size}
    return found


# --- the package ----------------------------------------------------------------------------------------


def package(model: Model) -> dict[str, Any]:
    """Compile ahead of time into a bundle, then draw with it from a process of its own, as a user would."""
    from edgeflow.exporters.program import Program
    from edgeflow.exporters.to_cuda import CudaExporter

    exporter = CudaExporter(model.device)
    module = BytePipeline(model.module("pipeline", False)).eval()
    inputs = tuple(model.inputs("pipeline", 1, False))
    side = 8 * model.configs["unet"]["sample_size"]
    spec = ComponentSpec(
        "pipeline",
        (TensorSpec("input_ids", (1, 77), "int32", "input_ids"), _tensor("noise", inputs[1])),
        (TensorSpec("image", (1, 3, side, side), "uint8", "image"),),
    )
    precision = "fp16" if model.device == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        program: Any = Program(spec, None, module, inputs)  # type: ignore[arg-type]  # not exported: lower does it
        graph = exporter.lower(program, Path(folder), precision=precision, layout="pipeline")
        seconds = time.monotonic() - began
        _write_bundle(Path(folder), graph, exporter, model, precision)
        row = {
            "precision": precision,
            "export_s": round(seconds, 1),
            **_sizes(Path(folder, graph.file).parent),
        }
        model.free()
        return row | _first_pictures(Path(folder), model)


def _tensor(name: str, like: Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(like.shape), "float32", name)


def _sizes(folder: Path) -> dict[str, float]:
    code, weights = (folder / name for name in (aot_package.CODE, aot_package.WEIGHTS))
    return {
        "code_mib": round(code.stat().st_size / 2**20, 1),
        "weights_mib": round(weights.stat().st_size / 2**20, 1),
    }


def _write_bundle(folder: Path, graph: Any, exporter: Any, model: Model, precision: str) -> None:
    write_tokenizer(folder / TOKENIZER, SHAPES["sd15", model.width].vocabulary, pad=END)
    side = model.configs["unet"]["sample_size"]
    facts = {
        "name": "random",
        "checkpoint_hash": "0" * 64,
        "licence": "unknown",
        "origin": "random weights",
        "max_tokens": 77,
        "latent_shape": [4, side, side],
        "latent_scale": model.scale(False),
        "picture_size": 8 * side,
        "steps": 1,
        "timestep": FIRST_TIMESTEP,
        "prompts": ["a red bicycle"],
    }
    manifest = Manifest("cuda", precision, "pipeline", facts, None, (graph,), {}, exporter.facts())
    write_bundle_files(folder, manifest)


def _first_pictures(folder: Path, model: Model, launches: int = 3) -> dict[str, Any]:
    """Seconds from a process's start to its first picture on disk, of each launch and their median; and what
    the last one said of its parts."""
    if model.device != "cuda":
        from edgeflow.bundle import Bundle
        from edgeflow.runtimes.cuda_reference import CudaReference

        bundle = Bundle.open(folder)
        runtime = CudaReference.packaged(bundle, {}, "cpu")
        ids, noise = (t.numpy() for t in model.inputs("pipeline", 1, False))
        image = runtime.run("pipeline", {"input_ids": ids, "noise": noise})["image"]
        return compared(model, torch.from_numpy(image), Variant())
    command = [sys.executable, "-m", "edgeflow.cli", "generate", str(folder), "a red bicycle"]
    seconds, latency = [], []
    for i in range(launches):
        out = folder.parent / f"{folder.name}-{i}.png"
        start = time.monotonic()
        done = subprocess.run(
            [*command, "-v", "--json", "-o", str(out)],
            capture_output=True,
            text=True,
            env=dict(os.environ),
        )
        seconds.append(round(time.monotonic() - start, 2))
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-500:])
        latency.append(json.loads(done.stdout)["pictures"][0]["latency_ms"])
        out.unlink()
    median = statistics.median(seconds)
    said = [line for line in done.stderr.splitlines() if line.startswith("debug: ")]
    return {"first_picture_s": median, "launches_s": seconds, "latency_ms": latency, "said": said}
