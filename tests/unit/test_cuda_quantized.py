"""A quantized checkpoint on the CUDA path, on a CPU: its very integers, and their picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")
pytest.importorskip("diffusers")

from edgeflow import registry  # noqa: E402
from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.generate import Generator, run_pipeline, to_pixels  # noqa: E402
from edgeflow.metrics import psnr_db  # noqa: E402
from edgeflow.quantization.apply import load_integers, quantize_checkpoint  # noqa: E402
from edgeflow.quantization.recipe import read_recipe  # noqa: E402
from edgeflow.runtimes.cuda_compile import CompiledCheckpoint, How  # noqa: E402
from edgeflow.runtimes.cuda_reference import CudaReference  # noqa: E402


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("quantized") / "w8"
    quantize_checkpoint(Checkpoint.open(tiny_checkpoint), read_recipe("w8"), out)
    return Checkpoint.open(out)


def test_the_integers_are_the_checkpoints(quantized: Checkpoint) -> None:
    made = CompiledCheckpoint(quantized, How("fp32", "cpu", compile=False))
    module, counts = made.assemble("pipeline")
    stored = [v for part in ("text_encoder", "unet", "vae") for v in load_integers(quantized, part).values()]
    known = {(v["q"].tobytes(), v["scale"].astype(np.float32).tobytes()) for v in stored if v["q"].ndim == 2}
    found = [m.weight for m in module.modules() if hasattr(getattr(m, "weight", None), "qdata")]
    assert len(found) == counts["int8 linear"] > 0 and counts["made float"] > 0
    assert {(w.qdata.numpy().tobytes(), w.scale.numpy().tobytes()) for w in found} <= known


@pytest.mark.parametrize(("precision", "floor_db"), [("fp32", 50.0), ("fp16", 40.0)])
def test_the_picture_is_the_quantized_models(quantized: Checkpoint, precision: str, floor_db: float) -> None:
    pictures = []
    for runtime in (
        registry.runtime("torch").load(quantized),  # type: ignore[arg-type]
        CudaReference.compiled(quantized, How(precision, "cpu", compile=False), {}),
    ):
        ids, noise = Generator(quantized, runtime).inputs(quantized.generation.prompts[0], 0)
        pictures.append(to_pixels(run_pipeline(runtime, quantized.generation, ids, noise, fused=True)))
    assert psnr_db(pictures[0], pictures[1], 255.0) >= floor_db
