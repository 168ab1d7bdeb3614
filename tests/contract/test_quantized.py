"""The same bits everywhere: a checkpoint's integers, scales and zero points, read back from artifacts.

The artifacts are read by their own formats' tools: onnx, OpenVINO's IR, and the Core ML package's protobuf.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflow import metrics, parity
from edgeflow.apple import AppleSettings
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import UsageError
from edgeflow.export import PRECISIONS, export_model
from edgeflow.parity import measure
from edgeflow.parity_report import FAIL, LOWERING, PASS, QUANTIZATION, REWRITE, UNGATED, UNMEASURED, render
from edgeflow.quantization.apply import calibrated_recipe, load_integers, quantize_checkpoint
from edgeflow.quantization.recipe import RECIPES, parse_recipe, read_recipe

for _package in ("onnx", "onnxruntime", "openvino", "coremltools"):
    pytest.importorskip(_package)

BACKENDS = ("onnx", "openvino", "coreml")
#: Every scheme on every kind of layer that the tiny model has it for, and layers that stay float.
RECIPE: dict[str, Any] = {
    "schema": 1,
    "name": "every-scheme",
    "rules": [
        {"component": "text_encoder", "pattern": "embeddings.token_embedding", "scheme": "w4g32z"},
        {"component": "text_encoder", "pattern": "*.mlp.*", "scheme": "w4g32z"},
        {"component": "text_encoder", "pattern": "*.q_proj", "scheme": "w4g32"},
        {"component": "text_encoder", "pattern": "*.k_proj", "scheme": "float"},
        {"component": "text_encoder", "pattern": "*", "scheme": "w8"},
        {"component": "unet", "pattern": "conv_in", "scheme": "w8"},
        {"component": "unet", "pattern": "down_blocks.*.resnets.*", "scheme": "w4g32z", "fallback": "w8"},
        {"component": "unet", "pattern": "mid_block.*", "scheme": "w8g32"},
        {"component": "unet", "pattern": "*", "scheme": "w4g32", "fallback": "w8"},
        {"component": "decoder", "pattern": "*", "scheme": "w8"},
    ],
    "gates": {"sqnr_db": 0, "psnr_db": 1000},
    "found_by": "a test",
}
#: Bits of a weight in groups, and whether they have zero points.
GROUPED = ((8, False), (4, False), (4, True))
#: What is weighed against theory: the whole graph, but OpenVINO's description, which is text.
WEIGHED = {"onnx": ("model.onnx",), "openvino": (".bin",), "coreml": ("weight.bin", "model.mlmodel")}
#: At most so many bytes of OpenVINO's description for each layer of the checkpoint, measured: some 5,000.
TEXT_BYTES = 6000
#: Integers, scale, zero point (empty where there is none) and bits of one weight, as bytes with their shapes.
Weight = tuple[Any, ...]


def key(q: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int) -> Weight:
    """A weight in a form that can be counted; scales are compared as the float32 numbers that they are."""
    scale = scale.astype(np.float32)
    zeros = () if zero is None or not zero.any() else (zero.shape, zero.astype(np.int8).tobytes())
    return (bits, q.shape, q.astype(np.int8).tobytes(), scale.shape, scale.tobytes(), *zeros)


def both_precisions(folder: Path) -> Callable[[str], list[Bundle]]:
    """backend → the two bundles of the checkpoint ``folder/model``; each backend is exported once."""

    @functools.cache
    def bundles(backend: str) -> list[Bundle]:
        model = Checkpoint.open(folder / "model")
        paths = export_model(model, backends=[backend], precisions=PRECISIONS, out=folder / "bundles")
        return [Bundle.open(path) for path in paths]

    return bundles


@pytest.fixture(scope="module")
def exported(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Bundle]]:
    """backend → its two quantized bundles; each backend is exported once."""
    folder = tmp_path_factory.mktemp("quantized")
    quantize_checkpoint(checkpoint, parse_recipe(RECIPE, "test"), folder / "model")
    return both_precisions(folder)


def model_of(bundle: Bundle) -> Checkpoint:
    return Checkpoint.open(bundle.root.parents[1] / "model")


def stored(model: Checkpoint) -> collections.Counter[Weight]:
    """What the checkpoint holds of the layers that the pipeline has: the time embedding is folded away."""
    weights: collections.Counter[Weight] = collections.Counter()
    for part in ("text_encoder", "unet", "vae"):
        layers = model.quantized_layers(part)
        for name, layer in load_integers(model, part).items():
            if "time_emb" not in name:
                weights[key(layer["q"], layer["scale"], layer.get("zero_point"), layers[name].bits)] += 1
    return weights


# --- reading artifacts ----------------------------------------------------------------------------------


def read_onnx(path: Path) -> list[Weight]:
    import onnx

    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:  # an activation's
            continue
        attributes = {a.name: a.i for a in node.attribute}
        tensors = [constants[name] for name in node.input]
        bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}[tensors[0].data_type]
        q, scale, *zero = (onnx.numpy_helper.to_array(tensor) for tensor in tensors)
        if scale.ndim == 1:
            assert attributes["axis"] == 0 and not zero and "block_size" not in attributes
            scale = scale.reshape(-1, *(1,) * (q.ndim - 1))
        else:
            assert attributes["axis"] == 1 and attributes["block_size"] == 32
            assert all(t.data_type == tensors[0].data_type for t in tensors[2:])
        found.append(key(q.astype(np.int8), scale, zero[0].astype(np.int8) if zero else None, bits))
    return found


def read_openvino(path: Path) -> list[Weight]:
    import openvino

    def parents(node: Any) -> list[Any]:
        return [port.get_source_output().get_node() for port in node.inputs()]

    def integers(node: Any) -> tuple[np.ndarray, int]:
        """Convert over a constant of i4 or i8; i4 is unpacked here, the first value in the low four bits."""
        (constant,) = parents(node)
        assert node.get_type_name() == "Convert" and constant.get_type_name() == "Constant"
        if constant.get_element_type() == openvino.Type.i8:
            return np.array(constant.data), 8
        assert constant.get_element_type() == openvino.Type.i4
        packed = np.array(constant.data).reshape(-1).view(np.uint8)
        values = (
            np.stack((packed & 15, packed >> 4), 1).reshape(-1)[: np.prod(constant.shape)].astype(np.int8)
        )
        return (values - 16 * (values > 7)).astype(np.int8).reshape(tuple(constant.shape)), 4

    found = []
    for node in openvino.Core().read_model(path).get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        left, scale = parents(node)
        zero = None
        if left.get_type_name() == "Subtract":
            left, shift = parents(left)
            zero, _ = integers(shift)
        if left.get_type_name() != "Convert" or parents(left)[0].get_element_type().bitwidth > 8:
            continue
        assert scale.get_type_name() == "Constant"
        (q, bits), scales = integers(left), np.array(scale.data)
        if q.ndim in (3, 5):  # (O, G, 32, …) → (O, I, …)
            q = q.reshape(q.shape[0], -1, *q.shape[3:])
            scales, zero = scales.squeeze(2), None if zero is None else zero.squeeze(2)
        found.append(key(q, scales, zero, bits))
    return found


def read_coreml(path: Path) -> list[Weight]:
    from edgeflow.runtimes.mil_reader import Constant, read_package

    operations = [op for op in read_package(path).operations if op.type.startswith("constexpr")]
    found = []
    for op, bits in zip(operations, _coreml_bits(path), strict=True):
        values = {
            name: given[0].value for name, given in op.parameters.items() if isinstance(given[0], Constant)
        }
        if op.type == "constexpr_affine_dequantize":  # before iOS 18
            q, scale = values["quantized_data"], values["scale"]
            assert not values["zero_point"].any() and values["axis"] == 0 and scale.shape == q.shape[:1]
            found.append(key(q, scale.reshape(-1, *(1,) * (q.ndim - 1)), None, bits))
            continue
        assert op.type == "constexpr_blockwise_shift_scale"
        found.append(key(values["data"], values["scale"], values.get("offset"), bits))
    return found


def _coreml_bits(path: Path) -> list[int]:
    """Bits of each compressed constant, in order: the package's reader gives int4 as int8."""
    import coremltools as ct

    widths = {ct.proto.MIL_pb2.INT4: 4, ct.proto.MIL_pb2.INT8: 8}
    main = ct.models.utils.load_spec(str(path)).mlProgram.functions["main"]
    operations = main.block_specializations[main.opset].operations
    values = []
    for op in operations:
        if op.type.startswith("constexpr"):
            name = "data" if op.type.endswith("shift_scale") else "quantized_data"
            values.append(
                op.attributes[name] if name in op.attributes else op.inputs[name].arguments[0].value
            )
    return [widths[value.type.tensorType.dataType] for value in values]


