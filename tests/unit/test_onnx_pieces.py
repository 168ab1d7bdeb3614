"""ONNX graphs cut on the wire format: the same values, pieces within the limit, files that cannot be cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeflow.bundle import Bundle, inside  # noqa: E402
from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.errors import RuntimeFailure  # noqa: E402
from edgeflow.quantization.recipe import Recipe  # noqa: E402
from edgeflow.runtimes import onnx_runtime  # noqa: E402
from edgeflow.runtimes.onnx_file import read_graph  # noqa: E402
from edgeflow.runtimes.onnx_pieces import Pieces, float32_bytes  # noqa: E402
from edgeflow.runtimes.onnx_runtime import OnnxPieces, OnnxRuntime  # noqa: E402
from edgeflow.spec import COMPONENTS  # noqa: E402

FORMS = ("fp32", "fp16", "integers")
#: Bytes of float32 weights a piece: a few weights, or all.
SMALL, ALL = 1 << 18, 1 << 30


@pytest.fixture(scope="module")
def bundles(
    tiny_checkpoint: Path, int4_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Form → components; ``integers`` holds w4g32, and w8 where groups do not divide a layer."""
    from edgeflow.export import export_model
    from edgeflow.quantization.apply import quantize_checkpoint

    folder = tmp_path_factory.mktemp("pieces")
    checkpoint = Checkpoint.open(tiny_checkpoint)
    quantize_checkpoint(checkpoint, int4_recipe, folder / "model")
    asked: dict[str, Any] = {"backends": ["onnx"], "layouts": ["components"], "num_prompts": 1}
    floats = export_model(checkpoint, precisions=["fp32", "fp16"], out=folder / "floats", **asked)
    integers = export_model(Checkpoint.open(folder / "model"), out=folder / "integers", **asked)
    return dict(zip(FORMS, map(Bundle.open, [*floats, *integers]), strict=True))


def inputs_of(bundle: Bundle, graph: str) -> dict[str, Any]:
    reference = {key.removeprefix("prompt0/"): array for key, array in bundle.reference().items()}
    return {
        "text_encoder": {"input_ids": reference["input_ids"]},
        "unet": {
            "sample": reference["noise"],
            "timestep": np.array([1000.0], np.float32),
            "encoder_hidden_states": reference["text_encoder/last_hidden_state"],
        },
        "decoder": {"latent": reference.get("decoder/latent")},
    }[graph]


