"""What every runtime must hold, over every backend × graph layout × precision that the exporters write."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflow import registry
from edgeflow.bundle import Bundle, Manifest
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import RuntimeFailure
from edgeflow.export import LAYOUTS, PRECISIONS
from edgeflow.registry import Runtime
from edgeflow.runtimes import checks
from edgeflow.spec import COMPONENTS, PIPELINE, GraphSpec, TensorSpec

for _package, _ in registry.REQUIRES.values():
    pytest.importorskip(_package)

#: Runtimes that take a bundle: those with an exporter of the same name.
#: cuda needs the chip: tests/unit/test_cuda_runtime.py.
BACKENDS = [name for name in registry.RUNTIMES if name in registry.EXPORTERS and name != "cuda"]
CASES = [(b, layout, precision) for b in BACKENDS for layout in LAYOUTS for precision in PRECISIONS]
#: The lowering gap's gates.
SQNR_DB = {"fp32": 60.0, "fp16": 40.0}
Arrays = dict[str, np.ndarray]


def sqnr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """10·log10 of signal power over error power."""
    signal, error = reference.astype(np.float64), reference.astype(np.float64) - got
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(error).sum(), 1e-300)))


@pytest.fixture(scope="session")
def torch_reference(checkpoint: Checkpoint) -> Runtime:
    return registry.runtime("torch").load(checkpoint)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def bundle(request: pytest.FixtureRequest, bundles: Callable[[str], Path]) -> Bundle:
    backend, layout, precision = request.param
    return Bundle.open(bundles(backend) / f"{backend}-{layout}-{precision}")


@pytest.fixture(scope="module")
def loaded(bundle: Bundle) -> Runtime:
    return registry.runtime(bundle.manifest.backend).load(bundle)


@pytest.fixture(params=BACKENDS)
def own_bundle(request: pytest.FixtureRequest, bundles: Callable[[str], Path], tmp_path: Path) -> Bundle:
    """A pipeline bundle that a test may spoil after it has been verified."""
    backend = request.param
    folder = tmp_path / "bundle"
    shutil.copytree(bundles(backend) / f"{backend}-pipeline-fp32", folder)
    return Bundle.open(folder)


def inputs_of(bundle: Bundle, graph: str, prompt: int = 0) -> Arrays:
    """The bundle's own reference inputs of a graph."""
    reference = bundle.reference()
    ids, noise = (reference[f"prompt{prompt}/{name}"] for name in ("input_ids", "noise"))
    return {
        PIPELINE: {"input_ids": ids, "noise": noise},
        "text_encoder": {"input_ids": ids},
        "unet": {
            "sample": noise,
            "timestep": np.array([bundle.generation.timestep], np.float32),
            "encoder_hidden_states": reference[f"prompt{prompt}/text_encoder/last_hidden_state"],
        },
        "decoder": {"latent": reference[f"prompt{prompt}/decoder/latent"]},
    }[graph]


def graphs_of(bundle: Bundle) -> tuple[str, ...]:
    return tuple(g.name for g in bundle.manifest.graphs)


# --- every runtime that takes a bundle ------------------------------------------------------------------


def test_every_layout_holds_its_graphs(bundle: Bundle) -> None:
    assert graphs_of(bundle) == ((PIPELINE,) if bundle.manifest.layout == PIPELINE else COMPONENTS)


@pytest.mark.parametrize("prompt", [0, 1])
def test_agrees_with_torch(bundle: Bundle, loaded: Runtime, torch_reference: Runtime, prompt: int) -> None:
    """Against the untouched diffusers and transformers modules, on real prompts and the same noise."""
    for graph in graphs_of(bundle):
        inputs = inputs_of(bundle, graph, prompt)
        (name, expected), *rest = torch_reference.run(graph, inputs).items()
        assert not rest
        got = loaded.run(graph, inputs)
        assert set(got) == {name}
        assert got[name].shape == expected.shape
        assert got[name].dtype == np.dtype(bundle.graph(graph).outputs[0].dtype)
        # Pictures of random weights are nearly grey: without their mean only what was drawn is compared.
        mean = expected.mean()
        assert sqnr_db(expected - mean, got[name] - mean) >= SQNR_DB[bundle.manifest.precision], graph


