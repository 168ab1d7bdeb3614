"""The CUDA runtime's logic on a CPU: assembly, choices, checks. What needs the chip stands behind ``gpu``."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from edgeflow import aot_package, gpu_device, measure_child, registry  # noqa: E402
from edgeflow.bundle import Bundle, Manifest  # noqa: E402
from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.cli import main  # noqa: E402
from edgeflow.errors import DeviceMissing, RuntimeFailure  # noqa: E402
from edgeflow.generate import Generator, run_pipeline, to_pixels  # noqa: E402
from edgeflow.gpu_device import AttentionShape  # noqa: E402
from edgeflow.gpu_rewrites import REWRITES  # noqa: E402
from edgeflow.metrics import psnr_db, sqnr_db  # noqa: E402
from edgeflow.runtimes import cuda_quantized  # noqa: E402
from edgeflow.runtimes.cuda_compile import CompiledCheckpoint, How  # noqa: E402
from edgeflow.runtimes.cuda_graph import Captured  # noqa: E402
from edgeflow.runtimes.cuda_reference import CudaBfloat16, CudaReference  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a CUDA device")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
#: A picture in bytes is rounded: 20·log10(255·√12) dB is the best it can do.
CASES = [("fp32", 55.0), ("fp16", 40.0), ("bf16", 30.0)]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Any:
    return registry.runtime("torch").load(checkpoint)  # type: ignore[arg-type]


def on_cpu(checkpoint: Checkpoint, precision: str = "fp32", **how: Any) -> CudaReference:
    return CudaReference.compiled(checkpoint, How(precision, "cpu", compile=False, **how), {})


def drawn(runtime: Any, checkpoint: Checkpoint, prompt: int) -> np.ndarray:
    generator = Generator(checkpoint, runtime)
    ids, noise = generator.inputs(checkpoint.generation.prompts[prompt], prompt)
    return to_pixels(run_pipeline(runtime, checkpoint.generation, ids, noise, fused=True))


# --- the graph ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "floor_db"), CASES)
def test_pictures_are_pytorchs(
    checkpoint: Checkpoint, reference: Any, precision: str, floor_db: float
) -> None:
    runtime = on_cpu(checkpoint, precision)
    for prompt in (0, 1):
        expected = drawn(reference, checkpoint, prompt)
        assert psnr_db(expected, drawn(runtime, checkpoint, prompt), 255.0) >= floor_db
    assert runtime.facts["precision"] == precision and runtime.facts["tail"] == "none"
    assert set(runtime.facts["rewrites"].replace(",", "").split()[::2]) == set(REWRITES)


def test_its_work_is_held_against_the_gpus_rate(checkpoint: Checkpoint) -> None:
    """``edgeflow bench`` asks a runtime where it computes."""
    assert measure_child._Timed(on_cpu(checkpoint)).device == CudaBfloat16.device == "cuda"


def test_a_checkpoint_has_every_graph(checkpoint: Checkpoint, reference: Any) -> None:
    runtime = on_cpu(checkpoint)
    example = {
        name: c.example for name, c in CompiledCheckpoint(checkpoint, How("fp32", "cpu")).components.items()
    }
    for graph in ("text_encoder", "unet", "decoder"):
        inputs = {name: tensor.numpy() for name, tensor in example[graph].items()}
        (expected,), (got,) = (r.run(graph, inputs).values() for r in (reference, runtime))
        assert got.dtype == np.float32 and sqnr_db(expected, got) > 80


def test_results_are_not_overwritten(checkpoint: Checkpoint) -> None:
    runtime = on_cpu(checkpoint)
    first = drawn(runtime, checkpoint, 0)
    kept = first.copy()
    other = drawn(runtime, checkpoint, 1)
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, other)


def test_a_captured_graph_keeps_its_weights_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph reads weights by address: were they freed, it would read whatever lies there next."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "CUDAGraph": lambda: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    layer = torch.nn.Linear(4, 4)
    weight = weakref.ref(layer.weight)
    captured = Captured(layer, [torch.zeros(1, 4)])
    del layer
    gc.collect()
    assert weight() is not None
    del captured
    gc.collect()
    assert weight() is None


def test_a_value_that_is_not_finite_is_refused(checkpoint: Checkpoint) -> None:
    made = CompiledCheckpoint(checkpoint, How("fp32", "cpu", compile=False))
    for tensor in made.components["decoder"].module.parameters():
        if tensor.dim() == 4:
            tensor.data.fill_(float("nan"))
    with pytest.raises(RuntimeFailure, match=r"graph pipeline: expected finite values in fp32"):
        made.build("pipeline")


@pytest.mark.slow  # a minute: Inductor compiles the whole pipeline to C++
def test_the_whole_path_compiles_as_one_graph(checkpoint: Checkpoint, reference: Any) -> None:
    """fullgraph: a break in the graph would be an error."""
    runtime = CudaReference.compiled(checkpoint, How("fp32", "cpu"), {})
    assert psnr_db(drawn(reference, checkpoint, 0), drawn(runtime, checkpoint, 0), 255.0) >= 55


# --- without a chip -------------------------------------------------------------------------------------


@NO_GPU
@pytest.mark.parametrize("name", ["cuda", "cuda-bf16"])
def test_without_a_device_it_is_exit_code_4(
    name: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    assert main(["generate", str(tiny_checkpoint), "cat", "--runtime", name, "-o", str(out)]) == 4
    assert "cuda: expected an NVIDIA GPU" in capsys.readouterr().err and not out.exists()


@NO_GPU
def test_exporting_without_a_device_is_exit_code_4(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundles"
    assert main(["export", str(tiny_checkpoint), "--to", "cuda", "-o", str(out)]) == 4
    assert "cuda: expected an NVIDIA GPU" in capsys.readouterr().err and not out.exists()


@NO_GPU
def test_a_cuda_bundle_says_what_is_missing(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path, Manifest("cuda", "fp16", "pipeline", {}, None, (), {}, {}))
    with pytest.raises(DeviceMissing, match="expected an NVIDIA GPU"):
        CudaReference.load(bundle)
    other = Bundle(tmp_path, Manifest("onnx", "fp16", "pipeline", {}, None, (), {}, {}))
    with pytest.raises(RuntimeFailure, match="expected a bundle of the backend cuda, got one of onnx"):
        CudaReference.load(other)


def test_the_variants_are_registered() -> None:
    assert registry.runtime("cuda") is CudaReference and registry.runtime("cuda-bf16") is CudaBfloat16
    assert (CudaReference.precision, CudaBfloat16.precision) == ("fp16", "bf16")


# --- the chip -------------------------------------------------------------------------------------------


def test_ampere_is_the_oldest() -> None:
    gpu_device.check_capability("A100", (8, 0))
    gpu_device.check_capability("B200", (10, 0))
    with pytest.raises(RuntimeFailure, match=r"T4: expected compute capability 8.0 .* got 7.5"):
        gpu_device.check_capability("T4", (7, 5))


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((8, 6), False)]
)
def test_float8_is_for_ada_and_later(capability: tuple[int, int], has: bool) -> None:
    assert gpu_device.Chip("a chip", capability, "2.13.0", "13.0", "9").has_fp8 is has


def test_float8_leaves_the_compilers_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao would have every kernel tuned by descent: minutes, for whatever is compiled later too."""
    from torch._inductor import config
    from torchao.quantization import Float8Tensor, quant_api

    chip = gpu_device.Chip("a chip", (9, 0), "2.13.0", "13.0", "9")
    monkeypatch.setattr(gpu_device, "require_chip", lambda: chip)
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    before = config.save_config()
    module = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 3)).to(torch.bfloat16)
    assert cuda_quantized.float8_linears(module) == 1  # 3 outputs do not fit
    assert [isinstance(layer.weight, Float8Tensor) for layer in module] == [True, False]
    assert config.save_config() == before


