"""The Core ML interpreter: each operation of a saved and reopened program against NumPy or torch."""

from __future__ import annotations

import gc
import json
import logging
import math
import struct
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
logging.getLogger("coremltools").setLevel(logging.ERROR)  # off macOS it reports each missing native part
ct = pytest.importorskip("coremltools")

import torch.nn.functional as F  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

from edgeflow.errors import RuntimeFailure  # noqa: E402
from edgeflow.runtimes import mil_interpreter, mil_reader  # noqa: E402
from edgeflow.runtimes.mil_interpreter import MilInterpreter  # noqa: E402

IOS16, IOS18 = ct.target.iOS16, ct.target.iOS18
Arrays = dict[str, np.ndarray]
_TYPES = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_needs_no_collecting() -> Iterator[None]:
    """Each conversion collects garbage, which walks all of torch: most of a test's time otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def save(folder: Path, build: Callable[..., Any], inputs: Arrays, opset: Any = IOS18) -> Path:
    """A package of the program that ``build`` makes, as it was written: no converter's pass changes it."""
    specs = [mb.TensorSpec(shape=a.shape, dtype=_TYPES[a.dtype.name]) for a in inputs.values()]
    program = mb.program(input_specs=specs, opset_version=opset)(build)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=opset,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    package = folder / "program.mlpackage"
    model.save(str(package))
    return package


def execute(folder: Path, build: Callable[..., Any], inputs: Arrays, opset: Any = IOS18) -> list[np.ndarray]:
    """The outputs of the saved and reopened program, in the program's order."""
    interpreter = MilInterpreter.open(save(folder, build, inputs, opset))
    outputs = interpreter.run(inputs)
    return [outputs[name] for name in interpreter.outputs]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(normal(*shape, seed=seed)) + np.float32(0.1)