READ = {"onnx": read_onnx, "openvino": read_openvino, "coreml": read_coreml}


# --- the contract ---------------------------------------------------------------------------------------


def test_the_recipe_covers_every_scheme_and_kind_of_layer(checkpoint: Checkpoint, exported: Any) -> None:
    model = model_of(exported("onnx")[0])
    seen = {
        (layer.bits, layer.scale_shape[1] > 1, layer.zero_point, len(layer.shape))
        for part in ("text_encoder", "unet", "vae")
        for layer in model.quantized_layers(part).values()
    }
    whole = {(8, False, False, axes) for axes in (2, 4)}
    assert seen >= whole | {(bits, True, zero, axes) for axes in (2, 4) for bits, zero in GROUPED}
    assert model.quantized_layers("text_encoder")["embeddings.token_embedding"].zero_point


@pytest.mark.parametrize("backend", BACKENDS)
def test_artifacts_hold_the_checkpoints_very_bits(backend: str, exported: Any) -> None:
    for bundle in exported(backend):
        (graph,) = bundle.manifest.graphs
        found = collections.Counter(READ[backend](bundle.root / graph.file))
        expected = stored(model_of(bundle))
        assert sum(found.values()) == sum(expected.values())
        assert found == expected, bundle.root.name


def test_the_neural_engines_layout_keeps_the_very_bits(exported: Any, tmp_path: Path) -> None:
    """Linear layers as 1×1 convolutions, the UNet in two packages: integers of the same bytes."""
    model = model_of(exported("coreml")[0])
    (path,) = export_model(
        model,
        backends=["coreml"],
        precisions=["fp16"],
        layouts=["components"],
        apple=AppleSettings("split-einsum", chunks=2),
        num_prompts=1,
        out=tmp_path,
    )
    bundle = Bundle.open(path)
    assert bundle.manifest.settings["target"] == "iOS18"  # some of the weights have four bits

    def flat(weight: Weight) -> Weight:
        return tuple(p[:2] if isinstance(p, tuple) and p[2:] == (1, 1) else p for p in weight)

    files = [file for graph in bundle.manifest.graphs for file in (graph.chunks or (graph.file,))]
    weights = [weight for file in files for weight in read_coreml(bundle.root / file)]
    found = collections.Counter(map(flat, weights))
    expected: collections.Counter[Weight] = collections.Counter()
    for part in ("text_encoder", "unet", "vae"):
        layers = model.quantized_layers(part)
        for name, layer in load_integers(model, part).items():
            whole = key(layer["q"], layer["scale"], layer.get("zero_point"), layers[name].bits)
            expected[flat(whole)] += 1
    assert found == expected
    assert sum(len(weight[1]) == 2 for weight in weights) < 0.3 * len(weights)  # embeddings, time
    report = measure([bundle], against=model, num_prompts=1)
    gaps = [m for m in report.measurements if m.gap in (REWRITE, LOWERING)]
    assert len(gaps) == 11 and {m.status for m in gaps} == {PASS}, render(report)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lowering_holds_and_the_quantization_gap_is_reported(
    backend: str, exported: Any, checkpoint: Checkpoint
) -> None:
    bundles = exported(backend)
    assert [b.manifest.recipe for b in bundles] == [RECIPE, RECIPE]
    report = measure(bundles, against=model_of(bundles[0]), num_prompts=2, unquantized=checkpoint)
    lowering = [m for m in report.measurements if m.gap == LOWERING]
    assert [m.status for m in lowering] == [PASS] * 2, render(report)
    gap = {(m.component, m.metric): m for m in report.measurements if m.gap == QUANTIZATION}
    assert set(gap) == {
        *((c, "sqnr_db") for c in ("text_encoder", "unet", "decoder", "pipeline")),
        ("pipeline", "psnr_db"),
    }
    assert gap["unet", "sqnr_db"].status == UNGATED and 5 < gap["unet", "sqnr_db"].worst < 40
    assert gap["pipeline", "sqnr_db"].status == PASS
    assert gap["pipeline", "psnr_db"].status == FAIL and not report.passed  # the recipe's own gate of 1000 dB


