"""Each backend's own quantization tool on a float graph, and the backend that runs what it gives.

A tool is a function from the float graph, the file or folder to write, and calibration feeds; feeds are made
only for tools that look at activations. Runners take the file and one prompt's arrays, and give the picture
(1, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 32
#: Arrays by the pipeline's inputs: input_ids (1, L) and noise (1, C, h, w).
Feed = Mapping[str, np.ndarray]
Feeds = Callable[[], list[Feed]]


@dataclass(frozen=True)
class Tool:
    """One tool at one setting. ``stored`` is what it stores how, which edgeflow's rows are matched by."""

    stored: str
    tool: str
    setting: str
    backend: str
    quantize: Callable[[Path, Path, Feeds], None]
    needs: str = ""  # a package besides the tool's own

    @property
    def package(self) -> str:
        return self.needs or self.tool


# --- onnxruntime ----------------------------------------------------------------------------------------


def ort_dynamic(source: Path, out: Path, feeds: Feeds) -> None:
    """Weights and, as they come, activations in 8 bits: MatMulInteger and ConvInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, out, per_channel=True, weight_type=QuantType.QInt8)


def ort_nbits(bits: int, source: Path, out: Path, feeds: Feeds) -> None:
    """MatMulNBits: products alone, in blocks of 32; convolutions stay float."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=GROUP, is_symmetric=True)
    tool.process()
    tool.model.save_model_to_file(str(out), use_external_data_format=False)


def run_onnx(path: Path, feed: Feed) -> np.ndarray:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    feeds = {
        i.name: feed["input_ids" if "ids" in i.name else "noise"].astype(kinds[i.type])
        for i in session.get_inputs()
    }
    return session.run(None, feeds)[0]


# --- OpenVINO -------------------------------------------------------------------------------------------


def nncf_weights(mode: str, source: Path, out: Path, feeds: Feeds, **data_aware: bool) -> None:
    """``compress_weights``; what stays float and the scales are saved in float16, as NNCF's are made for."""
    import nncf
    import openvino

    more: dict[str, Any] = {}
    if "INT4" in mode:
        more = {"group_size": GROUP, "ratio": 1.0, "all_layers": True, **data_aware}
    if data_aware:
        drawn = feeds()
        more |= {"dataset": nncf.Dataset(drawn), "subset_size": len(drawn)}
    how = getattr(nncf.CompressWeightsMode, mode)
    model = nncf.compress_weights(openvino.Core().read_model(source), mode=how, **more)
    out.mkdir()
    openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=True)


def run_openvino(path: Path, feed: Feed) -> np.ndarray:
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", config)
    return np.array(model({name: feed[name] for name in ("input_ids", "noise")})[0])


# --- Core ML --------------------------------------------------------------------------------------------


def coreml_linear(bits: int, source: Path, out: Path, feeds: Feeds) -> None:
    import coremltools.optimize.coreml as cto

    block = {"granularity": "per_block", "block_size": GROUP} if bits == 4 else {}
    how = cto.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype=f"int{bits}", weight_threshold=0, **block
    )
    _coreml(cto.linear_quantize_weights, how, source, out)


def coreml_palette(bits: int, source: Path, out: Path, feeds: Feeds) -> None:
    import coremltools.optimize.coreml as cto

    how = cto.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0)
    _coreml(cto.palettize_weights, how, source, out)


def _coreml(tool: Any, how: Any, source: Path, out: Path) -> None:
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    model = ct.models.MLModel(str(source), skip_model_load=True)
    tool(model, cto.OptimizationConfig(global_config=how)).save(str(out))


def run_coreml(path: Path, feed: Feed) -> np.ndarray:
    from edgeflow.runtimes.mil_interpreter import MilInterpreter

    program = MilInterpreter.open(path)
    feeds = {name: feed["input_ids" if "ids" in name else "noise"] for name in program.inputs}
    return next(iter(program.run(feeds).values()))


#: What is stored how; the groups of the table, in its order.
EIGHT, EIGHT_INPUTS = "8 bits", "8 bits, inputs too"
EIGHT_PRODUCTS, FOUR_PRODUCTS = "products 8 bits, others float", "products 4 bits, others float"
FOUR_AND_EIGHT, FOUR = "products 4 bits, others 8", "4 bits"
SIX_TABLE, FOUR_TABLE = "table of 64", "table of 16"
STORED = (EIGHT, EIGHT_INPUTS, EIGHT_PRODUCTS, FOUR, FOUR_AND_EIGHT, FOUR_PRODUCTS, SIX_TABLE, FOUR_TABLE)

#: Backend → what runs a tool's file, and how the file's name ends.
RUN: dict[str, tuple[Callable[[Path, Feed], np.ndarray], str]] = {
    "onnx": (run_onnx, ".onnx"),
    "openvino": (run_openvino, ""),
    "coreml": (run_coreml, ".mlpackage"),
}
_int4 = partial(nncf_weights, "INT4_SYM")
TOOLS = (
    Tool(EIGHT, "nncf", "INT8_SYM", "openvino", partial(nncf_weights, "INT8_SYM")),
    Tool(EIGHT, "coremltools", "linear", "coreml", partial(coreml_linear, 8)),
    Tool(EIGHT_INPUTS, "onnxruntime", "quantize_dynamic", "onnx", ort_dynamic),
    Tool(EIGHT_PRODUCTS, "onnxruntime", "MatMulNBits g32", "onnx", partial(ort_nbits, 8)),
    Tool(FOUR, "coremltools", "linear g32", "coreml", partial(coreml_linear, 4)),
    Tool(FOUR_AND_EIGHT, "nncf", "INT4_SYM g32", "openvino", _int4),
    Tool(FOUR_AND_EIGHT, "nncf", "INT4_SYM g32, scales", "openvino", partial(_int4, scale_estimation=True)),
    Tool(FOUR_AND_EIGHT, "nncf", "INT4_SYM g32, gptq", "openvino", partial(_int4, gptq=True)),
    Tool(FOUR_PRODUCTS, "onnxruntime", "MatMulNBits g32", "onnx", partial(ort_nbits, 4)),
    Tool(SIX_TABLE, "coremltools", "kmeans", "coreml", partial(coreml_palette, 6), needs="sklearn"),
    Tool(FOUR_TABLE, "coremltools", "kmeans", "coreml", partial(coreml_palette, 4), needs="sklearn"),
)