def whole(*shape: int, low: int = 0, high: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def numpy_layer_norm(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    deviation = np.sqrt(x.var(axis=axes, keepdims=True, dtype=np.float64) + epsilon)
    return (x - x.mean(axis=axes, keepdims=True, dtype=np.float64)) / deviation


def interleaved(x: np.ndarray) -> np.ndarray:
    """Channel 4c + 2p + q at (i, j) → channel c at (2i + p, 2j + q)."""
    found = np.empty((x.shape[0], x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3]), x.dtype)
    for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
        found[:, :, p::2, q::2] = x[:, 2 * p + q :: 4]
    return found


X = normal(2, 3, 4, 5)
Y = normal(2, 3, 4, 5, seed=1)
IMAGE = normal(1, 4, 7, 6)
GAMMA, BETA = positive(4, seed=2), normal(4, seed=3)
ATTENTION = {name: normal(1, 2, 6, 8, seed=i) for i, name in enumerate(("q", "k", "v"))}
MASK = np.triu(np.full((6, 6), -1e4, np.float32), 1)

ELEMENTWISE = {
    "abs": np.abs,
    "ceil": np.ceil,
    "cos": np.cos,
    "erf": np.vectorize(math.erf),
    "exp": np.exp,
    "floor": np.floor,
    "relu": lambda x: np.maximum(x, 0),
    "round": np.round,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sign": np.sign,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sin": np.sin,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "square": np.square,
    "tanh": np.tanh,
}
PAIRWISE = {
    "add": np.add,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mul": np.multiply,
    "real_div": np.divide,
    "sub": np.subtract,
}
COMPARISONS = {
    "equal": np.equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "not_equal": np.not_equal,
}
REDUCTIONS = {
    "reduce_l2_norm": lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis, keepdims=keepdims)),
    "reduce_log_sum_exp": lambda x, axis, keepdims: np.log(np.exp(x).sum(axis, keepdims=keepdims)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, axis, keepdims: np.square(x).sum(axis, keepdims=keepdims),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(tmp_path: Path, name: str) -> None:
    x = normal(3, 5) * 2
    (got,) = execute(tmp_path, lambda x: getattr(mb, name)(x=x), {"x": x})
    np.testing.assert_allclose(got, ELEMENTWISE[name](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_with_broadcasting(tmp_path: Path, name: str) -> None:
    x, y = normal(2, 3, 4), normal(3, 1, seed=1)
    (got,) = execute(tmp_path, lambda x, y: getattr(mb, name)(x=x, y=y), {"x": x, "y": y})
    np.testing.assert_allclose(got, PAIRWISE[name](x, y), rtol=1e-6)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_choose(tmp_path: Path, name: str) -> None:
    """Comparisons give bools, which cannot leave a program: they choose between two others."""
    x, y = whole(4, 6, high=3), whole(4, 6, high=3, seed=1)

    def build(x: Any, y: Any) -> Any:
        ones = np.ones((4, 6), np.float32)
        return mb.select(cond=getattr(mb, name)(x=x, y=y), a=ones, b=-ones)

    (got,) = execute(tmp_path, build, {"x": x, "y": y})
    np.testing.assert_array_equal(got, np.where(COMPARISONS[name](x, y), 1, -1))


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize(("axes", "keep"), [([1, -1], True), ([0], False), (None, False)])
def test_reductions(tmp_path: Path, name: str, axes: list[int] | None, keep: bool) -> None:
    arguments = {} if axes is None else {"axes": axes}
    (got,) = execute(tmp_path, lambda x: getattr(mb, name)(x=x, keep_dims=keep, **arguments), {"x": X})
    expected = REDUCTIONS[name](X, axis=None if axes is None else tuple(axes), keepdims=keep)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


#: name → (program, inputs, what NumPy or torch makes of the same inputs)
CASES: dict[str, tuple[Callable[..., Any], Arrays, Callable[..., Any]]] = {
    "sqrt": (lambda x: mb.sqrt(x=x), {"x": positive(3, 4)}, np.sqrt),
    "rsqrt": (
        lambda x: mb.rsqrt(x=x, epsilon=0.5),
        {"x": positive(3, 4)},
        lambda x: 1 / np.sqrt(x + 0.5),
    ),
    "rsqrt default": (lambda x: mb.rsqrt(x=x), {"x": positive(3, 4)}, lambda x: 1 / np.sqrt(x)),
    "inverse": (
        lambda x: mb.inverse(x=x, epsilon=0.25),
        {"x": positive(3, 4)},
        lambda x: 1 / (x + 0.25),
    ),
    "log": (lambda x: mb.log(x=x, epsilon=0.5), {"x": positive(3, 4)}, lambda x: np.log(x + 0.5)),
    "pow": (
        lambda x, y: mb.pow(x=x, y=y),
        {"x": positive(3, 4), "y": normal(4)},
        np.power,
    ),
    "floor_div": (
        lambda x, y: mb.floor_div(x=x, y=y),
        {"x": normal(9) * 7, "y": positive(9)},
        np.floor_divide,
    ),
    "mod": (
        lambda x, y: mb.mod(x=x, y=y),
        {"x": whole(20, low=-9, high=9), "y": np.full(20, -4, np.int32)},
        np.mod,
    ),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.25), {"x": X}, lambda x: np.clip(x, -0.5, 0.25)),
    "leaky_relu": (
        lambda x: mb.leaky_relu(x=x, alpha=0.2),
        {"x": X},
        lambda x: F.leaky_relu(tensor(x), 0.2),
    ),
    "gelu exact": (
        lambda x: mb.gelu(x=x, mode="EXACT"),
        {"x": X},
        lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    ),
    "gelu tanh": (
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        {"x": X},
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "gelu sigmoid": (
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        {"x": X},
        lambda x: x / (1 + np.exp(-1.702 * x)),
    ),
    "logic": (
        lambda x, y: mb.select(
            cond=mb.logical_xor(
                x=mb.logical_and(x=mb.greater(x=x, y=0.0), y=mb.greater(x=y, y=0.0)),
                y=mb.logical_not(x=mb.logical_or(x=mb.less(x=x, y=1.0), y=mb.less(x=y, y=1.0))),
            ),
            a=x,
            b=y,
        ),
        {"x": X, "y": Y},
        lambda x, y: np.where(((x > 0) & (y > 0)) ^ ~((x < 1) | (y < 1)), x, y),
    ),
    "linear": (
        lambda x: mb.linear(x=x, weight=normal(6, 5, seed=4), bias=normal(6, seed=5)),
        {"x": normal(2, 3, 5)},
        lambda x: x @ normal(6, 5, seed=4).T + normal(6, seed=5),
    ),
    "matmul": (lambda x, y: mb.matmul(x=x, y=y), {"x": normal(2, 3, 4), "y": normal(4, 5)}, np.matmul),
    "matmul transposed x": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True),
        {"x": normal(2, 4, 3), "y": normal(2, 4, 5)},
        lambda x, y: x.swapaxes(-1, -2) @ y,
    ),
    "matmul transposed y": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_y=True),
        {"x": normal(2, 3, 4), "y": normal(2, 5, 4)},
        lambda x, y: x @ y.swapaxes(-1, -2),
    ),
    "einsum": (
        lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        {"x": normal(1, 3, 2, 4), "y": normal(1, 4, 2, 5)},
        lambda x, y: np.einsum("nchw,nwhu->nchu", x, y),
    ),
    "attention": (
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        ATTENTION,
        lambda q, k, v: attention(q, k, v, np.float32(0)),
    ),
    "attention with an added mask": (
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=MASK),
        ATTENTION,
        lambda q, k, v: attention(q, k, v, MASK),
    ),
    "attention with a bool mask": (
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=MASK == 0),
        ATTENTION,
        lambda q, k, v: attention(q, k, v, MASK),
    ),
    "conv valid": (
        lambda x: mb.conv(x=x, weight=normal(5, 4, 3, 3), pad_type="valid"),
        {"x": IMAGE},
        lambda x: naive_conv(x, normal(5, 4, 3, 3), [(0, 0), (0, 0)]),
    ),
    "conv custom, uneven, strided": (
        lambda x: mb.conv(
            x=x,
            weight=normal(5, 4, 3, 3),
            bias=normal(5),
            pad_type="custom",
            pad=[0, 1, 2, 1],
            strides=[2, 1],
        ),
        {"x": IMAGE},
        lambda x: naive_conv(x, normal(5, 4, 3, 3), [(0, 1), (2, 1)], stride=(2, 1), bias=normal(5)),
    ),
    "conv custom, even": (
        lambda x: mb.conv(x=x, weight=normal(5, 4, 3, 3), pad_type="custom", pad=[1, 1, 1, 1]),
        {"x": IMAGE},
        lambda x: naive_conv(x, normal(5, 4, 3, 3), [(1, 1), (1, 1)]),
    ),
    "conv same, strided": (
        # 7 rows by 2: 4 rows, one row of zeros each side; 6 columns by 2: 3, one column of zeros after.
        lambda x: mb.conv(x=x, weight=normal(5, 4, 3, 3), pad_type="same", strides=[2, 2]),
        {"x": IMAGE},
        lambda x: naive_conv(x, normal(5, 4, 3, 3), [(1, 1), (0, 1)], stride=(2, 2)),
    ),
    "conv same_lower, strided": (
        lambda x: mb.conv(x=x, weight=normal(5, 4, 3, 3), pad_type="same_lower", strides=[2, 2]),
        {"x": IMAGE},
        lambda x: naive_conv(x, normal(5, 4, 3, 3), [(1, 1), (1, 0)], stride=(2, 2)),
    ),
    "conv grouped, dilated": (
        lambda x: mb.conv(x=x, weight=normal(6, 2, 2, 2), groups=2, dilations=[2, 3], pad_type="valid"),
        {"x": IMAGE},
        lambda x: naive_conv(x, normal(6, 2, 2, 2), [(0, 0), (0, 0)], dilation=(2, 3), groups=2),
    ),
    "conv 1d": (
        lambda x: mb.conv(x=x, weight=normal(5, 4, 3), pad_type="same"),
        {"x": normal(1, 4, 9)},
        lambda x: naive_conv(x[..., None], normal(5, 4, 3)[..., None], [(1, 1), (0, 0)])[..., 0],
    ),
    "softmax": (
        lambda x: mb.softmax(x=x, axis=1),
        {"x": X},
        lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True),
    ),
    "layer_norm": (
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=positive(5), beta=normal(5), epsilon=1e-3),
        {"x": X},
        lambda x: numpy_layer_norm(x, (-1,), 1e-3) * positive(5) + normal(5),
    ),
    "layer_norm over two axes": (
        lambda x: mb.layer_norm(x=x, axes=[1, 3], gamma=positive(3, 5), beta=normal(3, 5), epsilon=1e-5),
        {"x": X},
        lambda x: (
            numpy_layer_norm(x, (1, 3), 1e-5) * positive(3, 5)[None, :, None] + normal(3, 5)[None, :, None]
        ),
    ),
    "instance_norm": (
        lambda x: mb.instance_norm(x=x, gamma=GAMMA, beta=BETA, epsilon=1e-3),
        {"x": IMAGE},
        lambda x: F.instance_norm(tensor(x), weight=tensor(GAMMA), bias=tensor(BETA), eps=1e-3),
    ),
    "batch_norm": (
        lambda x: mb.batch_norm(x=x, mean=BETA, variance=GAMMA, gamma=BETA + 1, beta=GAMMA, epsilon=1e-3),
        {"x": IMAGE},
        lambda x: F.batch_norm(tensor(x), *map(tensor, (BETA, GAMMA, BETA + 1, GAMMA)), eps=1e-3),
    ),
    "reduce_argmax": (lambda x: mb.reduce_argmax(x=x, axis=1), {"x": X}, lambda x: x.argmax(1)),
    "reduce_argmin": (
        lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True),
        {"x": X},
        lambda x: x.argmin(-1, keepdims=True),
    ),
    "cumsum": (lambda x: mb.cumsum(x=x, axis=2), {"x": X}, lambda x: x.cumsum(2)),
    "cumsum exclusive, reversed": (
        lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        {"x": X},
        lambda x: x[:, ::-1].cumsum(1)[:, ::-1] - x,
    ),
    "reshape": (lambda x: mb.reshape(x=x, shape=[0, -1, 2, 5]), {"x": X}, lambda x: x.reshape(2, 6, 2, 5)),
    "transpose": (
        lambda x: mb.transpose(x=x, perm=[2, 0, 3, 1]),
        {"x": X},
        lambda x: x.transpose(2, 0, 3, 1),
    ),
    "expand_dims": (
        lambda x: mb.expand_dims(x=x, axes=[-1, 1]),
        {"x": normal(2, 3)},
        lambda x: x[:, None, :, None],
    ),
    "squeeze": (lambda x: mb.squeeze(x=x, axes=[1]), {"x": normal(1, 1, 3)}, lambda x: x[:, 0]),
    "squeeze all": (lambda x: mb.squeeze(x=x), {"x": normal(1, 2, 1, 3)}, np.squeeze),
    "concat": (
        lambda x, y: mb.concat(values=(x, y), axis=-2),
        {"x": X, "y": normal(2, 3, 1, 5)},
        lambda x, y: np.concatenate((x, y), -2),
    ),
    "concat interleaved": (
        lambda x, y: mb.concat(values=(x, y), axis=1, interleave=True),
        {"x": X, "y": Y},
        lambda x, y: np.stack((x, y), 2).reshape(2, 6, 4, 5),
    ),
    "stack": (
        lambda x, y: mb.stack(values=(x, y), axis=1),
        {"x": X, "y": Y},
        lambda x, y: np.stack((x, y), 1),
    ),
    "tile": (
        lambda x: mb.tile(x=x, reps=[2, 1, 3]),
        {"x": normal(2, 3, 1)},
        lambda x: np.tile(x, (2, 1, 3)),
    ),
    "slice_by_index": (
        lambda x: mb.slice_by_index(
            x=x,
            begin=[0, 2, 3, 9],
            end=[1, 0, -1, 9],
            stride=[1, -1, 1, 2],
            begin_mask=[False, False, True, True],
            end_mask=[False, True, False, True],
        ),
        {"x": X},
        lambda x: x[0:1, 2::-1, :-1, ::2],
    ),
    "slice_by_index squeezed": (
        lambda x: mb.slice_by_index(
            x=x, begin=[0, -1, 1, 0], end=[2, 0, 3, 5], squeeze_mask=[False, True, False, False]
        ),
        {"x": X},
        lambda x: x[:, -1, 1:3],
    ),
    "slice_by_size": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, -2, 0], size=[1, 2, 1, -1]),
        {"x": X},
        lambda x: x[:1, 1:3, 2:3],
    ),
    "gather": (
        lambda x, i: mb.gather(x=x, indices=i, axis=-2),
        {"x": X, "i": whole(2, 3, high=4)},
        lambda x, i: x.take(i, axis=-2),
    ),
    "gather in batches": (
        lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        {"x": normal(2, 3, 6), "i": whole(2, 4, high=6)},
        lambda x, i: np.stack([a.take(j, axis=1) for a, j in zip(x, i, strict=True)]),
    ),
    "gather_along_axis": (
        lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
        {"x": X, "i": whole(2, 6, 4, 5, high=3)},
        lambda x, i: np.take_along_axis(x, i, 1),
    ),
    "pad": (
        lambda x: mb.pad(x=x, pad=[1, 0, 2, 3], mode="constant", constant_val=0.5),
        {"x": X},
        lambda x: np.pad(x, [(0, 0), (0, 0), (1, 0), (2, 3)], constant_values=0.5),
    ),
    "pad reflect": (
        lambda x: mb.pad(x=x, pad=[0, 0, 0, 0, 1, 2, 3, 0], mode="reflect"),
        {"x": X},
        lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2), (3, 0)], mode="reflect"),
    ),
    "pad replicate": (
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 0], mode="replicate"),
        {"x": X},
        lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2), (3, 0)], mode="edge"),
    ),
    "pixel_shuffle": (lambda x: mb.pixel_shuffle(x=x, upscale_factor=2), {"x": IMAGE}, interleaved),
    "upsample_nearest_neighbor": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        {"x": IMAGE},
        lambda x: x.repeat(2, -2).repeat(3, -1),
    ),
    "upsample_nearest_neighbor, fractional": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.5, scale_factor_width=2.5),
        {"x": IMAGE},
        lambda x: F.interpolate(tensor(x), scale_factor=(1.5, 2.5), mode="nearest"),
    ),
    "resize_nearest_neighbor": (
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=10, target_size_width=4),
        {"x": IMAGE},
        lambda x: F.interpolate(tensor(x), size=(10, 4), mode="nearest"),
    ),
    "band_part": (
        lambda x: mb.band_part(x=x, lower=1, upper=0),
        {"x": X},
        lambda x: np.tril(np.triu(x, -1), 0),
    ),
    "band_part, upper half": (lambda x: mb.band_part(x=x, lower=0, upper=-1), {"x": X}, np.triu),
    "fill": (
        lambda x: mb.add(x=x, y=mb.fill(shape=[4, 5], value=2.5)),
        {"x": X},
        lambda x: x + np.full((4, 5), 2.5, np.float32),
    ),
    "shape": (
        lambda x: mb.mul(x=mb.shape(x=x), y=np.int32(2)),
        {"x": X},
        lambda x: np.array(x.shape) * 2,
    ),
    "range_1d": (
        lambda x: mb.add(x=x, y=mb.range_1d(start=np.int32(2), end=np.int32(9), step=np.int32(3))),
        {"x": whole(3)},
        lambda x: x + np.array([2, 5, 8]),
    ),
    "cast": (
        lambda x: mb.cast(x=x, dtype="int32"),
        {"x": normal(3, 4) * 10},
        lambda x: np.trunc(x),
    ),
    "identity": (lambda x: mb.identity(x=x), {"x": X}, lambda x: x),
}


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + mask
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def naive_conv(
    x: np.ndarray,
    weight: np.ndarray,
    pad: list[tuple[int, int]],
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """A 2-D convolution by its definition: one output value at a time."""
    x = np.pad(x[0].astype(np.float64), [(0, 0), *pad])
    outs, ins, rows, columns = weight.shape
    height = (x.shape[1] - (rows - 1) * dilation[0] - 1) // stride[0] + 1
    width = (x.shape[2] - (columns - 1) * dilation[1] - 1) // stride[1] + 1
    y = np.zeros((1, outs, height, width))
    for o, i, j in np.ndindex(outs, height, width):
        first = o // (outs // groups) * ins
        top, left = i * stride[0], j * stride[1]
        bottom, right = top + (rows - 1) * dilation[0] + 1, left + (columns - 1) * dilation[1] + 1
        patch = x[first : first + ins, top : bottom : dilation[0], left : right : dilation[1]]
        y[0, o, i, j] = (patch * weight[o]).sum() + (0 if bias is None else bias[o])
    return y


@pytest.mark.parametrize("case", CASES)
def test_operation(tmp_path: Path, case: str) -> None:
    build, inputs, expected = CASES[case]
    (got,) = execute(tmp_path, build, inputs)
    want = np.asarray(expected(*inputs.values()))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"split_sizes": [1, 4]}, {"num_splits": 5}])