def test_same_inputs_give_equal_outputs_and_others_do_not(bundle: Bundle, loaded: Runtime) -> None:
    for graph in graphs_of(bundle):
        first = loaded.run(graph, inputs_of(bundle, graph, 0))
        kept = {name: array.copy() for name, array in first.items()}
        other = loaded.run(graph, inputs_of(bundle, graph, 1))
        again = loaded.run(graph, inputs_of(bundle, graph, 0))
        for name in kept:
            np.testing.assert_array_equal(first[name], kept[name], err_msg="a later run overwrote it")
            np.testing.assert_array_equal(again[name], kept[name])
            assert not np.array_equal(other[name], kept[name])


def test_inputs_are_not_changed(bundle: Bundle, loaded: Runtime) -> None:
    for graph in graphs_of(bundle):
        inputs = inputs_of(bundle, graph)
        before = {name: array.copy() for name, array in inputs.items()}
        loaded.run(graph, inputs)
        for name, array in inputs.items():
            np.testing.assert_array_equal(array, before[name])


def test_inputs_are_cast_to_what_the_artifact_wants(bundle: Bundle, loaded: Runtime) -> None:
    for graph in graphs_of(bundle):
        inputs = inputs_of(bundle, graph)
        wide = {n: a.astype(np.int64 if a.dtype.kind == "i" else np.float64) for n, a in inputs.items()}
        narrow = {n: a.astype(np.int32 if a.dtype.kind == "i" else np.float32) for n, a in inputs.items()}
        for name, array in loaded.run(graph, wide).items():
            np.testing.assert_array_equal(array, loaded.run(graph, narrow)[name])


def test_misuse_is_a_value_error(bundle: Bundle, loaded: Runtime) -> None:
    with pytest.raises(ValueError, match=r"graph 'nose' is not loaded; known: \w+"):
        loaded.run("nose", {})
    for graph in graphs_of(bundle):
        inputs = inputs_of(bundle, graph)
        name = next(iter(inputs))
        with pytest.raises(ValueError, match=rf"missing \['{name}'\]"):
            loaded.run(graph, {k: v for k, v in inputs.items() if k != name})
        with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
            loaded.run(graph, {**inputs, "extra": np.zeros(1, np.float32)})
        with pytest.raises(ValueError, match=rf"input {name}: expected shape \(1, .*\), got \(2, "):
            loaded.run(graph, {**inputs, name: np.concatenate([inputs[name]] * 2)})
        if "input_ids" in inputs:
            with pytest.raises(ValueError, match=r"input input_ids: expected int.*, got float32"):
                loaded.run(graph, {**inputs, "input_ids": inputs["input_ids"].astype(np.float32)})


def test_a_broken_artifact_is_one_sentence(own_bundle: Bundle) -> None:
    """Half of the largest file of the graph: what opening would have caught, had it changed before."""
    stem = Path(own_bundle.manifest.graphs[0].file).parts[0].split(".")[0]
    files = [n for n in own_bundle.manifest.files if n.split("/")[0].split(".")[0] == stem]
    path = own_bundle.root / max(files, key=lambda n: own_bundle.manifest.files[n].bytes)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RuntimeFailure) as caught:
        registry.runtime(own_bundle.manifest.backend).load(own_bundle)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_promises_other_tensors(own_bundle: Bundle) -> None:
    graph = own_bundle.manifest.graphs[0]
    for field, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        renamed = (dataclasses.replace(tensors[0], key="nobody"), *tensors[1:])
        manifest = dataclasses.replace(
            own_bundle.manifest, graphs=(dataclasses.replace(graph, **{field: renamed}),)
        )
        spoilt = Bundle(own_bundle.root, manifest)
        with pytest.raises(RuntimeFailure, match=rf"expected {field} \[.*'nobody'.*\], got \["):
            registry.runtime(manifest.backend).load(spoilt)


