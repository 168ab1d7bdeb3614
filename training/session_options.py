"""Which options of a session make a picture faster on this machine: each against what the runtime sets.

    python -m edgeflow.training.session_options BUNDLE... [--threads N] [--launches N] [--only OPTION]...

Every launch is a process that opens the bundle once with each set of options and draws in turns; a ratio is
taken a launch, and its interval is Student's t over launches, as ``edgeflow bench`` does. Pictures must stay
those of the runtime's own options (50 dB). The table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from edgeflow.bundle import Bundle
from edgeflow.generate import is_fused, run_pipeline
from edgeflow.measure_statistics import ratio, summarize

AS_SET = "as the runtime sets them"


def _entry(name: str, value: str) -> Callable[[Any], None]:
    return lambda options: options.add_session_config_entry(name, value)


def _attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda options: setattr(options, name, value)


def _extended(options: Any) -> None:
    import onnxruntime as ort

    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED


#: OpenVINO without edgeflow.runtimes.openvino_winograd.
AS_STORED = "convolutions as stored"
#: What to try besides: for ONNX Runtime a change of its SessionOptions, for OpenVINO properties.
ONNX: Mapping[str, Callable[[Any], None] | None] = {
    AS_SET: None,
    "no spinning": _entry("session.intra_op.allow_spinning", "0"),
    "spinning ends with the run": _entry("session.force_spinning_stop", "1"),
    "threads spin on after the run": _entry("session.force_spinning_stop", "0"),
    "no memory arena": _attribute("enable_cpu_mem_arena", False),
    "no memory pattern": _attribute("enable_mem_pattern", False),
    "no blocked layout (extended)": _extended,
    "no prepacking": _entry("session.disable_prepacking", "1"),
    "denormals as zero": _entry("session.set_denormal_as_zero", "1"),
    "quantized weights kept as integers": _entry("session.disable_quant_qdq", "0"),
    "gelu by tanh": _entry("optimization.enable_gelu_approximation", "1"),
}
OPENVINO: Mapping[str, Mapping[str, Any]] = {
    AS_SET: {},
    "throughput hint": {"PERFORMANCE_HINT": "THROUGHPUT"},
    "no precision hint": {"INFERENCE_PRECISION_HINT": "dynamic"},
    "one thread more than cores": {"INFERENCE_NUM_THREADS": (os.cpu_count() or 1) + 1},
    "pinned to cores": {"ENABLE_CPU_PINNING": True},
    "not pinned": {"ENABLE_CPU_PINNING": False},
    AS_STORED: {},
}
KNOWN = {"onnx": tuple(ONNX), "openvino": tuple(OPENVINO)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edgeflow.training.session_options", description=__doc__)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--launches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="OPTION", help="Try this one alone; may repeat.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        print(json.dumps(_launch(asked.bundles[0], asked.rounds, asked.runs, asked.only)))
        return 0
    for bundle in asked.bundles:
        print(table(bundle, [_spawned(bundle, asked) for _ in range(asked.launches)]), flush=True)
    return 0


def table(bundle: str, launches: list[dict[str, Any]]) -> str:
    """Markdown: a row for each set of options, with its ratio to the first."""
    lines = [
        f"`{bundle}`, {len(launches)} launches",
        "",
        "| options | picture, ms | session, ms | times as long |",
    ]
    lines.append("|---|---|---|---|")
    for name in launches[0]:
        rounds = [launch[name]["rounds"] for launch in launches]
        warm = summarize([t for launch in rounds for one in launch for t in one])
        session = summarize([launch[name]["session_ms"] for launch in launches])
        said = "1"
        if name != AS_SET and len(launches) > 1:
            found = ratio(rounds, [launch[AS_SET]["rounds"] for launch in launches])
            said = f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f}): {found.verdict}"
        lines.append(f"| {name} | {warm.median:.1f} | {session.median:.0f} | {said} |")
    return "\n".join([*lines, ""])


def _spawned(bundle: str, asked: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "edgeflow.training.session_options", bundle, "--child"]
    command += ["--rounds", str(asked.rounds), "--runs", str(asked.runs)]
    command += [word for name in asked.only or () for word in ("--only", name)]
    threads = {} if asked.threads is None else {"OMP_NUM_THREADS": str(asked.threads)}
    made = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, check=True)
    return json.loads(made.stdout)


def _launch(path: str, rounds: int, runs: int, only: list[str] | None) -> dict[str, Any]:
    """Option set → its session's milliseconds and its rounds of warm pictures, in milliseconds."""
    import numpy as np

    from edgeflow.metrics import psnr_db

    bundle = Bundle.open(path)
    arrays, fused, spec = bundle.reference(), is_fused(bundle), bundle.generation
    ids, noise = arrays["prompt0/input_ids"], arrays["prompt0/noise"]
    runtimes: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    expected = None
    known = KNOWN[bundle.manifest.backend]
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise SystemExit(f"session_options: --only {unknown[0]}: not known; known: {', '.join(known)}")
    for name in known:
        if only and name not in (AS_SET, *only):
            continue
        start = time.perf_counter()
        runtimes[name] = _opened(bundle, name)
        found[name] = {"session_ms": (time.perf_counter() - start) * 1000, "rounds": []}
        picture = run_pipeline(runtimes[name], spec, ids, noise, fused=fused)
        expected = picture if expected is None else expected
        if psnr_db(expected, picture.astype(np.float32), peak=1.0) < 50:
            raise SystemExit(f"session_options: {path}: {name}: another picture")
    order = list(runtimes)
    for i in range(rounds):
        for name in order if i % 2 == 0 else order[::-1]:
            times = []
            for _ in range(runs + 1):  # the first finds another session's data in the caches
                start = time.perf_counter()
                run_pipeline(runtimes[name], spec, ids, noise, fused=fused)
                times.append((time.perf_counter() - start) * 1000)
            found[name]["rounds"].append(times[1:])
    return found


def _opened(bundle: Bundle, name: str) -> Any:
    graphs = {graph.name: graph for graph in bundle.manifest.graphs}
    if bundle.manifest.backend == "onnx":
        from edgeflow.runtimes import onnx_runtime as onnx

        sessions = {
            k: onnx._session(bundle, g, [onnx.CPU], capture=False, adjust=ONNX[name])
            for k, g in graphs.items()
        }
        return onnx.OnnxRuntime(graphs, sessions)
    import openvino

    from edgeflow.runtimes import openvino_runtime as ov

    core = openvino.Core()
    compiled = {
        k: ov._compile(core, bundle, g, OPENVINO[name], as_stored=name == AS_STORED)
        for k, g in graphs.items()
    }
    return ov.OpenVinoRuntime(graphs, compiled)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