def test_every_attention_of_the_model_is_found(checkpoint: Checkpoint) -> None:
    made = CompiledCheckpoint(checkpoint, How("fp32", "cpu", compile=False))
    module, _ = made.assemble("pipeline")
    shapes = gpu_device.attention_shapes(module, made.example("pipeline"))
    causal = [s for s in shapes if s.causal]
    assert causal == [AttentionShape((1, 2, 16, 16), 16, False, True)] * 2  # two text layers, 16 tokens
    rest = [s for s in shapes if not s.causal]
    assert not any(s.masked for s in rest)
    # Not rewritten, the text's layers have a mask.
    plain = gpu_device.attention_shapes(made.components["pipeline"].module, made.example("pipeline"))
    assert [s for s in plain if s.masked] == [AttentionShape((1, 2, 16, 16), 16, True)] * 2
    assert rest and {s.keys for s in rest} <= {16, 64}  # tokens, and a latent of 8 × 8
    assert len(rest) == sum(type(m).__name__ == "Attention" for m in module.modules())


def test_the_fastest_attention_counts_every_call() -> None:
    small, large = AttentionShape((1, 1, 8, 8), 8, False), AttentionShape((1, 1, 64, 8), 64, False)
    clock = {("flash", 8): 1.0, ("cudnn", 8): 2.0, ("efficient", 8): 9.0}
    clock |= {("flash", 64): 6.0, ("cudnn", 64): 4.0, ("efficient", 64): 9.0}
    names = {order: name for name, order in gpu_device.ATTENTION.items()}

    def time_ms(order: Any, shape: AttentionShape, dtype: torch.dtype) -> float:
        return clock[names[tuple(order)], shape.keys]

    assert gpu_device.choose_attention([small, large], torch.float16, time_ms)[0] == "cudnn"
    best, total = gpu_device.choose_attention([small] * 3 + [large], torch.float16, time_ms)
    assert best == "flash" and total == {"flash": 9.0, "cudnn": 10.0, "efficient": 36.0}


