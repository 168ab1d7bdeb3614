"""Reflow and distillation at Stable Diffusion 1.5's full size on one GPU, with random weights.

    python -m edgeflow.training.full_size_benchmark -o full-size.json

Measured at one batch size in one process: images/s and peak memory of edgeflow's own training step (bf16
autocast over float32 weights, compiled, channels-last, fused AdamW) beside a plain diffusers-style loop
(edgeflow.training.sd_plain_loop), and what the paper's schedule would take at that speed. Weights stay
float32 because the paper's rate of 1e-6 moves most weights by less than bf16 resolves. What a step costs
does not depend on the weights' values. The file is written anew after each row, so a run that is cut off
keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeflow.errors import EdgeflowError, UsageError
from edgeflow.loading import quiet_libraries
from edgeflow.tokenizer import END
from edgeflow.training.config import LoopConfig
from edgeflow.training.distill import DistillConfig, DistillObjective
from edgeflow.training.losses import PerceptualDistance
from edgeflow.training.models import Parts
from edgeflow.training.pairs import Pairs
from edgeflow.training.parallel import Processes
from edgeflow.training.random_checkpoint import SHAPES, build_part, configs
from edgeflow.training.random_vocabulary import write_tokenizer
from edgeflow.training.reflow import ReflowConfig, ReflowObjective
from edgeflow.training.sampling import sample_teacher
from edgeflow.training.sd_paper_schedule import describe, ratios, schedule, schedule_table, table
from edgeflow.training.sd_plain_loop import PlainBatch, plain_loop
from edgeflow.training.step import Step

RATE = 1e-6  # the paper's, for reflow
_CAPTIONS = ("a red bicycle", "an owl on a branch", "a bowl of soup", "a street at night")


@dataclass(frozen=True)
class Plan:
    """What is run: sizes, step counts and limits."""

    width: str = "full"
    batch_size: int = 16
    perceptual_batch_size: int = 4
    warm_steps: int = 3
    steps: int = 20
    compile: bool = True
    attention: str = "default"
    minutes: float = 4.0


class Bench:
    """The model, the report so far, and the clock."""

    def __init__(self, plan: Plan, device: torch.device, out: Path):
        self.plan, self.device, self.out, self.began = plan, device, out, time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {}
        self.configs = configs("sd15", plan.width)
        torch.manual_seed(0)
        self.pairs = _random_pairs(self.configs["unet"], device)
        width = self.configs["unet"]["cross_attention_dim"]
        self.text = torch.randn(len(_CAPTIONS), 77, width, device=device)
        self.parameters, self.flops = count(self.configs["unet"])
        self.folder = tempfile.TemporaryDirectory()
        self.tokenizer = Path(self.folder.name, "tokenizer")
        write_tokenizer(self.tokenizer, SHAPES["sd15", plan.width].vocabulary, pad=END)
        self.text_encoder = build_part("text_encoder", self.configs["text_encoder"], device)
        self.say(f"UNet of {self.parameters / 1e6:.1f} M parameters, {self.flops / 1e9:.0f} GFLOP a pass")

    @functools.cached_property
    def unet(self) -> Any:
        """The one that edgeflow's rows train; the plain rows, which come before, build their own."""
        return build_part("unet", self.configs["unet"], self.device)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)

    def seconds_left(self) -> float:
        return 60 * self.plan.minutes - (time.monotonic() - self.began)

    def record(self, name: str, run: Callable[[], dict[str, Any]], needs_s: float) -> dict[str, Any]:
        """Run one row and write the report; a row that does not fit in time or memory says so."""
        if self.seconds_left() < needs_s:
            row: dict[str, Any] = {
                "skipped": f"{self.seconds_left():.0f} s left, about {needs_s:.0f} s needed"
            }
        else:
            if "unet" in self.__dict__:
                self.unet.zero_grad(set_to_none=True)
            free(self.device)
            try:
                row = run()
            except torch.OutOfMemoryError:
                row = {"failed": "out of memory"}
            except Exception as error:  # the other rows are worth having; the exit code tells
                row = {"failed": f"{type(error).__name__}: {error}"[:500]}
                traceback.print_exc()
        self.rows[name] = row
        self.say(f"{name}: {describe(row)}")
        self.write()
        return row

    def write(self) -> None:
        text = json.dumps(report(self), indent=2) + "\n"
        partial = self.out.with_name(self.out.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.out)

    def loop(self, batch_size: int, *, cuda_graph: bool = False) -> LoopConfig:
        return LoopConfig(
            steps=10**6,
            batch_size=batch_size,
            learning_rate=RATE,
            warmup_steps=1000,
            ema_decay=0.9999,
            bf16=True,
            compile=self.plan.compile,
            cuda_graph=cuda_graph,
        )


