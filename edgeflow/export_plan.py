"""What an export will do and what it will take, from the checkpoint's headers alone. Torch-free.

Bytes on disk are the weights' own; the fused graph's are a little fewer, as it folds the time embedding.
Memory and time are estimates, linear in the weights and in the arithmetic of Stable Diffusion 1.5's shapes.
Memory follows what was seen at full size (docs/full-size.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflow.errors import EdgeflowError
from edgeflow.export_tasks import fp32_bytes, is_large
from edgeflow.parity_isolated import LARGE_GRAPHS
from edgeflow.resources import free_disk_bytes, memory_bytes
from edgeflow.spec import COMPONENTS, PIPELINE

if TYPE_CHECKING:
    from edgeflow.checkpoint import Checkpoint

GIB = 1 << 30
#: The command's own process and a child's imports.
_PARENT, _CHILD = 0.45 * GIB, 0.6 * GIB
#: Peak of a lowering over the graph's fp32 weights, by backend; for one that is not listed the largest.
_LOWERING_MEMORY = {"onnx": 1.55, "openvino": 1.3, "coreml": 2.0}
#: Seconds of a lowering for a GiB of fp32 weights.
_LOWERING_SECONDS = {"onnx": 17.0, "openvino": 10.0, "coreml": 34.0}
#: Peak of a runtime over the fp32 weights that it holds, the decoder's activations apart: weights in fp32 and
#: laid out anew for its kernels. The most that was seen, ONNX Runtime with the fp16 UNet.
_RUNTIME_MEMORY = 1.95
#: One run through eager PyTorch, and through a backend's runtime: GFLOP a second.
_EAGER_RATE, _RUNTIME_RATE = 36.0, 80.0
#: GFLOP, parameters and side of the picture (or latent) of Stable Diffusion 1.5's components at 512 pixels.
_WORK = {"text_encoder": (13.0, 123e6, None), "unet": (803.0, 859.5e6, 64), "vae": (2515.0, 49.5e6, 512)}
#: Bytes of activations of the autoencoder's decoder for one pixel of its picture.
_PIXEL_BYTES = 11 * 512
_PARTS = {"text_encoder": ("text_encoder",), "unet": ("unet",), "decoder": ("vae",)}


@dataclass(frozen=True)
class Step:
    """One operation of the plan."""

    what: str
    memory: float  # bytes at its peak, with the command's own process
    seconds: float
    disk: int = 0  # bytes that it leaves


@dataclass(frozen=True)
class ExportPlan:
    """Steps in their order, and what the machine has."""

    model: str
    parts: dict[str, int]  # part → parameters
    isolated: bool
    steps: tuple[Step, ...]
    disk_free: int
    memory_available: int | None

    @property
    def disk(self) -> int:
        return sum(step.disk for step in self.steps)

    @property
    def memory(self) -> float:
        return max(step.memory for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def obstacle(self) -> str | None:
        """Why it cannot fit, or None. Memory, an estimate, decides for large models alone."""
        if self.disk > self.disk_free:
            return f"expected {_gib(self.disk)} of free disk, got {_gib(self.disk_free)}"
        short = self.memory_available is not None and self.memory > self.memory_available
        if self.isolated and short:
            worst = max(self.steps, key=lambda step: step.memory)
            return (
                f"{worst.what}: expected {_gib(worst.memory)} of free memory (an estimate), "
                f"got {_gib(self.memory_available or 0)}"
            )
        return None

    def check(self) -> None:
        """Raise EdgeflowError where the plan cannot fit."""
        if self.obstacle:
            raise EdgeflowError(f"export: {self.model}: the machine cannot hold it: {self.obstacle}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parts": self.parts,
            "isolated": self.isolated,
            "steps": [vars(step) for step in self.steps],
            "disk_bytes": self.disk,
            "peak_memory_bytes": round(self.memory),
            "seconds": round(self.seconds, 1),
            "disk_free_bytes": self.disk_free,
            "memory_available_bytes": self.memory_available,
            "obstacle": self.obstacle,
        }

    def render(self) -> str:
        """The plan for people."""
        lines = [f"{self.model}: " + ", ".join(f"{p} {n / 1e6:.1f} M" for p, n in self.parts.items())]
        for i, step in enumerate(self.steps, 1):
            disk = f", writes {step.disk / 2**20:.1f} MiB" if step.disk else ""
            lines.append(f"{i:3}. {step.what}: about {_gib(step.memory)}, {step.seconds:.0f} s{disk}")
        free = _gib(self.memory_available or 0)
        lines.append(
            f"in all: {self.disk / 2**20:.1f} MiB on disk ({_gib(self.disk_free)} free); memory about "
            f"{_gib(self.memory)} ({free} free); about {self.seconds / 60:.1f} min"
        )
        return "\n".join(lines + ([f"cannot fit: {self.obstacle}"] if self.obstacle else []))


def plan_export(
    checkpoint: Checkpoint,
    jobs: Sequence[tuple[str, str, Sequence[str]]],
    out: Path,
    *,
    num_prompts: int,
    parity: bool,
) -> ExportPlan:
    """The plan of an export whose ``jobs`` are backend, precision and graphs of each bundle."""
    isolated, floats = is_large(checkpoint), fp32_bytes(checkpoint)
    work = _gflop(checkpoint, floats)
    picture = _PIXEL_BYTES * checkpoint.generation.picture_size**2
    base = _PARENT + _CHILD
    runs = 2 * num_prompts * sum(work.values())
    steps = [Step("reference pictures", base + sum(floats.values()) + picture, 10 + runs / _EAGER_RATE)]
    for backend, precision, graphs in jobs:
        factor = _LOWERING_MEMORY.get(backend, max(_LOWERING_MEMORY.values()))
        pace = _LOWERING_SECONDS.get(backend, max(_LOWERING_SECONDS.values()))
        for graph in graphs:
            held = sum(floats[p] for p in _parts(graph))
            size = _graph_bytes(checkpoint, (backend, precision, (graph,)))
            seconds = 10 + pace * held / GIB
            steps.append(Step(f"{backend} {precision}: {graph}", base + factor * held, seconds, size))
    if parity:
        steps.append(Step("originals", base + sum(floats.values()) + picture, 10 + runs / _EAGER_RATE))
        in_turn = any(_graph_bytes(checkpoint, job) >= LARGE_GRAPHS for job in jobs)
        for backend, precision, graphs in jobs:
            # The components are measured on the reference's inputs, then once more in a row.
            count = num_prompts * (1 if list(graphs) == [PIPELINE] else 2)
            seconds = 10 + count * sum(work.values()) / _RUNTIME_RATE
            memory = base + _runtime_memory(graphs, floats, picture, in_turn=in_turn)
            steps.append(Step(f"parity of {backend} {precision}", memory, seconds))
    parameters = {part: size // 4 for part, size in floats.items()}
    available = memory_bytes()[1]
    return ExportPlan(checkpoint.name, parameters, isolated, tuple(steps), free_disk_bytes(out), available)


def _runtime_memory(graphs: Sequence[str], floats: dict[str, int], picture: int, *, in_turn: bool) -> float:
    """Bytes that a runtime holds during parity; ``in_turn``: one graph at a time (parity_isolated.InTurn)."""
    held = [
        _RUNTIME_MEMORY * sum(floats[p] for p in _parts(graph)) + (picture if "vae" in _parts(graph) else 0)
        for graph in graphs
    ]
    return max(held) if in_turn else sum(held)


def _graph_bytes(checkpoint: Checkpoint, job: tuple[str, str, Sequence[str]]) -> int:
    """Bytes of the weights of one bundle's graphs."""
    _, precision, graphs = job
    return sum(stored_bytes(checkpoint, p, precision) for graph in graphs for p in _parts(graph))


