"""One configuration measured from within a process of its own: ``python -P -m edgeflow.measure_child JOB``.

JOB is JSON: ``{"model", "runtime", "prompt", "seed", "components"}``. The child loads the model, draws the
first picture, and says one JSON object a line on what was its stdout::

    {"event": "ready", "stages": {stage: ms…}, "runtime", "device", "backend", "threads", "pixels", "shape",
     "rss_mib": {"imported", "ready"}}
    {"event": "ran", "latency_ms": [ms…], "graphs_ms": {graph: [ms…]…}}
    {"event": "ended", "peak_rss_mib", "peak_gpu_mib"}
    {"event": "error", "message", "exit_code"}

It then obeys lines on stdin: ``run N`` draws N pictures, ``parts N`` runs the graphs one by one N times, and
``end`` (or the end of stdin) ends it. Between two lines it sleeps, so that another process is measured alone.
Nothing heavy is imported before the clock of the stage that it belongs to.
"""

from __future__ import annotations

import time

_STARTED = time.monotonic()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

#: What happens before the first picture is there, in order; each is in milliseconds.
STAGES = ("python", "import", "open", "session", "tokenizer", "first")


class _Clock:
    """Milliseconds of each stage, from the moment at which the parent started this process."""

    def __init__(self, spawned: float) -> None:
        self.stages = {"python": (_STARTED - spawned) * 1000}
        self._last = _STARTED

    def stage(self, name: str) -> None:
        """What has passed since the stage before belongs to this one."""
        now = time.monotonic()
        self.stages[name] = self.stages.get(name, 0.0) + (now - self._last) * 1000
        self._last = now


class _Timed:
    """A runtime that notes how long each graph took."""

    def __init__(self, runtime: Any):
        self._runtime = runtime
        self.name = runtime.name
        self.device = getattr(runtime, "device", "cpu")
        self.graphs_ms: dict[str, list[float]] = {}

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        outputs = self._runtime.run(graph, inputs)
        self.graphs_ms.setdefault(graph, []).append((time.perf_counter() - start) * 1000)
        return outputs


def main(argv: list[str]) -> int:
    """Serve one job until stdin ends. Exit code 0, or 1 after the event ``error``."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a backend prints is not part of the protocol

    def say(**event: Any) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    from edgeflow.errors import EdgeflowError

    try:
        _serve(json.loads(argv[0]), say)
    except EdgeflowError as error:
        say(event="error", message=str(error), exit_code=error.exit_code)
        return 1
    return 0


def _serve(job: dict[str, Any], say: Any) -> None:
    clock = _Clock(job["spawned"])
    generator, rss_imported = _load(job, clock)
    timed = generator.runtime = _Timed(generator.runtime)
    picture = generator.draw(job["prompt"], job["seed"])
    clock.stage("first")
    say(event="ready", **_ready(generator, picture, clock, rss_imported))
    for line in sys.stdin:
        order, _, count = line.partition(" ")
        if order.strip() == "end":
            break
        timed.graphs_ms = {}
        latencies = (_run if order == "run" else _parts)(generator, job, int(count), picture)
        say(event="ran", latency_ms=latencies, graphs_ms=timed.graphs_ms)
    say(event="ended", peak_rss_mib=peak_rss_mib(), peak_gpu_mib=peak_gpu_mib())


def _load(job: dict[str, Any], clock: _Clock) -> tuple[Any, float]:
    """The generator, each stage timed, and what the process held once everything was imported."""
    from edgeflow import registry
    from edgeflow.generate import Generator, default_runtime, load_runtime, open_model

    clock.stage("import")
    model = open_model(job["model"])
    clock.stage("open")
    registry.runtime(job["runtime"] or default_runtime(model))
    clock.stage("import")
    rss = peak_rss_mib()
    runtime = load_runtime(model, job["runtime"])
    clock.stage("session")
    generator = Generator(model, runtime)
    clock.stage("tokenizer")
    return generator, rss


def _ready(generator: Any, picture: Any, clock: _Clock, rss_imported: float) -> dict[str, Any]:
    import base64
    import zlib

    rss_ready = peak_rss_mib()
    from edgeflow.generate import backend_version
    from edgeflow.runtimes.checks import num_threads

    return {
        "stages": clock.stages,
        "runtime": generator.runtime.name,
        "device": generator.runtime.device,
        "backend": backend_version(generator.runtime.name),
        "threads": num_threads(),
        "pixels": base64.b64encode(zlib.compress(picture.pixels.tobytes(), 1)).decode(),
        "shape": list(picture.pixels.shape),
        "rss_mib": {"imported": rss_imported, "ready": rss_ready},
    }


def _run(generator: Any, job: dict[str, Any], count: int, expected: Any) -> list[float]:
    """Latencies of whole pictures; each must be the first one again."""
    from edgeflow.errors import RuntimeFailure
    from edgeflow.metrics import psnr_db

    latencies = []
    for _ in range(count):
        picture = generator.draw(job["prompt"], job["seed"])
        latencies.append(picture.latency_ms)
        if picture.pixels.tobytes() == expected.pixels.tobytes():
            continue
        psnr = psnr_db(expected.pixels, picture.pixels, 255.0)
        if psnr < job["repeat_psnr_db"]:
            raise RuntimeFailure(
                f"measure: {job['model']}: expected the first picture again from the same prompt and seed, "
                f"got one {psnr:.1f} dB away; a fast wrong picture is not a measurement"
            )
    return latencies


def _parts(generator: Any, job: dict[str, Any], count: int, expected: Any) -> list[float]:
    """The graphs one by one, where a runtime that has the whole pipeline also has its components."""
    from edgeflow.generate import run_pipeline

    input_ids, noise = generator.inputs(job["prompt"], job["seed"])
    latencies = []
    for _ in range(count):
        start = time.perf_counter()
        run_pipeline(generator.runtime, generator.spec, input_ids, noise, fused=False)
        latencies.append((time.perf_counter() - start) * 1000)
    return latencies


def peak_rss_mib() -> float:
    """The most memory this process has held, in MiB.

    On Linux VmHWM of the process's own address space: ru_maxrss there begins with what the parent held at the
    fork.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def peak_gpu_mib() -> float | None:
    """The most memory torch has held on the GPU, in MiB; None where it used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_reserved()) / 2**20


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