@pytest.mark.parametrize("name", BACKENDS)
def test_another_backends_bundle_and_a_checkpoint_are_refused(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = next(b for b in BACKENDS if b != name)
    foreign = Bundle(tmp_path, Manifest(other, "fp32", PIPELINE, {}, None, (), {}, {}))
    runtime = registry.runtime(name)
    with pytest.raises(RuntimeFailure, match=f"expected a bundle of the backend {name}, got one of {other}"):
        runtime.load(foreign)
    with pytest.raises(RuntimeFailure, match="expected an exported bundle, got a checkpoint"):
        runtime.load(checkpoint)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_drawing_pulls_in_no_torch(name: str, bundles: Callable[[str], Path]) -> None:
    code = f"""
import sys
import numpy as np
from edgeflow.bundle import Bundle
from edgeflow.registry import runtime
bundle = Bundle.open({str(bundles(name) / f"{name}-pipeline-fp32")!r})
reference = bundle.reference()
inputs = {{n: reference["prompt0/" + n] for n in ("input_ids", "noise")}}
image = runtime({name!r}).load(bundle).run("pipeline", inputs)["image"]
assert np.abs(image - reference["prompt0/pipeline/image"]).max() < 1e-3
heavy = {{"torch", "diffusers", "transformers", "onnx", "coremltools"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the reference --------------------------------------------------------------------------------------


def test_the_reference_is_diffusers_own(checkpoint: Checkpoint, torch_reference: Runtime) -> None:
    """The picture of the untouched parts, put together here by the definition of one step."""
    import torch

    from edgeflow.training.models import load_parts

    parts = load_parts(checkpoint.root)
    ids = torch.randint(0, 500, (1, checkpoint.generation.max_tokens), generator=torch.manual_seed(3))
    noise = torch.randn(1, *checkpoint.generation.latent_shape, generator=torch.manual_seed(4))
    with torch.no_grad():
        text = parts.text_encoder(ids).last_hidden_state
        latent = noise + parts.unet(noise, 1000.0, encoder_hidden_states=text).sample
        image = parts.vae.decode(latent / checkpoint.latent_scale).sample.add(1).div(2).clamp(0, 1)
    got = torch_reference.run(PIPELINE, {"input_ids": ids.numpy(), "noise": noise.numpy()})["image"]
    np.testing.assert_allclose(got, image.numpy(), atol=1e-5)


def test_the_reference_refuses_what_it_cannot_draw(
    checkpoint: Checkpoint, torch_reference: Runtime, tmp_path: Path
) -> None:
    runtime = registry.runtime("torch")
    bundle = Bundle(tmp_path, Manifest("onnx", "fp32", PIPELINE, {}, None, (), {}, {}))
    with pytest.raises(RuntimeFailure, match="expected a checkpoint, got a bundle"):
        runtime.load(bundle)
    slow = dataclasses.replace(checkpoint, facts={**checkpoint.facts, "kind": "diffusion", "steps": 25})
    with pytest.raises(RuntimeFailure, match="expected a one-step model, got kind 'diffusion'"):
        runtime.load(slow)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not loaded"):
        torch_reference.run("nose", {})
    with pytest.raises(ValueError, match="missing"):
        torch_reference.run(PIPELINE, {})


# --- the parts they share -------------------------------------------------------------------------------


def test_onnx_says_what_it_runs_on(bundles: Callable[[str], Path]) -> None:
    runtime = registry.runtime("onnx")
    bundle = Bundle.open(bundles("onnx") / "onnx-pipeline-fp32")
    cpu: Any = runtime.load(bundle, providers=["CPUExecutionProvider"])  # type: ignore[call-arg]
    assert cpu.providers == {PIPELINE: ("CPUExecutionProvider",)}


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnx_does_not_fall_back_from_a_provider_asked_for(bundles: Callable[[str], Path]) -> None:
    import onnxruntime

    absent = {"CUDAExecutionProvider", "ROCMExecutionProvider"} - set(onnxruntime.get_available_providers())
    name = min(absent)
    bundle = Bundle.open(bundles("onnx") / "onnx-pipeline-fp32")
    with pytest.raises(RuntimeFailure, match=name):
        registry.runtime("onnx").load(bundle, providers=[name])  # type: ignore[call-arg]


def test_an_output_of_another_shape_is_a_failure() -> None:
    graph = GraphSpec("decoder", "d", (), (TensorSpec("image", (1, 3), "float32", "sample"),))
    assert set(checks.collect("x", graph, {"sample": np.zeros((1, 3))})) == {"image"}
    with pytest.raises(RuntimeFailure, match=r"output image: expected shape \(1, 3\), got \(1, 4\)"):
        checks.collect("x", graph, {"sample": np.zeros((1, 4))})


def test_threads_stay_within_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = checks.num_threads()
    assert free >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert checks.num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", str(free + 7))
    assert checks.num_threads() == free
