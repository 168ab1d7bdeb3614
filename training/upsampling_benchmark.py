"""What merging an upsampling with the convolution behind it saves: one layer, in both engines.

    python -m edgeflow.training.upsampling_benchmark --channels 512 --size 64

Both forms are written as ONNX and run in turns by ONNX Runtime and OpenVINO on one thread; the fastest of
``--rounds`` is printed, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeflow.telemetry import no_telemetry
from edgeflow.upsampling import PhaseConv


class Plain(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def runs(module: nn.Module, x: Tensor, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Engine → a run of the module on one thread."""
    import onnxruntime as ort

    with no_telemetry():
        import openvino as ov
    path = folder / f"{type(module).__name__}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=True, external_data=False, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options)
    (name,) = (put.name for put in session.get_inputs())
    yield "ONNX Runtime", lambda: session.run(None, {name: x.numpy()})[0]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    yield "OpenVINO", lambda: request.infer([x.numpy()])[0]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edgeflow.training.upsampling_benchmark", description=__doc__)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--size", type=int, default=64, help="height and width before upsampling")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(argv)
    torch.manual_seed(0)
    plain, x = Plain(asked.channels).eval(), torch.randn(1, asked.channels, asked.size, asked.size)
    fastest: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        forms = {"as published": plain, "merged": PhaseConv(plain.conv).eval()}
        made = [(e, f, run) for f, m in forms.items() for e, run in runs(m, x, Path(folder))]
        expected = plain(x).numpy()
        for _ in range(asked.rounds):
            for engine, form, run in made:
                start = time.perf_counter()
                found = run()
                seconds = time.perf_counter() - start
                np.testing.assert_allclose(found, expected, atol=1e-4)
                fastest[engine, form] = min(seconds, fastest.get((engine, form), seconds))
    print("| engine | as published, ms | merged, ms |\n|---|---|---|")
    for engine in dict.fromkeys(engine for engine, _ in fastest):
        print(f"| {engine} | {' | '.join(f'{1000 * fastest[engine, form]:.0f}' for form in forms)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