def plain(model: str | bytes) -> ort.InferenceSession:
    """A session that fuses nothing: what is fused across a cut rounds otherwise in its last bit."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def rounded_where_cut(path: Path, cuts: Pieces) -> bytes:
    """The whole graph in which a value that a later piece takes is stored on the way, in the file's own type.

    Without, ONNX Runtime leaves float16 values float32 from one operation to the next, and around a single
    operation that could take halves as well.
    """
    model = onnx.load(path)
    places = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
    first = [cuts._places[piece.start] for piece in cuts.pieces]
    for piece, start in list(zip(cuts.pieces, [*first[1:], None], strict=True))[-2::-1]:
        for name in sorted(set(piece.gives), key=places.__getitem__):
            for node in model.graph.node[start:]:
                for i, taken in enumerate(node.input):
                    node.input[i] = f"{name} stored" if taken == name else taken
    stored = {name for piece in cuts.pieces[:-1] for name in piece.gives}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for name in stored.intersection(node.output):
            nodes.append(helper.make_node("Identity", [name], [f"{name} as it is"]))
            nodes.append(helper.make_node("Identity", [f"{name} as it is"], [f"{name} stored"]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("graph", COMPONENTS)
@pytest.mark.parametrize("form", FORMS)
def test_values_are_the_whole_graphs_bit_for_bit(form: str, graph: str, bundles: dict[str, Bundle]) -> None:
    bundle = bundles[form]
    spec = bundle.graph(graph)
    path = inside(bundle.root, spec.file)
    feeds = onnx_runtime.checks.feed(spec, inputs_of(bundle, graph))
    counts = []
    for largest in (float32_bytes(read_graph(path)) // 6, ALL):
        cuts = Pieces(path, read_graph(path), plain, largest)
        (found,) = cuts.run(feeds).values()
        (whole,) = plain(rounded_where_cut(path, cuts)).run(None, feeds)
        np.testing.assert_array_equal(found, whole)
        counts.append(len(cuts.pieces))
    assert counts[0] > 2 and counts[1] == 1


def test_the_integers_are_of_both_schemes(bundles: dict[str, Bundle]) -> None:
    path = inside(bundles["integers"].root, bundles["integers"].graph("unet").file)
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert {TensorProto.INT4, TensorProto.INT8} <= types


@pytest.mark.parametrize("graph", COMPONENTS)
@pytest.mark.parametrize(("form", "close"), [("fp32", 1e-5), ("fp16", 2e-3), ("integers", 1e-5)])
def test_with_the_runtimes_own_options_values_are_as_close_as_its_arithmetic(
    form: str, close: float, graph: str, bundles: dict[str, Bundle]
) -> None:
    """Of float16 a rounding is 2**-11 of a value, and every cut adds one."""
    bundle = bundles[form]
    inputs = inputs_of(bundle, graph)
    whole = OnnxRuntime.load_one(bundle, graph)
    assert isinstance(whole, OnnxRuntime)
    (expected,) = whole.run(graph, inputs).values()
    (found,) = OnnxPieces(bundle, bundle.graph(graph), SMALL).run(graph, inputs).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=close * np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
def test_pieces_keep_to_the_limit_and_to_the_files_own_weights(form: str, bundles: dict[str, Bundle]) -> None:
    """Counted by the package onnx in the very models that are opened; one operation may hold more."""
    bundle = bundles[form]
    path = inside(bundle.root, bundle.graph("unet").file)
    opened: list[bytes] = []

    def noted(model: bytes) -> ort.InferenceSession:
        opened.append(model)
        return plain(model)

    feeds = onnx_runtime.checks.feed(bundle.graph("unet"), inputs_of(bundle, "unet"))
    cuts = Pieces(path, read_graph(path), noted, SMALL)
    cuts.run(feeds)
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    seen = set()
    for piece, model in zip(cuts.pieces, map(onnx.load_from_string, opened), strict=True):
        weights = list(model.graph.initializer)
        assert all(tensor == stored[tensor.name] for tensor in weights)
        held = sum(4 * int(np.prod(tensor.dims)) for tensor in weights)
        assert held <= SMALL or piece.end - piece.start == 1
        seen |= {tensor.name for tensor in weights}
    assert seen == set(stored) and len(opened) > 3
    assert float32_bytes(read_graph(path)) == sum(4 * int(np.prod(t.dims)) for t in stored.values())


def test_less_crosses_than_where_pieces_are_just_full(bundles: dict[str, Bundle]) -> None:
    path = inside(bundles["fp32"].root, bundles["fp32"].graph("unet").file)
    graph = read_graph(path)
    whole = Pieces(path, graph, plain, SMALL)
    steps = whole._steps()
    ends: list[int] = []
    held: dict[Any, int] = {}
    for i, step in enumerate(steps):
        if sum((held | dict(step.weights)).values()) > SMALL and held:
            ends, held = [*ends, i], {}
        held |= step.weights
    naive = sum(
        graph.value_bytes[name]
        for end in ends
        for name in {name for step in steps[end:] for name in step.takes}
        & {name for step in steps[:end] for name in step.makes}
    )
    made = [{name for step in steps[: piece.end] for name in step.makes} for piece in whole.pieces]
    taken = [{name for step in steps[piece.end :] for name in step.takes} for piece in whole.pieces]
    chosen = sum(graph.value_bytes[n] for m, t in zip(made, taken, strict=True) for n in m & t)
    cuts = len(whole.pieces) - 1
    assert cuts > 1 and chosen / cuts < naive / len(ends)


def test_sizes_are_the_files_own(bundles: dict[str, Bundle]) -> None:
    """Of every value whose type and shape the file tells, against the package onnx."""
    path = inside(bundles["fp16"].root, bundles["fp16"].graph("unet").file)
    stored = onnx.load(path).graph
    expected = {}
    for value in (*stored.value_info, *stored.input, *stored.output):
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        expected[value.name] = dtype.itemsize * int(np.prod([d.dim_value for d in tensor.shape.dim]))
    assert read_graph(path).value_bytes == expected


def test_a_large_graph_is_cut_and_a_small_one_is_not(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(OnnxRuntime.load_one(bundles["fp16"], "unet"), OnnxRuntime)
    monkeypatch.setattr(onnx_runtime, "LARGEST", SMALL)
    assert isinstance(OnnxRuntime.load_one(bundles["fp16"], "unet"), OnnxPieces)


def test_weights_beside_the_graph_are_found(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """As they lie at full size, whatever the folder that the process runs in."""
    bundle = bundles["fp16"]
    spec = bundle.graph("unet")
    model = onnx.load(inside(bundle.root, spec.file))
    (tmp_path / "unet").mkdir()
    apart = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 1024}
    onnx.save_model(model, tmp_path / spec.file, all_tensors_to_one_file=True, **apart)
    moved = Bundle(tmp_path, bundle.manifest)
    inputs = inputs_of(bundle, "unet")
    (found,) = OnnxPieces(moved, spec, SMALL).run("unet", inputs).values()
    (expected,) = OnnxPieces(bundle, spec, SMALL).run("unet", inputs).values()
    np.testing.assert_array_equal(found, expected)
    (tmp_path / "unet" / "model.onnx.data").unlink()
    with pytest.raises(RuntimeFailure, match="graph unet: run failed: ") as caught:
        OnnxPieces(moved, spec, SMALL).run("unet", inputs)
    assert "\n" not in str(caught.value)


def with_file(bundle: Bundle, folder: Path, content: bytes) -> Bundle:
    """The bundle with another UNet."""
    (folder / "unet").mkdir()
    (folder / bundle.graph("unet").file).write_bytes(content)
    return Bundle(folder, bundle.manifest)


def _branching() -> Any:
    def one(name: str, value: float) -> Any:
        node = helper.make_node(
            "Constant", [], [name], value=numpy_helper.from_array(np.array([value], np.float32))
        )
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, 1, [1])])

    return helper.make_node("If", ["yes"], ["y"], then_branch=one("a", 1.0), else_branch=one("b", 2.0))


def _model(*nodes: Any, sparse: bool = False) -> bytes:
    sides = [[helper.make_tensor_value_info(n, t, [1])] for n, t in (("yes", TensorProto.BOOL), ("y", 1))]
    graph = helper.make_graph(list(nodes), "g", *sides)
    if sparse:
        values, places = (helper.make_tensor(n, t, [1], [1]) for n, t in (("w", 1), ("i", TensorProto.INT64)))
        graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())


SPOILT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "empty file"),
    "zeros": (lambda data: b"\0" * 64, "expected an ONNX file of one graph, got 0"),
    "text": (lambda data: b"\x7fELF" * 64, "expected an ONNX file, got a field of kind 7"),
    "half": (lambda data: data[: len(data) // 2], "expected an ONNX file, got one that is cut off"),
    "endless": (lambda data: b"\xff" * 64, "expected an ONNX file, got a number of more than 64 bits"),
    "branches": (lambda data: _model(_branching()), r"node 0 \(If\): expected operations that can be cut"),
    "sparse": (
        lambda data: _model(helper.make_node("Cast", ["yes"], ["y"], to=1), sparse=True),
        "expected dense weights, got sparse ones",
    ),
    "disorder": (
        lambda data: _model(helper.make_node("Relu", ["x"], ["y"])),
        r"node 0 \(Relu\): input 'x': nothing before it makes it",
    ),
    "constant": (lambda data: _model(), "output 'y': expected one that an operation makes"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_cannot_be_cut_is_one_sentence(
    case: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    spoil, sentence = SPOILT[case]
    bundle = bundles["fp32"]
    path = inside(bundle.root, bundle.graph("unet").file)
    spoilt = with_file(bundle, tmp_path, spoil(path.read_bytes()))
    with pytest.raises(RuntimeFailure, match=f"model.onnx: could not be loaded: .*{sentence}") as caught:
        OnnxPieces(spoilt, spoilt.graph("unet"))
    assert "\n" not in str(caught.value)


def test_a_small_graph_with_branches_runs_whole(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """What cannot be cut need not be: only the names of its inputs are not the manifest's here."""
    spoilt = with_file(bundles["fp32"], tmp_path, _model(_branching()))
    with pytest.raises(RuntimeFailure, match=r"graph unet: .*expected inputs"):
        OnnxRuntime.load_one(spoilt, "unet")


def test_tensors_that_the_manifest_does_not_promise(bundles: dict[str, Bundle]) -> None:
    spec = bundles["fp32"].graph("unet")
    for field in ("inputs", "outputs"):
        tensors = getattr(spec, field)
        renamed = replace(spec, **{field: (replace(tensors[0], key="nobody"), *tensors[1:])})
        with pytest.raises(RuntimeFailure, match=rf"expected {field} \[.*'nobody'.*\], got \["):
            OnnxPieces(bundles["fp32"], renamed)


def test_nothing_is_changed_where_a_bundle_lies(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    copied = Bundle(Path(shutil.copytree(bundles["fp16"].root, tmp_path / "copy")), bundles["fp16"].manifest)
    OnnxPieces(copied, copied.graph("unet"), SMALL).run("unet", inputs_of(copied, "unet"))
    Bundle.open(copied.root)
