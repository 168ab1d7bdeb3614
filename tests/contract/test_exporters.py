"""What every exporter must hold, over every backend × graph layout × precision.

The artifacts are read by their own backend's tools: onnx and onnxruntime, openvino, coremltools.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflow import registry
from edgeflow.bundle import Bundle, Manifest
from edgeflow.checkpoint import Checkpoint
from edgeflow.components import Component, load_components, with_picture
from edgeflow.errors import ExportError
from edgeflow.export import LAYOUTS, PRECISIONS
from edgeflow.exporters.program import Program, build_program
from edgeflow.spec import PIPELINE, GraphSpec

for _package in ("onnx", "onnxruntime", "openvino", "coremltools"):
    pytest.importorskip(_package)

BACKENDS = tuple(name for name in registry.EXPORTERS if name != "cuda")  # which needs a GPU
CASES = [(b, layout, precision) for b in BACKENDS for layout in LAYOUTS for precision in PRECISIONS]
#: The lowering gap's gates.
SQNR_DB = {"fp32": 60.0, "fp16": 40.0}
#: name, shape, dtype of one input or output, as the artifact itself says
Port = tuple[str, tuple[int, ...], str]
#: What the ecosystem's clients look for: folder or package → inputs, output. Sources: diffusers'
#: pipeline_onnx_stable_diffusion.py, optimum's and optimum-intel's exporters, Apple's Swift package.
_DIFFUSERS = {
    "text_encoder": (["input_ids"], "last_hidden_state"),
    "unet": (["sample", "timestep", "encoder_hidden_states"], "out_sample"),
    "vae_decoder": (["latent_sample"], "sample"),
}
CLIENTS = {
    "onnx": {f"{k}/model.onnx": v for k, v in _DIFFUSERS.items()},
    "openvino": {f"{k}/openvino_model.xml": v for k, v in _DIFFUSERS.items()},
    "coreml": {
        "TextEncoder.mlpackage": (["input_ids"], "last_hidden_state"),
        "Unet.mlpackage": (["sample", "timestep", "encoder_hidden_states"], "noise_pred"),
        "VAEDecoder.mlpackage": (["z"], "image"),
    },
}


def sqnr_db(reference: np.ndarray, got: np.ndarray) -> float:
    signal, error = reference.astype(np.float64), reference.astype(np.float64) - got
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(error).sum(), 1e-300)))


# --- reading artifacts with their own tools -------------------------------------------------------------


def onnx_ports(path: Path) -> tuple[list[Port], list[Port]]:
    import onnx

    def ports(values: Any) -> list[Port]:
        found = []
        for value in values:
            tensor = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            found.append((value.name, tuple(d.dim_value for d in tensor.shape.dim), str(dtype)))
        return found

    graph = onnx.load(path).graph
    return ports(graph.input), ports(graph.output)


def openvino_ports(path: Path) -> tuple[list[Port], list[Port]]:
    import openvino

    def ports(values: Any) -> list[Port]:
        return [
            (v.get_any_name(), tuple(v.get_shape()), np.dtype(v.get_element_type().to_dtype()).name)
            for v in values
        ]

    model = openvino.Core().read_model(path)
    return ports(model.inputs), ports(model.outputs)


def coreml_ports(path: Path) -> tuple[list[Port], list[Port]]:
    import coremltools as ct

    kinds = ct.proto.FeatureTypes_pb2.ArrayFeatureType
    names = {kinds.FLOAT32: "float32", kinds.INT32: "int32", kinds.FLOAT16: "float16"}

    def ports(values: Any) -> list[Port]:
        arrays = [(v.name, v.type.multiArrayType) for v in values]
        return [(name, tuple(a.shape), names[a.dataType]) for name, a in arrays]

    description = ct.models.utils.load_spec(str(path)).description
    return ports(description.input), ports(description.output)


PORTS = {"onnx": onnx_ports, "openvino": openvino_ports, "coreml": coreml_ports}


def run_onnx(path: Path, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))[0]


def run_openvino(path: Path, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(dict(feed))[0]


#: Core ML's numerics are held by the contract of the runtimes.
RUN = {"onnx": run_onnx, "openvino": run_openvino}


# --- fixtures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def components(checkpoint: Checkpoint) -> dict[str, Component]:
    return load_components(checkpoint)


@pytest.fixture(scope="module")
def pipeline_program(components: dict[str, Component]) -> Program:
    return build_program(components[PIPELINE])


@pytest.fixture(params=CASES, ids="-".join)
def bundle(request: pytest.FixtureRequest, bundles: Callable[[str], Path]) -> Bundle:
    backend, layout, precision = request.param
    return Bundle.open(bundles(backend) / f"{backend}-{layout}-{precision}")


def fresh_inputs(component: Component, seed: int) -> dict[str, np.ndarray]:
    """Inputs that no exporter has seen: random ids, noise at two scales, t = 1000."""
    draw = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for tensor in component.spec.inputs:
        if tensor.name == "input_ids":
            made[tensor.name] = draw.integers(0, 500, tensor.shape, np.int32)
        elif tensor.name == "timestep":
            made[tensor.name] = np.full(tensor.shape, 1000, np.float32)
        else:
            made[tensor.name] = draw.standard_normal(tensor.shape, np.float32) * (1 + seed)
    return made


# --- the contract ---------------------------------------------------------------------------------------


def test_graphs_are_what_the_manifest_says(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert tuple(g.name for g in manifest.graphs) == LAYOUTS[manifest.layout]
    for graph in manifest.graphs:
        inputs, outputs = PORTS[manifest.backend](bundle.root / graph.file)
        assert sorted(inputs) == sorted((t.key, t.shape, t.dtype) for t in graph.inputs)
        assert outputs == [(t.key, t.shape, t.dtype) for t in graph.outputs]


def test_shapes_are_the_models(bundle: Bundle) -> None:
    spec = bundle.generation
    shapes = {t.name: t.shape for g in bundle.manifest.graphs for t in (*g.inputs, *g.outputs)}
    assert shapes["input_ids"] == (1, spec.max_tokens)
    assert shapes["image"] == (1, 3, spec.picture_size, spec.picture_size)
    for name in {"noise", "sample", "velocity", "latent"} & set(shapes):
        assert shapes[name] == (1, *spec.latent_shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_components_carry_the_names_that_clients_look_for(
    backend: str, bundles: Callable[[str], Path]
) -> None:
    bundle = Bundle.open(bundles(backend) / f"{backend}-components-fp32")
    found = {g.file: ([t.key for t in g.inputs], g.outputs[0].key) for g in bundle.manifest.graphs}
    assert found == CLIENTS[backend]
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        assert (bundle.root / name).is_file()
    dtypes = {t.key: t.dtype for g in bundle.manifest.graphs for t in g.inputs}
    whole = ("int64", "int64") if backend == "openvino" else ("int32", "float32")
    assert (dtypes["input_ids"], dtypes["timestep"]) == whole
    for name in ("vocab.json", "merges.txt"):  # Apple's package looks for them beside the models
        assert (bundle.root / name).is_file() == (backend == "coreml")


def test_lowering_is_numerically_right(bundle: Bundle, components: dict[str, Component]) -> None:
    manifest = bundle.manifest
    if manifest.backend not in RUN:
        pytest.skip("held by the contract of the runtimes")
    for graph in manifest.graphs:
        component = components[graph.name]
        for seed in (0, 1):
            inputs = fresh_inputs(component, seed)
            expected = component.run(inputs)[graph.outputs[0].name]
            got = RUN[manifest.backend](
                bundle.root / graph.file, {t.key: inputs[t.name] for t in graph.inputs}
            )
            assert got.dtype == np.float32
            assert sqnr_db(expected, got) >= SQNR_DB[manifest.precision], graph.name


def test_precision_is_in_the_weights(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """fp16 halves what is stored; the names of parts are the checkpoint's, so the sizes can be held to it."""
    bits = {"fp32": 32, "fp16": 16}[bundle.manifest.precision]
    unet, text = checkpoint.num_parameters("unet"), checkpoint.num_parameters("text_encoder")
    stored = sum(
        entry.bytes
        for name, entry in bundle.manifest.files.items()
        if name.endswith(("model.onnx", "openvino_model.bin", "weight.bin"))
    )
    assert 0.85 * (unet + text) * bits / 8 < stored < 1.35 * (unet + text) * bits / 8