# --- packages -------------------------------------------------------------------------------------------

MADE = {"device": "cuda", "compute capability": "9.0", "torch": "2.13.0", "cuda": "13.0"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("compute capability", "8.0"), ("torch", "2.11.0"), ("cuda", "12.8"), ("device", "cpu")],
)
def test_code_for_another_machine_is_refused(key: str, value: str) -> None:
    aot_package.check_made_for(MADE, dict(MADE), "a bundle")
    with pytest.raises(
        RuntimeFailure, match=rf"compiled for {key} {MADE[key]} \(here {value}\); export it again"
    ):
        aot_package.check_made_for(MADE, {**MADE, key: value}, "a bundle")


def test_every_difference_is_named_and_what_is_unknown_is_one() -> None:
    with pytest.raises(RuntimeFailure, match=r"torch 2.13.0 \(here 2.9.0\), cuda unknown \(here 13.0\)"):
        made = {k: v for k, v in MADE.items() if k != "cuda"}
        aot_package.check_made_for(made, {**MADE, "torch": "2.9.0"}, "x")


@pytest.mark.skipif(sys.platform != "linux", reason="libstdc++ is Linux's")
def test_code_is_loaded_where_it_finds_the_processs_libstdcpp_first() -> None:
    """Its symbols are in the global scope by then, where PyTorch alone leaves them out of it; and no compiler
    was imported for it."""
    lines = [
        "import ctypes, sys, torch",
        "from edgeflow import aot_package",
        "try: aot_package.load_code('absent.pt2')",
        "except RuntimeError: pass",
        "ctypes.CDLL(None)['_ZNSt7collateIcE2idE']",  # raises AttributeError for a symbol that is not there
        "assert not {'torch._dynamo', 'torch._inductor.codecache'} & set(sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_come_back_in_the_layout_of_the_code(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    plain, last = (
        torch.randn(3, 4, 5, 5),
        torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last),
    )
    given = {"a": plain, "b": last, "c": torch.randn(7).half(), "d": plain, "e": torch.arange(3)}
    aot_package.write_weights(path, given)
    back = aot_package.read_weights(path, "cpu")
    assert set(back) == set(given)
    for name, tensor in given.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype
        assert back[name].stride() == tensor.stride(), name
    with pytest.raises(ValueError, match="constant x: expected a contiguous or channels-last tensor"):
        aot_package.write_weights(path, {"x": torch.randn(4, 6).t()})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RuntimeFailure, match="the weights cannot be read"):
        aot_package.read_weights(path, "cpu")


def test_code_that_takes_its_process_with_it_is_one_sentence(tmp_path: Path) -> None:
    from edgeflow.exporters import to_cuda
    from edgeflow.spec import GraphSpec

    path = tmp_path / aot_package.CODE
    path.write_bytes(b"no archive")
    with pytest.raises(
        RuntimeFailure, match=r"^export: cuda: unet: loading the compiled code: its process ended with "
    ):
        to_cuda._asked_for(path, {}, GraphSpec("unet", "", (), ()))


@pytest.fixture(scope="module")
def packaged(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the CPU, whose packaging is the GPU's; its three graphs take Inductor a minute or two."""
    from edgeflow import export
    from edgeflow.exporters.to_cuda import CudaExporter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.registry, "exporter", lambda name: CudaExporter("cpu"))
        out = tmp_path_factory.mktemp("packages")
        (path,) = export.export_model(
            checkpoint, backends=["cuda"], precisions=["fp32"], picture="uint8", out=out
        )
    return path


