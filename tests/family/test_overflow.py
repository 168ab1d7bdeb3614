"""Values that float16 cannot hold: found on real prompts, kept in float32, said in manifest and table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import ExportError
from edgeflow.export import export_model
from edgeflow.generate import load_runtime
from edgeflow.metrics import psnr_db

pytestmark = pytest.mark.slow  # each exports a decoder of four levels: a minute on a busy core

#: In the decoder's first block: what it makes is normalized next, so the picture does not change in scale.
CONV = "decoder.mid_block.resnets.0.conv1"


def planted(source: Path, folder: Path, factor: float) -> Path:
    """The checkpoint with one of its decoder's convolutions scaled by ``factor``."""
    shutil.copytree(source, folder)
    for weights in (folder / "vae").glob("*.safetensors"):
        tensors = load_file(weights)
        for name in (f"{CONV}.weight", f"{CONV}.bias"):
            if name in tensors:
                tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def overflowing(published: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    from edgeflow.training.random_checkpoint import build_random_checkpoint

    base = tmp_path_factory.mktemp("overflow")
    build_random_checkpoint(base / "plain", files="full")
    return Checkpoint.open(planted(base / "plain", base / "planted", 2e6))


def decoded(bundle: Bundle, prompt: int = 0) -> np.ndarray:
    reference = bundle.reference()
    runtime = load_runtime(bundle)
    return runtime.run("decoder", {"latent": reference[f"prompt{prompt}/decoder/latent"]})["image"]


@pytest.mark.parametrize("backend", ["onnx", "coreml"])
def test_a_planted_overflow_stays_float32_and_is_named(
    backend: str, overflowing: Checkpoint, tmp_path: Path
) -> None:
    (path,) = export_model(
        overflowing,
        backends=[backend],
        precisions=["fp16"],
        layouts=["components"],
        num_prompts=1,
        out=tmp_path,
    )
    bundle = Bundle.open(path)
    assert set(bundle.manifest.fp32_ops) == {"decoder"}
    assert any(CONV in op for op in bundle.manifest.fp32_ops["decoder"])
    expected = bundle.reference()["prompt0/decoder/image"]
    assert psnr_db(expected, decoded(bundle), peak=2.0) > 35


def test_without_what_was_found_the_planted_overflow_is_one(
    overflowing: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: all in float16, the same decoder gives no picture. Core ML's reader rounds."""
    from edgeflow import overflow

    monkeypatch.setattr(overflow, "wide_nodes", lambda ranges: overflow.Wide())
    (path,) = export_model(
        overflowing,
        backends=["coreml"],
        precisions=["fp16"],
        layouts=["components"],
        num_prompts=1,
        out=tmp_path,
    )
    assert not np.isfinite(decoded(Bundle.open(path))).all()


def test_onnx_holds_no_float16_value_near_the_overflow(overflowing: Checkpoint, tmp_path: Path) -> None:
    """ONNX Runtime's CPU computes float16 graphs in float32; the graph's own types are what a GPU obeys."""
    import onnx

    (path,) = export_model(
        overflowing,
        backends=["onnx"],
        precisions=["fp16"],
        layouts=["components"],
        num_prompts=1,
        out=tmp_path,
    )
    model = onnx.shape_inference.infer_shapes(onnx.load(path / "vae_decoder" / "model.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    wide = [node for node in convs if types.get(node.output[0]) == onnx.TensorProto.FLOAT]
    assert len(wide) == 1 and len(convs) > 5
    assert any(CONV in name for name in wide[0].input)


def test_strict_precision_refuses(overflowing: Checkpoint, tmp_path: Path) -> None:
    asked = ["export", str(overflowing.root), "--to", "onnx", "--precision", "fp16", "--strict-precision"]
    assert main([*asked, "--no-parity", "--num-prompts", "1", "-o", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_overflow_has_none(published: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(published())
    (path,) = export_model(
        checkpoint, backends=["onnx"], precisions=["fp16"], strict=True, num_prompts=1, out=tmp_path
    )
    assert json.loads((path / "manifest.json").read_text())["fp32_ops"] == {}


def test_a_value_that_is_not_finite_is_an_error(published: Callable[..., Path], tmp_path: Path) -> None:
    broken = planted(published(), tmp_path / "broken", float("inf"))
    with pytest.raises(ExportError, match=rf"{CONV}.*expected finite values"):
        export_model(Checkpoint.open(broken), backends=["onnx"], num_prompts=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