def free(device: torch.device) -> None:
    """Give back what the row before has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _random_pairs(unet: dict[str, Any], device: torch.device, count: int = 256) -> Pairs:
    side, channels = unet["sample_size"], unet["in_channels"]
    noise, latent = torch.randn(2, count, channels, side, side, device=device)
    caption = torch.arange(count, device=device) % len(_CAPTIONS)
    return Pairs(noise, latent, caption, list(_CAPTIONS), torch.arange(count))


def measure(step: Callable[[], object], batch_size: int, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Seconds of the first steps, then images/s over ``plan.steps`` more, and the peak memory of both."""

    def run(count: int) -> float:
        began = time.monotonic()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - began

    first, seconds = run(plan.warm_steps), run(plan.steps)
    row: dict[str, Any] = {
        "batch_size": batch_size,
        "steps": plan.steps,
        "warm_steps": plan.warm_steps,
        "warm_seconds": round(first, 2),
        "images_per_s": round(plan.steps * batch_size / seconds, 3),
    }
    if device.type == "cuda":
        row["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return row


def plain(bench: Bench, kind: str, batch_size: int) -> dict[str, Any]:
    """The plain loop on a copy of the model; PyTorch's settings as they come."""
    unet = build_part("unet", bench.configs["unet"], bench.device)
    pictures = distance = None
    if kind == "distill + perceptual":
        vae = build_part("vae", bench.configs["vae"], bench.device)
        scale = vae.config.scaling_factor
        distance = PerceptualDistance().to(bench.device)

        def pictures(latent: Tensor) -> Tensor:
            return vae.decode(latent / scale).sample

    pairs, device = bench.pairs, bench.device

    def draw() -> PlainBatch:
        index = torch.randint(len(pairs.noise), (batch_size,), device=device)
        tau = (
            torch.rand(batch_size, device=device)
            if kind == "reflow"
            else torch.zeros(batch_size, device=device)
        )
        return PlainBatch(pairs.noise[index], pairs.latent[index], bench.text[pairs.caption[index]], tau)

    step = plain_loop(unet, draw, learning_rate=RATE, pictures=pictures, distance=distance)
    return measure(step, batch_size, bench.plan, device)


def own(bench: Bench, kind: str, batch_size: int, *, cuda_graph: bool = False) -> dict[str, Any]:
    """edgeflow's step on the real objective."""
    parts, loop = _parts(bench, kind), bench.loop(batch_size, cuda_graph=cuda_graph)
    if kind == "reflow":
        objective: Any = ReflowObjective(ReflowConfig(loop), parts, bench.pairs, bench.device)
    else:
        weights = (0.0, 1.0) if "perceptual" in kind else (1.0, 0.0)
        config = DistillConfig(loop, latent_weight=weights[0], perceptual_weight=weights[1])
        objective = DistillObjective(config, parts, bench.pairs, bench.device)
    step, number = Step(objective, loop, Processes.current(bench.device)), itertools.count(1)
    with attention(bench.plan.attention):
        row = measure(
            lambda: step.run(next(number), RATE, 0.999),
            batch_size,
            _warm(bench.plan, cuda_graph),
            bench.device,
        )
    row |= {k: round(v, 4) for k, v in step.take_means().items()}
    step.close()
    if "perceptual" not in kind:  # forward and twice that backward, of the UNet alone
        row["unet_tflop_per_s"] = round(3e-12 * bench.flops * row["images_per_s"], 1)
    return row


@contextlib.contextmanager
def attention(name: str) -> Iterator[None]:
    """Prefer one of the attention kernels, flash or cudnn, where it can be had; default: PyTorch's choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "default":
        yield
        return
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    order = (order if name == "flash" else order[::-1]) + [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def _warm(plan: Plan, cuda_graph: bool) -> Plan:
    """Some eager steps, the capture and a replay come before what is timed."""
    return replace(plan, warm_steps=plan.warm_steps + 2) if cuda_graph else plan


def _parts(bench: Bench, kind: str) -> Parts:
    """The parts in memory. The UNet is the same object in every row, so that it is compiled once."""
    vae = build_part("vae", bench.configs["vae"], bench.device) if "distill" in kind else torch.nn.Identity()
    bench.unet.train().requires_grad_(True)
    return Parts(vae, bench.unet, bench.text_encoder, bench.tokenizer, {"kind": "rectified-flow"})


def count(unet: dict[str, Any]) -> tuple[int, int]:
    """Parameters of the UNet, and its floating-point operations on one latent; nothing is computed."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = UNet2DConditionModel(**{k: v for k, v in unet.items() if not k.startswith("_")})
        side = unet["sample_size"]
        text = torch.empty(1, 77, unet["cross_attention_dim"])
        model(torch.empty(1, unet["in_channels"], side, side), torch.empty(1), text)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def pairs(bench: Bench) -> dict[str, Any]:
    """25 steps of DPM-Solver++ with guidance in half precision, one batch, eager."""
    unet = build_part("unet", bench.configs["unet"], bench.device)
    half = torch.float16 if bench.device.type == "cuda" else torch.float32
    with quiet_libraries():
        unet = unet.to(dtype=half, memory_format=torch.channels_last)
    batch = bench.plan.batch_size
    noise, text = bench.pairs.noise[:batch], bench.text[bench.pairs.caption[:batch]]

    def draw(steps: int) -> None:
        sample_teacher(unet, text, bench.text[:1], noise, steps=steps, guidance=5.0)

    draw(2)
    return measure(lambda: draw(25), batch, replace(bench.plan, warm_steps=0, steps=1), bench.device)


def report(bench: Bench) -> dict[str, Any]:
    """Everything measured so far, and what follows from it."""
    device = bench.device
    cuda = device.type == "cuda"
    return {
        "schema": 1,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "plan": asdict(bench.plan),
        "unet": {
            "parameters": bench.parameters,
            "forward_gflop": round(bench.flops / 1e9, 1),
        },
        "seconds": round(time.monotonic() - bench.began, 1),
        "rows": bench.rows,
        "ratio_to_plain": dict(ratios(bench.rows)),
        "paper": schedule(bench.rows) if bench.plan.width == "full" else None,
    }


def run(plan: Plan, device: torch.device, out: Path) -> Bench:
    """All rows: the plain loop's, with PyTorch's settings as they come, then edgeflow's."""
    bench = Bench(plan, device, out)
    batch, small = plan.batch_size, plan.perceptual_batch_size
    while "out of memory" in str(
        bench.record("plain reflow", functools.partial(plain, bench, "reflow", batch), 20)
    ):
        if batch == 1:
            break
        batch //= 2
    bench.record("plain distill", lambda: plain(bench, "distill", batch), 15)
    bench.record("plain distill + perceptual", lambda: plain(bench, "distill + perceptual", small), 15)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    bench.record("reflow", lambda: own(bench, "reflow", batch), 60)
    bench.record("distill", lambda: own(bench, "distill", batch), 15)
    bench.record("pairs", lambda: pairs(bench), 15)
    bench.record("distill + perceptual", lambda: own(bench, "distill + perceptual", small), 45)
    if device.type == "cuda":
        bench.record("reflow, CUDA graph", lambda: own(bench, "reflow", batch, cuda_graph=True), 20)
    return bench


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeflow.training.full_size_benchmark",
        description="Time reflow and distillation at Stable Diffusion 1.5's size, with random weights.",
        epilog="example: python -m edgeflow.training.full_size_benchmark -o full-size.json",
    )
    plan = Plan()
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="JSON report to write")
    parser.add_argument("--width", choices=("full", "narrow"), default=plan.width)
    parser.add_argument("--batch-size", type=int, default=plan.batch_size, metavar="N")
    parser.add_argument("--perceptual-batch-size", type=int, default=plan.perceptual_batch_size, metavar="N")
    parser.add_argument("--steps", type=int, default=plan.steps, metavar="N", help="timed steps of each row")
    parser.add_argument(
        "--minutes", type=float, default=plan.minutes, metavar="M", help="start no row after that"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the model as it is")
    parser.add_argument("--attention", choices=("default", "flash", "cudnn"), default=plan.attention)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--force", action="store_true", help="replace a report that already exists")
    options = parser.parse_args(argv)
    chosen = replace(
        plan,
        width=options.width,
        batch_size=options.batch_size,
        perceptual_batch_size=options.perceptual_batch_size,
        steps=options.steps,
        minutes=options.minutes,
        compile=not options.no_compile,
        attention=options.attention,
    )
    try:
        if options.out.exists() and not options.force:
            raise UsageError(f"output {options.out} already exists; give another -o/--out or --force")
        from edgeflow.training.run import pick_device

        bench = run(chosen, pick_device(options.device), options.out)
    except EdgeflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(bench.rows))
    if chosen.width == "full":
        print("\n" + schedule_table(bench.rows))
    return int(any("failed" in row for row in bench.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