@pytest.mark.slow  # AOTInductor compiles C++ for over a minute
def test_a_package_draws_pytorchs_picture_and_checks_itself(
    packaged: Path, checkpoint: Checkpoint, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(packaged)
    said: list[str] = []
    log = SimpleNamespace(debug=lambda text, *values: said.append(text % values))
    monkeypatch.setattr("edgeflow.runtimes.cuda_package._LOG", log)
    assert bundle.manifest.versions["device"] == "cpu"
    assert bundle.manifest.versions["torch"] == gpu_device.torch_release()
    runtime = CudaReference.packaged(bundle, {}, "cpu")
    parts = [re.sub(r"\d+\.\d\d s", "T s", line) for line in said]
    where = "runtime cuda: graph pipeline"
    assert parts == [f"{where}: weights read in T s", f"{where}: code loaded in T s"]
    for prompt in (0, 1):
        expected, got = drawn(reference, checkpoint, prompt), drawn(runtime, checkpoint, prompt)
        assert psnr_db(expected, got, 255.0) >= 55
    # The weights lie apart from the code: zeros in their file are a grey picture from the same code.
    weights = packaged / "pipeline" / aot_package.WEIGHTS
    tensors = aot_package.read_weights(weights, "cpu")
    assert sum(t.nbytes for t in tensors.values()) > 3e6 and len(tensors) > 100
    kept = weights.read_bytes()
    aot_package.write_weights(weights, {name: torch.zeros_like(t) for name, t in tensors.items()})
    picture = drawn(CudaReference.packaged(bundle, {}, "cpu"), checkpoint, 0)
    assert (
        len(np.unique(picture.reshape(-1, 3), axis=0)) == 1
    )  # one colour: a bias of three may be in the code
    aot_package.write_weights(weights, dict(list(tensors.items())[1:]))
    with pytest.raises(RuntimeFailure, match=r"expected the .* weights that the code asks for"):
        CudaReference.packaged(bundle, {}, "cpu")
    weights.write_bytes(kept)
    raw = json.loads((packaged / "manifest.json").read_text())
    raw["versions"]["torch"] = "2.0.0"
    other = Bundle(packaged, Manifest.from_json(json.dumps(raw), packaged))
    with pytest.raises(RuntimeFailure, match=r"compiled for torch 2.0.0 \(here "):
        CudaReference.packaged(other, {}, "cpu")
    raw["graphs"][0]["inputs"][0]["key"] = "nobody"
    raw["versions"]["torch"] = gpu_device.torch_release()
    other = Bundle(packaged, Manifest.from_json(json.dumps(raw), packaged))
    with pytest.raises(RuntimeFailure, match=r"expected inputs \[.*nobody.*\], got \["):
        CudaReference.packaged(other, {}, "cpu")


# --- on the chip ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("runtime", [CudaReference, CudaBfloat16])
def test_captured_pictures_are_pytorchs(checkpoint: Checkpoint, reference: Any, runtime: Any) -> None:
    loaded = runtime.load(checkpoint)
    for prompt in (0, 1, 0):
        expected, got = drawn(reference, checkpoint, prompt), drawn(loaded, checkpoint, prompt)
        assert psnr_db(expected, got, 255.0) >= dict(CASES)[runtime.precision]
    assert loaded.facts["attention"] in gpu_device.ATTENTION and loaded.facts["gpu"]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("layout", ["pipeline", "components"])
def test_an_exported_bundle_draws_on_the_gpu(
    tiny_checkpoint: Path, checkpoint: Checkpoint, reference: Any, tmp_path: Path, layout: str
) -> None:
    args = ["--to", "cuda", "--precision", "fp16", "--graph", layout, "-o", str(tmp_path / "b")]
    assert main(["export", str(tiny_checkpoint), *args]) == 0
    bundle = Bundle.open(tmp_path / "b" / f"cuda-{layout}-fp16")
    runtime = CudaReference.load(bundle)
    generator = Generator(bundle, runtime)
    ids, noise = generator.inputs(checkpoint.generation.prompts[0], 0)
    got = to_pixels(run_pipeline(runtime, bundle.generation, ids, noise, fused=layout == "pipeline"))
    assert psnr_db(drawn(reference, checkpoint, 0), got, 255.0) >= 40