def _parts(graph: str) -> tuple[str, ...]:
    return tuple(part for name in (COMPONENTS if graph == PIPELINE else (graph,)) for part in _PARTS[name])


def stored_bytes(checkpoint: Checkpoint, part: str, precision: str) -> int:
    """Bytes of a part's weights in a bundle; of the autoencoder only what decodes is exported."""
    width, total = (2 if precision == "fp16" else 4), 0
    for name, tensor in checkpoint.stored_tensors(part).items():
        if part == "vae" and not name.startswith(("decoder.", "post_quant_conv.")):
            continue
        is_float = tensor.dtype in ("F16", "BF16", "F32", "F64")
        total += tensor.numel * width if is_float else tensor.end - tensor.start
    return total


def _gflop(checkpoint: Checkpoint, floats: dict[str, int]) -> dict[str, float]:
    spec = checkpoint.generation
    sides = {"text_encoder": None, "unet": spec.latent_shape[1], "vae": spec.picture_size}
    found = {}
    for part, (gflop, parameters, side) in _WORK.items():
        own = sides[part]
        area = 1.0 if own is None or side is None else (own / side) ** 2
        share = 49.5 / 83.7 if checkpoint.class_name(part) == "AutoencoderKL" else 0.5
        count = floats[part] / 4 * (share if part == "vae" else 1)
        found[part] = gflop * count / parameters * area
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