def test_a_small_graph_opens_with_float_weights_and_a_large_one_keeps_integers(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeflow.runtimes import onnx_runtime
    from edgeflow.runtimes.onnx_file import node_types

    bundle = exported("onnx")[0]
    (graph,) = bundle.manifest.graphs
    arrays = bundle.reference()
    feeds = {t.key: arrays[f"prompt0/{t.name}"].astype(t.dtype) for t in graph.inputs}
    pictures = []
    for limit, integers in ((0, True), (onnx_runtime.FOLDED_BYTES, False)):
        monkeypatch.setattr(onnx_runtime, "FOLDED_BYTES", limit)
        path = tmp_path / f"{limit}.onnx"
        session = onnx_runtime._session(bundle, graph, [onnx_runtime.CPU], capture=False, written=path)
        kinds = {kind for _, kind in node_types(path)}
        assert bool(kinds & {"DequantizeLinear", "MatMulNBits"}) == integers
        pictures.append(session.run(None, feeds)[0])
    assert metrics.psnr_db(*pictures, peak=1.0) > 90


def test_without_the_float_checkpoint_the_gap_is_said_to_be_unmeasured(exported: Any) -> None:
    (bundle, _) = exported("onnx")
    report = measure([bundle], against=model_of(bundle), num_prompts=1)
    (row,) = (m for m in report.measurements if m.gap == QUANTIZATION)
    assert row.status == UNMEASURED and "--unquantized" in str(row.reason)


# --- activations ----------------------------------------------------------------------------------------

#: Inputs rounded in linears and convolutions, of which one has no bias; text and keys and values keep theirs.
_SHIPPED = json.loads((RECIPES / "w8a8.json").read_text())
W8A8: dict[str, Any] = {
    **_SHIPPED,
    "rules": [*_SHIPPED["rules"][:-1], {"component": "decoder", "pattern": "*", "scheme": "w8a8"}],
}


@pytest.fixture(scope="module")
def rounded(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Bundle]]:
    """backend → its two bundles of a model whose activations are rounded; each backend is exported once."""
    folder = tmp_path_factory.mktemp("rounded")
    recipe, calibration = calibrated_recipe(checkpoint, parse_recipe(W8A8, "test"), "nearest", "emoji", 4)
    quantize_checkpoint(checkpoint, recipe, folder / "model", calibration=calibration)
    return both_precisions(folder)