def test_split(tmp_path: Path, sizes: dict[str, Any]) -> None:
    got = execute(tmp_path, lambda x: mb.split(x=x, axis=-1, **sizes), {"x": X})
    want = np.split(X, [1] if "split_sizes" in sizes else 5, axis=-1)
    assert len(got) == len(want)
    for part, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(part, expected)


# --- precision ------------------------------------------------------------------------------------------


def test_float16_rounds_each_result_once(tmp_path: Path) -> None:
    """Products and sums of halves are rounded between operations, not inside one."""
    x, y = (normal(64, 64, seed=i).astype(np.float16) for i in range(2))

    def build(x: Any, y: Any) -> Any:
        return mb.reduce_sum(x=mb.mul(x=x, y=y), axes=[1], keep_dims=False)

    (got,) = execute(tmp_path, build, {"x": x, "y": y})
    products = (x.astype(np.float32) * y.astype(np.float32)).astype(np.float16)
    sums = products.astype(np.float64).sum(1)
    np.testing.assert_array_equal(got, sums.astype(np.float32).astype(np.float16))
    assert got.dtype == np.float16


def test_float16_sum_is_wide_inside(tmp_path: Path) -> None:
    """4,096 ones: a sum kept in float16 stops at 2,048."""
    x = np.ones((1, 4096), np.float16)
    (got,) = execute(tmp_path, lambda x: mb.reduce_sum(x=x, axes=[1]), {"x": x})
    assert float(got[0]) == 4096


