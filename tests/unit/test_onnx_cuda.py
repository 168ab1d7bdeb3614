"""ONNX Runtime on CUDA as far as a CPU can tell: what a session is told, and runs through IO binding.

Whether a GPU draws the same stands behind ``gpu``.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from edgeflow.bundle import Bundle, Manifest  # noqa: E402
from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.cli import main  # noqa: E402
from edgeflow.errors import DeviceMissing, RuntimeFailure  # noqa: E402
from edgeflow.generate import Generator, run_pipeline  # noqa: E402
from edgeflow.metrics import sqnr_db  # noqa: E402
from edgeflow.runtimes import onnx_runtime  # noqa: E402
from edgeflow.runtimes.onnx_runtime import CPU, CUDA, OnnxCuda, OnnxRuntime, provider_options  # noqa: E402
from edgeflow.spec import GraphSpec, TensorSpec  # noqa: E402

NEEDS_GPU = pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="needs onnxruntime-gpu")


def a_manifest(precision: str, recipe: dict[str, Any] | None = None) -> Manifest:
    return Manifest("onnx", precision, "pipeline", {}, recipe, (), {}, {})


def test_what_cuda_is_told_is_of_the_graphs_precision() -> None:
    """Only where TF32 is left out can cuDNN run short of kernels, and DEFAULT is the search that cannot."""
    single, half = (provider_options(CUDA, a_manifest(p), capture=False) for p in ("fp32", "fp16"))
    assert (single["use_tf32"], single["cudnn_conv_algo_search"]) == ("0", "DEFAULT")
    assert half["use_tf32"] == "1" and half["prefer_nhwc"] == "1"
    quantized = provider_options(CUDA, a_manifest("fp16", {"name": "w8"}), capture=False)
    assert quantized == {name: value for name, value in half.items() if name != "prefer_nhwc"}
    captured = provider_options(CUDA, a_manifest("fp16"), capture=True)
    assert captured["enable_cuda_graph"] == "1" and captured.items() > half.items()
    assert all(provider_options(CPU, a_manifest(p), capture=True) == {} for p in ("fp32", "fp16"))
    assert all(isinstance(value, str) for value in (captured | single).values())  # the API takes nothing else


@pytest.fixture(scope="module")
def affine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphSpec]:
    """y = x·2 + b over float32 (2, 3), b int64 (3,)."""
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["b"], ["c"], to=types.FLOAT),
        helper.make_node("Add", ["x", "x"], ["d"]),
        helper.make_node("Add", ["c", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "affine",
        [
            helper.make_tensor_value_info("x", types.FLOAT, [2, 3]),
            helper.make_tensor_value_info("b", types.INT64, [3]),
        ],
        [helper.make_tensor_value_info("y", types.FLOAT, [2, 3])],
    )
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    inputs = (TensorSpec("x", (2, 3), "float32", "x"), TensorSpec("b", (3,), "int64", "b"))
    return path, GraphSpec("affine", "model.onnx", inputs, (TensorSpec("y", (2, 3), "float32", "y"),))


def test_a_bound_session_computes_and_overwrites_nothing(affine: tuple[Path, GraphSpec]) -> None:
    path, spec = affine
    session = ort.InferenceSession(str(path), providers=[CPU])
    plain, bound = (OnnxRuntime({"affine": spec}, {"affine": session}, to) for to in (None, "cpu"))
    x, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2, 3])
    first = bound.run("affine", {"x": x, "b": b})["y"]
    np.testing.assert_array_equal(first, 2 * x + b)
    np.testing.assert_array_equal(first, plain.run("affine", {"x": x, "b": b})["y"])
    other = bound.run("affine", {"x": -x, "b": b})["y"]
    np.testing.assert_array_equal(first, 2 * x + b)
    np.testing.assert_array_equal(other, -2 * x + b)


def test_capture_reaches_every_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for a GPU build: what each session is made with, and where it is bound."""
    made, bound = [], []

    def session(path: str, options: object, providers: object, **more: object) -> SimpleNamespace:
        made.append(providers)
        ports = [SimpleNamespace(name=n) for n in ("x", "y")]
        return SimpleNamespace(
            get_inputs=lambda: ports[:1],
            get_outputs=lambda: ports[1:],
            get_providers=lambda: [CUDA, CPU],
            disable_fallback=lambda: None,
        )

    monkeypatch.setattr(onnx_runtime.ort, "InferenceSession", session)
    monkeypatch.setattr(onnx_runtime, "_Bound", lambda s, graph, device: bound.append((graph.name, device)))
    monkeypatch.setattr(onnx_runtime, "_default_providers", lambda: [CUDA, CPU])
    tensor = TensorSpec("x", (1,), "float32", "x")
    graphs = tuple(
        GraphSpec(n, f"{n}.onnx", (tensor,), (TensorSpec("y", (1,), "float32", "y"),)) for n in ("a", "b")
    )
    bundle = Bundle(tmp_path, Manifest("onnx", "fp16", "components", {}, None, graphs, {}, {}))
    assert OnnxCuda.load(bundle).device == "cuda"
    assert made == [[(CUDA, provider_options(CUDA, bundle.manifest, capture=True))]] * 2
    assert bound == [("a", "cuda"), ("b", "cuda")]


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="tells what happens without CUDA")
def test_without_cuda_it_is_said(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path, Manifest("onnx", "fp16", "pipeline", {}, None, (), {}, {}))
    with pytest.raises(DeviceMissing, match=r"runtime onnx-cuda: expected CUDAExecutionProvider") as caught:
        OnnxCuda.load(bundle)
    assert caught.value.exit_code == 4