def onnx_grids(path: Path) -> list[tuple[float, int]]:
    """(scale, zero point) of each pair of QuantizeLinear and DequantizeLinear on an activation."""
    import onnx

    graph = onnx.load(path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    dequantize = {n.input[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    found = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert node.input[1:] == dequantize[node.output[0]].input[1:]
            scale, zero = (constants[name] for name in node.input[1:])
            assert zero.dtype == np.uint8 and scale.shape == zero.shape == ()
            found.append((float(scale), int(zero)))
    return found


def openvino_grids(path: Path) -> list[tuple[float, int]]:
    """The grid of each FakeQuantize, from its ends: low = −zero · scale, high = (255 − zero) · scale."""
    import openvino

    found = []
    for node in openvino.Core().read_model(path).get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            ends = [port.get_source_output().get_node() for port in node.inputs()[1:]]
            low, high, *out = (float(np.array(end.data).reshape(())) for end in ends)
            assert out == [low, high] and node.get_attributes()["levels"] == 256
            scale = np.float32(np.float16((high - low) / 255))  # the ends themselves are checked below
            found.append((float(scale), round(-low / float(scale))))
            assert low == np.float32(-found[-1][1] * scale) and high == np.float32(
                (255 - found[-1][1]) * scale
            )
    return found


def coreml_grids(path: Path) -> list[tuple[float, int]]:
    from edgeflow.runtimes.mil_reader import Constant, read_package

    operations = read_package(path).operations
    constants = {
        op.outputs[0].name: op.parameters["val"][0].value  # type: ignore[union-attr]
        for op in operations
        if op.type == "const"
    }

    def values(op: Any) -> list[Any]:
        given = {name: bound[0] for name, bound in op.parameters.items()}
        parts = [given.get("scale"), given.get("zero_point", Constant(np.array(0)))]
        return [float(p.value if isinstance(p, Constant) else constants[p]) for p in parts]  # type: ignore

    back = {op.parameters["input"][0]: op for op in operations if op.type == "dequantize"}
    found = []
    for op in operations:
        if op.type == "quantize":
            scale, zero = values(op)
            assert values(back[op.outputs[0].name]) == [scale, zero]
            kind = str(given_text(op.parameters["output_dtype"][0], constants))
            found.append((scale, int(zero) + (128 if kind == "int8" else 0)))
    return found


def given_text(bound: Any, constants: dict[str, Any]) -> Any:
    return constants[bound] if isinstance(bound, str) else bound.value


GRIDS = {"onnx": onnx_grids, "openvino": openvino_grids, "coreml": coreml_grids}


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_hold_the_checkpoints_very_grids(backend: str, rounded: Any) -> None:
    for bundle in rounded(backend):
        model = model_of(bundle)
        expected: collections.Counter[Any] = collections.Counter()
        for part in ("unet", "vae"):
            for name, layer in load_integers(model, part).items():
                if "input_scale" in layer:
                    expected[float(layer["input_scale"]), int(layer["input_zero_point"])] += 1
                else:
                    assert name.endswith(("attn2.to_k", "attn2.to_v")) or "time_emb" in name, name
        (graph,) = bundle.manifest.graphs
        found = collections.Counter(GRIDS[backend](bundle.root / graph.file))
        assert set(found) == set(expected)
        assert found <= expected  # queries, keys and values round one tensor alike, which a backend may merge
        assert collections.Counter(READ[backend](bundle.root / graph.file)) == stored(model)


def lost_by_rounding(report: Any) -> dict[str, float]:
    """metric → the quantization gap at the picture."""
    rows = (m for m in report.measurements if m.gap == QUANTIZATION and m.component == "pipeline")
    return {m.metric: m.worst for m in rows}


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_activations_are_the_references_but_for_ties(
    backend: str, rounded: Any, checkpoint: Checkpoint
) -> None:
    """A value between two steps falls by its float's last bit and takes others with it, hence the limit.

    Where none does, fp32 agrees to the last digits; over four prompts at least one is such.
    """
    bundles = rounded(backend)
    report = measure(bundles, against=model_of(bundles[0]), num_prompts=4, unquantized=checkpoint)
    assert report.passed, render(report)
    lowering = {m.precision: m for m in report.measurements if m.gap == LOWERING}
    explained = lost_by_rounding(report)["sqnr_db"] - 20 * np.log10(2)
    assert lowering["fp32"].gate == pytest.approx(min(60, explained))
    assert lowering["fp16"].gate == pytest.approx(min(40, explained)) and max(lowering["fp32"].values) > 100


@pytest.mark.parametrize("planted_db, status", [(40.0, PASS), (25.0, FAIL)])
def test_an_error_that_rounding_does_not_explain_fails(
    planted_db: float, status: str, rounded: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in the runtime's picture; the quantization gap is about 38 dB, the limit 6 dB below it."""
    bundle = rounded("onnx")[0]
    ratio = 10 ** (planted_db / 20)

    def drawn(*arguments: Any, **options: Any) -> Any:
        picture = parity_run_pipeline(*arguments, **options)
        noise = np.random.default_rng(0).standard_normal(picture.shape).astype(np.float32)
        return picture + noise * np.float32(np.linalg.norm(picture) / np.linalg.norm(noise) / ratio)

    parity_run_pipeline = parity.run_pipeline
    monkeypatch.setattr(parity, "run_pipeline", drawn)
    report = measure([bundle], against=model_of(bundle), num_prompts=1, unquantized=checkpoint)
    (lowering,) = (m for m in report.measurements if m.gap == LOWERING)
    assert lowering.gate is not None and 26 < lowering.gate < 38, render(report)
    assert lowering.status == status and report.passed == (status == PASS), render(report)


def test_one_wrong_pixel_of_a_rewrite_fails_and_what_is_not_rounded_keeps_its_limits(
    rounded: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = rounded("onnx")[0]
    original = parity._original

    def wrong(reference: Any, graph: str, sample: Any, spec: Any) -> Any:
        found = original(reference, graph, sample, spec).copy()
        if graph == "pipeline":
            found.flat[0] += 0.5
        return found

    monkeypatch.setattr(parity, "_original", wrong)
    report = measure([bundle], against=model_of(bundle), num_prompts=1, unquantized=checkpoint)
    rewrite = {(m.component, m.metric): m for m in report.measurements if m.gap == "rewrite"}
    assert rewrite["pipeline", "max_abs"].gate == pytest.approx(lost_by_rounding(report)["max_abs"])
    assert rewrite["pipeline", "max_abs"].gate < 1  # the range of a picture
    assert rewrite["pipeline", "max_abs"].status == FAIL and not report.passed
    assert [rewrite["text_encoder", m].gate for m in ("sqnr_db", "max_abs")] == [80, 1e-4]
    assert rewrite["unet", "sqnr_db"].gate < 80 and rewrite["unet", "sqnr_db"].status == PASS


def test_without_the_float_checkpoint_what_is_rounded_is_not_gated(rounded: Any) -> None:
    bundle = rounded("onnx")[0]
    report = measure([bundle], against=model_of(bundle), num_prompts=1)
    rows = {(m.gap, m.component, m.metric): m.status for m in report.measurements}
    assert rows[LOWERING, "pipeline", "sqnr_db"] == rows["rewrite", "unet", "max_abs"] == UNGATED
    assert rows["rewrite", "text_encoder", "sqnr_db"] == PASS
    assert "unet" in report.notes[0] and "not gated" in report.notes[0]


# --- palettes -------------------------------------------------------------------------------------------


def palettes_of(path: Path) -> collections.Counter[Weight]:
    """Indices and table of each constexpr_lut_to_dense, in the form of iOS 16: packed, with their shape."""
    from edgeflow.runtimes.mil_reader import Constant, read_package

    found: collections.Counter[Weight] = collections.Counter()
    for op in read_package(path).operations:
        if op.type == "constexpr_lut_to_dense":
            bound = (op.parameters[name][0] for name in ("indices", "lut", "shape"))
            packed, table, shape = (b.value for b in bound if isinstance(b, Constant))
            bits, count = len(table).bit_length() - 1, int(np.prod(shape))
            flat = np.unpackbits(packed, bitorder="little")[: bits * count].reshape(count, bits)
            indices = (flat @ (1 << np.arange(bits))).astype(np.uint8).reshape(tuple(shape))
            found[indices.shape, indices.tobytes(), table.astype(np.float32).tobytes()] += 1
    return found


def test_palettes_are_core_mls_alone_and_hold_the_checkpoints_very_bits(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    quantize_checkpoint(checkpoint, read_recipe("w6"), tmp_path / "model")
    model = Checkpoint.open(tmp_path / "model")
    with pytest.raises(UsageError, match="Core ML alone can hold; expected --to coreml, got onnx"):
        export_model(model, backends=["coreml", "onnx"], out=tmp_path / "bundles")
    assert not (tmp_path / "bundles").exists()
    bundles = [
        Bundle.open(path)
        for path in export_model(model, backends=["coreml"], precisions=PRECISIONS, out=tmp_path / "bundles")
    ]
    expected: collections.Counter[Weight] = collections.Counter()
    for part in ("text_encoder", "unet", "vae"):
        for name, layer in load_integers(model, part).items():
            if "time_emb" not in name:
                table = layer["palette"].astype(np.float32)
                assert table.shape == (64,) and layer["q"].max() < 64
                expected[layer["q"].shape, layer["q"].tobytes(), table.tobytes()] += 1
    for bundle in bundles:
        assert palettes_of(bundle.root / bundle.manifest.graphs[0].file) == expected
    report = measure(bundles, against=model, num_prompts=2, unquantized=checkpoint)
    assert report.passed, render(report)
    (gap,) = (m for m in report.measurements if m.gap == QUANTIZATION and m.metric == "psnr_db")
    assert 30 < gap.worst < 80
    weights = sum(e.bytes for n, e in bundles[1].manifest.files.items() if n.endswith("weight.bin"))
    indices = sum(len(shape_q[1]) * 6 / 8 * count for shape_q, count in expected.items())
    assert indices < weights < 1.5 * indices  # packed: six bits an index, the rest stays float


@pytest.mark.slow  # three more exports; that float bundles repeat is in the fast tests
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_bundles_repeat(backend: str, exported: Any, tmp_path: Path) -> None:
    bundle = exported(backend)[1]
    (again,) = export_model(model_of(bundle), backends=[backend], precisions=["fp16"], out=tmp_path)
    assert (again / "manifest.json").read_bytes() == (bundle.root / "manifest.json").read_bytes()


@pytest.mark.slow  # exports the built-in model on three backends: minutes
@pytest.mark.parametrize("layout", ["pipeline", "components"])
@pytest.mark.parametrize("recipe", ["w8", "w4g32"])
def test_bundles_are_as_large_as_theory_says(recipe: str, layout: str, tmp_path: Path) -> None:
    """Integers, scales and what stays float, to within 5 %; OpenVINO's description apart, which is text."""
    quantize_checkpoint(Checkpoint.open("emoji"), read_recipe(recipe), tmp_path / "model")
    model = Checkpoint.open(tmp_path / "model")
    paths = export_model(
        model, backends=BACKENDS, precisions=["fp16"], layouts=[layout], out=tmp_path / "bundles"
    )
    parts = ("text_encoder", "unet", "vae")
    theory = sum(theory_bytes(model, part, 2, folded=layout == "pipeline") for part in parts)
    layers = sum(len(model.quantized_layers(part)) for part in parts)
    for path in paths:
        bundle = Bundle.open(path)
        files, backend = bundle.manifest.files, bundle.manifest.backend
        weighed = sum(entry.bytes for name, entry in files.items() if name.endswith(WEIGHED[backend]))
        text = sum(entry.bytes for name, entry in files.items() if name.endswith(".xml"))
        print(f"{path.name}: {weighed} of {theory:.0f} bytes, {weighed / theory:.3f}; text {text}")
        assert 0.99 < weighed / theory < 1.05, f"{path.name}: {weighed / theory:.3f}"
        assert text < TEXT_BYTES * layers, path.name


def theory_bytes(model: Checkpoint, part: str, float_bytes: int, *, folded: bool) -> float:
    """Bytes of the tensors that graphs have: no encoder's, and where ``folded`` no time embedding's."""

    def gone(name: str) -> bool:
        return folded and "time_emb" in name

    layers = model.quantized_layers(part)
    total = 0.0
    for name, layer in layers.items():
        if not gone(name):
            scales = np.prod(layer.scale_shape)
            total += layer.numel * layer.bits / 8 + scales * (float_bytes + layer.zero_point * layer.bits / 8)
    for name, tensor in model.stored_tensors(part).items():
        if part == "text_encoder" or not (gone(name) or name.startswith("encoder.")):
            total += tensor.numel * float_bytes * (name.rpartition(".weight_")[0] not in layers)
    return total