# --- compressed constants -------------------------------------------------------------------------------


def dequantized(tmp_path: Path, build: Callable[[], Any], shape: tuple[int, ...], opset: Any) -> np.ndarray:
    """What a compressed constant decompresses to: it leaves the program added to zeros."""
    zeros = np.zeros(shape, np.float32)
    (got,) = execute(tmp_path, lambda x: mb.add(x=x, y=build()), {"x": zeros}, opset)
    return got


@pytest.mark.parametrize("vector", [True, False])
def test_affine_dequantize(tmp_path: Path, vector: bool) -> None:
    q = np.random.default_rng(0).integers(-128, 128, (4, 6), dtype=np.int8)
    scale = positive(6) if vector else np.float32(0.03)
    zero = np.arange(6, dtype=np.int8) - 3 if vector else np.int8(-5)
    got = dequantized(
        tmp_path,
        lambda: mb.constexpr_affine_dequantize(quantized_data=q, zero_point=zero, scale=scale, axis=1),
        q.shape,
        IOS16,
    )
    np.testing.assert_allclose(got, scale * (q.astype(np.float32) - zero), rtol=1e-6)


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("kind", ["int4", "uint4", "int8"])
def test_blockwise_shift_scale(tmp_path: Path, kind: str, with_offset: bool) -> None:
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128)}[kind]
    rng = np.random.default_rng(1)
    dtype = types.nptype_from_builtin(getattr(types, kind))
    q, zero = (rng.integers(low, high, s).astype(dtype) for s in ((4, 64, 3, 3), (4, 2, 1, 1)))
    scale = positive(4, 2, 1, 1)
    offset = {"offset": zero} if with_offset else {}
    got = dequantized(
        tmp_path,
        lambda: mb.constexpr_blockwise_shift_scale(data=q, scale=scale, **offset),
        q.shape,
        IOS18,
    )
    shifted = q.astype(np.float32) - (zero.astype(np.float32).repeat(32, 1) if with_offset else 0)
    np.testing.assert_allclose(got, scale.repeat(32, 1) * shifted, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_one_palette(tmp_path: Path, bits: int) -> None:
    """iOS16's form: one palette, indices packed across byte borders."""
    rng = np.random.default_rng(bits)
    indices, palette = rng.integers(0, 2**bits, (5, 7)), normal(2**bits)
    planes = (indices.reshape(-1, 1) >> np.arange(bits)) & 1
    packed = np.packbits(planes.astype(np.uint8).reshape(-1), bitorder="little")
    got = dequantized(
        tmp_path,
        lambda: mb.constexpr_lut_to_dense(indices=packed, lut=palette, shape=np.array([5, 7], np.uint32)),
        (5, 7),
        IOS16,
    )
    np.testing.assert_array_equal(got, palette[indices])


def test_palettes_per_group(tmp_path: Path) -> None:
    indices = np.random.default_rng(0).integers(0, 4, (6, 8)).astype(types.nptype_from_builtin(types.uint2))
    palettes = normal(3, 1, 4, 1)
    got = dequantized(
        tmp_path, lambda: mb.constexpr_lut_to_dense(indices=indices, lut=palettes), (6, 8), IOS18
    )
    want = np.stack([palettes[i // 2, 0, indices[i].astype(int), 0] for i in range(6)])
    np.testing.assert_array_equal(got, want)


def test_palette_of_vectors(tmp_path: Path) -> None:
    indices = (
        np.random.default_rng(0).integers(0, 2, (2, 2, 2)).astype(types.nptype_from_builtin(types.uint1))
    )
    palette = normal(1, 1, 1, 2, 3)
    got = dequantized(
        tmp_path,
        lambda: mb.constexpr_lut_to_dense(indices=indices, lut=palette, vector_axis=np.int32(1)),
        (2, 6, 2),
        IOS18,
    )
    want = np.zeros((2, 6, 2), np.float32)
    for i, j, k in np.ndindex(2, 2, 2):
        want[i, 3 * j : 3 * j + 3, k] = palette[0, 0, 0, int(indices[i, j, k])]
    np.testing.assert_array_equal(got, want)


def test_constexpr_cast(tmp_path: Path) -> None:
    half = normal(4, 5).astype(np.float16)
    got = dequantized(
        tmp_path, lambda: mb.constexpr_cast(source_val=half, output_dtype="fp32"), (4, 5), IOS16
    )
    np.testing.assert_array_equal(got, half.astype(np.float32))


# --- the weight file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "dtype", "low", "high"),
    [
        ("INT4", np.int8, -8, 8),
        ("UINT1", np.uint8, 0, 2),
        ("UINT2", np.uint8, 0, 4),
        ("UINT3", np.uint8, 0, 8),
        ("UINT4", np.uint8, 0, 16),
        ("UINT6", np.uint8, 0, 64),
        ("UINT8", np.uint8, 0, 256),
        ("INT8", np.int8, -128, 128),
        ("INT16", np.int16, -(2**15), 2**15),
        ("UINT16", np.uint16, 0, 2**16),
        ("INT32", np.int32, -(2**31), 2**31),
        ("FLOAT32", np.float32, -5, 5),
    ],
)
def test_blobs_as_apples_writer_writes_them(
    tmp_path: Path, element: str, dtype: type, low: int, high: int
) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    rng = np.random.default_rng(0)
    arrays = [rng.integers(low, high, n).astype(dtype) for n in (13, 1, 64)]
    write = getattr(writer, f"write_{element.lower().replace('float32', 'float')}_data")
    offsets = [write(a) for a in arrays]
    del writer  # closes the file
    weights = mil_reader.WeightFile(path)
    for array, offset in zip(arrays, offsets, strict=True):
        np.testing.assert_array_equal(weights.read(offset, element, array.shape), array)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with 1,000 weights in its weight file, and x (1, 40) → y (1, 25)."""
    return save(tmp_path, lambda x: mb.linear(x=x, weight=normal(25, 40)), {"x": normal(1, 40)})


def weight_file(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


@pytest.mark.parametrize("keep", [0, 10, 100, 2000])
def test_truncated_weights(package: Path, keep: int) -> None:
    path = weight_file(package)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        RuntimeFailure, match=r"weight\.bin: the weight file (is truncated|cannot be read)"
    ) as caught:
        MilInterpreter.open(package)
    assert "\n" not in str(caught.value)


def test_weights_of_another_type(package: Path) -> None:
    path = weight_file(package)
    data = bytearray(path.read_bytes())
    data[64:72] = struct.pack("<II", 0xDEADBEEF, 1)
    path.write_bytes(data)
    with pytest.raises(RuntimeFailure, match="offset 64: expected a blob of FLOAT32"):
        MilInterpreter.open(package)


def test_missing_weights(package: Path) -> None:
    weight_file(package).unlink()
    with pytest.raises(RuntimeFailure, match=r"weight\.bin"):
        MilInterpreter.open(package)


def test_not_a_specification(package: Path) -> None:
    (package / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(b"\xff" * 100)
    with pytest.raises(RuntimeFailure, match="expected a Core ML specification"):
        MilInterpreter.open(package)


def test_manifest_that_leaves_the_package(package: Path) -> None:
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../elsewhere.mlmodel"
    path.write_text(json.dumps(manifest))
    with pytest.raises(RuntimeFailure, match=r"elsewhere\.mlmodel inside, found none"):
        MilInterpreter.open(package)


def test_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"expected a package with Manifest\.json"):
        MilInterpreter.open(tmp_path)


# --- the program ----------------------------------------------------------------------------------------


def test_unknown_operations_are_named_at_once(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return mb.atan(x=mb.relu(x=mb.sinh(x=x, name="rises")), name="bends")

    path = save(tmp_path, build, {"x": X})
    with pytest.raises(RuntimeFailure) as caught:
        MilInterpreter.open(path)
    message = str(caught.value)
    assert "sinh (output rises)" in message and "atan (output bends)" in message
    assert "relu (output" not in message
    assert "known: abs, add," in message and "\n" not in message


def test_unknown_parameter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is ignored would be a wrong result."""
    path = save(tmp_path, lambda x: mb.gelu(x=x, mode="EXACT", name="bend"), {"x": X})
    plain = mil_interpreter.Definition(lambda x: x, moves=False)
    monkeypatch.setitem(mil_interpreter.OPERATIONS, "gelu", plain)
    with pytest.raises(RuntimeFailure, match=r"gelu \(output bend\): parameters without a definition: mode"):
        MilInterpreter.open(path)


def test_shape_other_than_declared_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, lambda x: mb.relu(x=x, name="y"), {"x": X})
    monkeypatch.setitem(
        mil_interpreter.OPERATIONS, "relu", mil_interpreter.Definition(lambda x: x[:1], moves=False)
    )
    with pytest.raises(
        RuntimeFailure, match=r"relu \(output y\): expected the declared shape \(2, 3, 4, 5\)"
    ):
        MilInterpreter.open(path).run({"x": X})


def test_index_out_of_range_names_the_operation(tmp_path: Path) -> None:
    x, i = normal(4, 3), np.array([1, 7], np.int32)
    path = save(tmp_path, lambda x, i: mb.gather(x=x, indices=i, axis=0, name="rows"), {"x": x, "i": i})
    with pytest.raises(RuntimeFailure, match=r"gather \(output rows\) failed"):
        MilInterpreter.open(path).run({"x": x, "i": i})


def test_wrong_inputs(package: Path) -> None:
    interpreter = MilInterpreter.open(package)
    with pytest.raises(ValueError, match="expected inputs"):
        interpreter.run({"z": normal(1, 40)})
    with pytest.raises(ValueError, match=r"input x: expected shape \(1, 40\), got \(1, 41\)"):
        interpreter.run({"x": normal(1, 41)})


def test_tensors_are_freed_after_their_last_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(x))
        alive.append(sum(ref() is not None for ref in seen))
        return x + 1

    def build(x: Any) -> Any:
        for _ in range(8):
            x = mb.relu(x=x)
        return x

    path = save(tmp_path, build, {"x": X})
    monkeypatch.setitem(mil_interpreter.OPERATIONS, "relu", mil_interpreter.Definition(spy, moves=False))
    interpreter = MilInterpreter.open(path)
    (got,) = interpreter.run({"x": X}).values()
    np.testing.assert_allclose(got, X + 8, rtol=1e-6)
    assert len(alive) == 8 and max(alive) <= 2


def test_reading_a_package_imports_neither_torch_nor_coremltools(package: Path) -> None:
    """coremltools' own import takes seconds and prints; its message classes need none of it."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from edgeflow.runtimes.mil_reader import read_package; "
        f"print(len(read_package(Path({str(package)!r})).operations)); "
        "sys.exit(bool({'torch', 'coremltools'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2


def test_stable_diffusions_own_decoder(tmp_path: Path) -> None:
    """AutoencoderKL's decoder, which the contract tests' checkpoint lacks: attention, group norms."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()
    latent = normal(1, 4, 6, 6)
    program = torch.export.export(vae.decoder, (tensor(latent),)).run_decompositions({})
    model = ct.convert(
        program,
        inputs=[ct.TensorType(name="latent", shape=latent.shape, dtype=np.float32)],
        outputs=[ct.TensorType(name="image", dtype=np.float32)],
        minimum_deployment_target=IOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "decoder.mlpackage"))
    got = MilInterpreter.open(tmp_path / "decoder.mlpackage").run({"latent": latent})["image"]
    with torch.no_grad():
        want = vae.decoder(tensor(latent)).numpy()
    assert got.shape == (1, 3, 12, 12)
    np.testing.assert_allclose(got, want, atol=1e-5)