# --- on the chip ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(("precision", "floor_db"), [("fp32", 90.0), ("fp16", 40.0)])
@pytest.mark.parametrize("layout", ["pipeline", "components"])
def test_captured_pictures_are_the_cpus(
    tiny_checkpoint: Path, tmp_path: Path, layout: str, precision: str, floor_db: float
) -> None:
    """Every node on CUDA and captured, or the session would be refused; TF32 would leave some 60 dB."""
    args = ["--to", "onnx", "--precision", precision, "--graph", layout, "--no-parity", "-o", str(tmp_path)]
    assert main(["export", str(tiny_checkpoint), *args]) == 0
    expect_the_cpus(Bundle.open(tmp_path / f"onnx-{layout}-{precision}"), floor_db)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("recipe", ["w8", "w4g32", "w8a8"])
def test_captured_pictures_of_integers_are_the_cpus(
    tiny_checkpoint: Path, tmp_path: Path, recipe: str
) -> None:
    model, captions = tmp_path / "model", tmp_path / "captions.txt"
    prompts = Checkpoint.open(tiny_checkpoint).generation.prompts
    captions.write_text("\n".join(f"{prompt} {i}" for prompt in prompts for i in range(16)))
    calibration = ["--calibration", str(captions)] if recipe == "w8a8" else []
    assert main(["quantize", str(tiny_checkpoint), "--recipe", recipe, *calibration, "-o", str(model)]) == 0
    args = ["--to", "onnx", "--precision", "fp16", "--no-parity", "-o", str(tmp_path)]
    assert main(["export", str(model), *args]) == 0
    # Activations near the middle of two steps fall to either side.
    expect_the_cpus(Bundle.open(tmp_path / "onnx-pipeline-fp16"), 20.0 if recipe == "w8a8" else 40.0)


def expect_the_cpus(bundle: Bundle, floor_db: float) -> None:
    """Captured on CUDA alone, the bundle draws what it draws on the CPU."""
    expected, runtime = OnnxRuntime.load(bundle, (CPU,)), OnnxCuda.load(bundle)
    assert all(providers[0] == CUDA for providers in runtime.providers.values())
    assert (expected.device, runtime.device) == ("cpu", "cuda")
    fused = bundle.manifest.layout == "pipeline"
    for prompt in (0, 1, 0):
        ids, noise = Generator(bundle, runtime).inputs(bundle.generation.prompts[prompt], prompt)
        drawn = [run_pipeline(r, bundle.generation, ids, noise, fused=fused) for r in (expected, runtime)]
        assert sqnr_db(drawn[0], drawn[1]) >= floor_db


@pytest.mark.gpu
@NEEDS_GPU
def test_what_cuda_cannot_run_is_an_error_and_not_the_cpus(tmp_path: Path) -> None:
    """Determinants have no kernel on CUDA."""
    types, tensor = onnx.TensorProto, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Det", ["x"], ["y"])],
        "determinant",
        [tensor("x", types.FLOAT, [1, 2, 2])],
        [tensor("y", types.FLOAT, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    x, y = TensorSpec("x", (1, 2, 2), "float32", "x"), TensorSpec("y", (1,), "float32", "y")
    spec = GraphSpec("determinant", "model.onnx", (x,), (y,))
    bundle = Bundle(tmp_path, Manifest("onnx", "fp32", "components", {}, None, (spec,), {}, {}))
    with pytest.raises(RuntimeFailure, match=r"runtime onnx: .*model\.onnx"):
        OnnxCuda.load(bundle)
