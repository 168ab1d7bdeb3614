"""A bundle made by hand: a real ONNX graph small enough to work out on paper, no exporter involved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeflow.bundle import Manifest, write_bundle_files
from edgeflow.spec import GraphSpec, TensorSpec

SIDE = 8  # the picture's, and the latent's
TOKENS = 16  # the tiny checkpoint's


def write_onnx_pipeline(path: Path) -> None:
    """image = sigmoid(noise[:, :3] + mean(input_ids) / 1000), so ids and noise both show in the picture."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "starts": np.array([0], np.int64),
        "ends": np.array([3], np.int64),
        "axes": np.array([1], np.int64),
        "thousand": np.array(1000, np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["noise", "starts", "ends", "axes"], ["rgb"]),
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["ids"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "thousand"], ["shift"]),
        helper.make_node("Add", ["rgb", "shift"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["image"]),
    ]
    graph = helper.make_graph(
        nodes,
        "pipeline",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT32, [1, TOKENS]),
            helper.make_tensor_value_info("noise", TensorProto.FLOAT, [1, 4, SIDE, SIDE]),
        ],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def build_bundle(root: Path, tokenizer: Path, backend: str = "onnx", layout: str = "pipeline") -> Path:
    """A bundle folder of the given backend; its graph is real for ONNX's pipeline, else a byte."""
    root.mkdir(parents=True)
    shutil.copytree(tokenizer, root / "tokenizer")
    latent, image = (1, 4, SIDE, SIDE), (1, 3, SIDE, SIDE)

    def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name, shape, dtype, name)

    ids, hidden = tensor("input_ids", 1, TOKENS, dtype="int32"), tensor("last_hidden_state", 1, TOKENS, 2)
    unet = (tensor("sample", *latent), tensor("timestep", 1), tensor("encoder_hidden_states", 1, TOKENS, 2))
    specs = {
        "pipeline": [("pipeline", (ids, tensor("noise", *latent)), tensor("image", *image))],
        "components": [
            ("text_encoder", (ids,), hidden),
            ("unet", unet, tensor("velocity", *latent)),
            ("decoder", (tensor("latent", *latent),), tensor("image", *image)),
        ],
    }[layout]
    graphs = tuple(GraphSpec(name, f"{name}.onnx", inputs, (out,)) for name, inputs, out in specs)
    for graph in graphs:
        if backend == "onnx" and layout == "pipeline":
            write_onnx_pipeline(root / graph.file)
        else:
            (root / graph.file).write_bytes(b"\0")
    model = {
        "name": "by-hand",
        "checkpoint_hash": "ab" * 32,
        "licence": "CC0-1.0",
        "origin": "tests",
        "max_tokens": TOKENS,
        "latent_shape": [4, SIDE, SIDE],
        "latent_scale": 0.5,
        "picture_size": SIDE,
        "steps": 1,
        "timestep": 1000.0,
        "prompts": ["red apple"],
    }
    versions = {"edgeflow": "0.1.0", "onnx": "1.0"}
    write_bundle_files(root, Manifest(backend, "fp32", layout, model, None, graphs, {}, versions))
    return root


@pytest.fixture
def make_bundle(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., Path]:
    """``make_bundle(name="bundle", backend="onnx", layout="pipeline")`` → a fresh bundle folder."""

    def make(name: str = "bundle", backend: str = "onnx", layout: str = "pipeline") -> Path:
        return build_bundle(tmp_path / name, tiny_checkpoint / "tokenizer", backend, layout)

    return make


@pytest.fixture
def own_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "mine"))