def test_nothing_of_the_machine_is_in_a_bundle(bundle: Bundle) -> None:
    told = [
        str(Path(__file__).parents[2]).encode(),
        b"site-packages",
        b'.py"',
        str(Path.home()).encode() + b"/",
    ]
    for path in bundle.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in told if word in content], path


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_repeat_in_another_process(
    backend: str, bundles: Callable[[str], Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Another process, another hash seed, without the jobs that came before: the same bytes."""
    code = (
        "import sys; from pathlib import Path\n"
        "from edgeflow.checkpoint import Checkpoint\n"
        "from edgeflow.export import export_model\n"
        "export_model(Checkpoint.open(sys.argv[1]), backends=[sys.argv[2]], precisions=['fp16'],\n"
        "             layouts=['components'], out=Path(sys.argv[3]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(checkpoint.root), backend, str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = f"{backend}-components-fp16"
    first, second = bundles(backend) / name, tmp_path / name
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert [f for f in files if (first / f).read_bytes() != (second / f).read_bytes()] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exporter_leaves_the_program_as_it_was(
    backend: str, pipeline_program: Program, tmp_path: Path
) -> None:
    def state() -> tuple[str, str]:
        digest = hashlib.sha256()
        for name, tensor in sorted(pipeline_program.exported.state_dict.items()):
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
        return pipeline_program.exported.graph_module.code, digest.hexdigest()

    before = state()
    registry.exporter(backend).lower(pipeline_program, tmp_path, precision="fp16", layout=PIPELINE)
    assert state() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layout_holds_only_its_own_graphs(backend: str, pipeline_program: Program, tmp_path: Path) -> None:
    exporter = registry.exporter(backend)
    for layout in ("components", "nonsense"):
        with pytest.raises(ValueError, match=layout):
            exporter.lower(pipeline_program, tmp_path, precision="fp32", layout=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", sorted(RUN))
def test_a_byte_picture(
    backend: str, precision: str, components: dict[str, Component], tmp_path: Path
) -> None:
    component = with_picture(components[PIPELINE], "uint8")
    graph = registry.exporter(backend).lower(
        build_program(component), tmp_path, precision=precision, layout=PIPELINE
    )
    assert PORTS[backend](tmp_path / graph.file)[1] == [("image", graph.outputs[0].shape, "uint8")]
    inputs = fresh_inputs(component, 0)
    got = RUN[backend](tmp_path / graph.file, {t.key: inputs[t.name] for t in graph.inputs})
    expected = np.rint(components[PIPELINE].run(inputs)["image"] * 255)
    assert got.dtype == np.uint8
    assert np.abs(expected - got).max() <= 1
    assert np.mean(expected == got) > (0.99 if precision == "fp32" else 0.9)


def test_a_core_ml_package_holds_what_its_manifest_lists(bundles: Callable[[str], Path]) -> None:
    package = bundles("coreml") / "coreml-pipeline-fp16" / "Pipeline.mlpackage"
    manifest = json.loads((package / "Manifest.json").read_text())
    listed = {item["path"] for item in manifest["itemInfoEntries"].values()}
    held = {p.relative_to(package / "Data").as_posix() for p in (package / "Data").rglob("*")}
    assert listed <= held and manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]
    assert sorted(p.name for p in package.iterdir()) == ["Data", "Manifest.json"]


def test_core_ml_has_no_byte_picture(components: dict[str, Component], tmp_path: Path) -> None:
    program = build_program(with_picture(components[PIPELINE], "uint8"))
    with pytest.raises(ExportError, match="no uint8"):
        registry.exporter("coreml").lower(program, tmp_path, precision="fp32", layout=PIPELINE)


def test_openvino_leaves_time_anchored(bundles: Callable[[str], Path]) -> None:
    """(t − 1000)·f as t·f − 1000·f would be angles of up to 1000 in float16, a quarter of a radian apart."""
    import openvino

    model = openvino.Core().read_model(
        bundles("openvino") / "openvino-components-fp16/unet/openvino_model.xml"
    )
    held = [op.data for op in model.get_ops() if op.get_type_name() == "Constant"]
    halves = [array for array in held if array.dtype == np.float16]
    assert [array.item() for array in halves if abs(array).max() > 100] == [-1000.0]  # and no array of them


def test_what_openvino_makes_of_the_onnx_graphs(
    bundles: Callable[[str], Path], components: dict[str, Component]
) -> None:
    """Plain ONNX: a second reader agrees with the first, also on the float16 graph."""
    inputs = fresh_inputs(components[PIPELINE], 3)
    expected = components[PIPELINE].run(inputs)["image"]
    for precision, floor in SQNR_DB.items():
        path = bundles("onnx") / f"onnx-pipeline-{precision}" / "pipeline/model.onnx"
        assert sqnr_db(expected, run_openvino(path, inputs)) >= floor


def test_a_float16_onnx_graph_computes_in_float16(bundles: Callable[[str], Path]) -> None:
    import onnx

    path = bundles("onnx") / "onnx-pipeline-fp16" / "pipeline/model.onnx"
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    stored = {i.name for i in graph.initializer}
    kinds = {v.name: v.type.tensor_type.elem_type for v in graph.value_info if v.name not in stored}
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]  # they sum in float32
    around = {name for node in norms for name in (*node.input, *node.output)}
    singles = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
    assert len(kinds) > 300 and len(norms) > 10 and singles <= around
    weights = [i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    for weight in weights:  # besides the norms' own: Resize's scales, float32 by standard
        assert weight.name in around or list(weight.dims) in ([4], [0]), weight.name


def test_a_manifest_says_where_it_comes_from(bundle: Bundle, checkpoint: Checkpoint) -> None:
    manifest: Manifest = bundle.manifest
    expected = dataclasses.asdict(checkpoint.generation)
    del expected["tokenizer_dir"]
    model = dict(manifest.model)
    assert model.pop("origin") == checkpoint.facts["origin"]
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()} == expected
    assert {"edgeflow", "torch", "diffusers", "transformers"} < set(manifest.versions)
    tool = {"onnx": "onnx", "openvino": "openvino", "coreml": "coremltools"}[manifest.backend]
    assert tool in manifest.versions
    graphs: tuple[GraphSpec, ...] = manifest.graphs
    # OpenVINO GenAI feeds int64 and nothing else; every other graph keeps to what small devices have.
    found = {t.name for g in graphs for t in g.inputs if t.dtype == "int64"}
    for_genai = (manifest.backend, manifest.layout) == ("openvino", "components")
    assert found == ({"input_ids", "timestep"} if for_genai else set())


def test_the_reference_is_the_eager_components(bundle: Bundle, components: dict[str, Component]) -> None:
    import torch

    from edgeflow.tokenizer import ClipTokenizer

    reference, spec = bundle.reference(), bundle.generation
    assert {key.split("/")[0] for key in reference} == {f"prompt{i}" for i in range(len(spec.prompts[:4]))}
    for i, prompt in enumerate(spec.prompts[:4]):
        ids, noise = reference[f"prompt{i}/input_ids"], reference[f"prompt{i}/noise"]
        assert np.array_equal(ids, ClipTokenizer.from_folder(spec.tokenizer_dir).encode(prompt))
        drawn = torch.randn(1, *spec.latent_shape, generator=torch.Generator("cpu").manual_seed(i))
        assert np.array_equal(noise, drawn.numpy())
        picture = components[PIPELINE].run({"input_ids": ids, "noise": noise})["image"]
        np.testing.assert_allclose(reference[f"prompt{i}/pipeline/image"], picture, atol=1e-6)
        decoded = reference[f"prompt{i}/decoder/image"]
        np.testing.assert_allclose((decoded / 2 + 0.5).clip(0, 1), picture, atol=1e-5)


def test_diffusers_own_onnx_model_runs_the_components(
    bundles: Callable[[str], Path], components: dict[str, Component]
) -> None:
    """The client itself: diffusers' OnnxRuntimeModel finds the files and takes the names."""
    from diffusers import OnnxRuntimeModel

    root = bundles("onnx") / "onnx-components-fp16"
    hidden = fresh_inputs(components["unet"], 0)
    for folder, graph, names in (
        ("text_encoder", "text_encoder", {}),
        ("unet", "unet", {}),
        ("vae_decoder", "decoder", {"latent": "latent_sample"}),
    ):
        model = OnnxRuntimeModel.from_pretrained(
            root / folder, provider="CPUExecutionProvider", provider_options={}
        )
        inputs = hidden if graph == "unet" else fresh_inputs(components[graph], 0)
        got = model(**{names.get(k, k): v for k, v in inputs.items()})[0]
        (expected,) = components[graph].run(inputs).values()
        assert sqnr_db(expected, got) >= SQNR_DB["fp16"]


def test_many_weights_lie_in_one_file_beside_the_onnx_graph(
    components: dict[str, Component], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeflow.exporters import to_onnx

    monkeypatch.setattr(to_onnx, "INLINE_BYTES", 10_000)
    graph = registry.exporter("onnx").lower(
        build_program(components["decoder"]), tmp_path, precision="fp32", layout="components"
    )
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["vae_decoder/model.onnx", "vae_decoder/model.onnx.data"]
    assert (tmp_path / files[0]).stat().st_size < (tmp_path / files[1]).stat().st_size
    (tmp_path / "vae_decoder").rename(tmp_path / "moved")
    inputs = fresh_inputs(components["decoder"], 0)
    got = run_onnx(tmp_path / "moved/model.onnx", {t.key: inputs[t.name] for t in graph.inputs})
    assert sqnr_db(components["decoder"].run(inputs)["image"], got) >= SQNR_DB["fp32"]
