"""What the arithmetic operations of a MIL program mean, in PyTorch.

Each function is one operation of coremltools' ``converters/mil/mil/ops/defs``, with that definition's
parameter names and defaults. It computes in the dtype of the tensors it is given; the interpreter decides
that dtype and rounds the result. Moving operations are in ``mil_layout_ops``, compressed constants in
``mil_constexpr_ops``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

#: An operation's result: one tensor, or as many as it has outputs.
Result: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Definition:
    """``moves``: the operation only places values, so it needs no wider dtype to compute in."""

    function: Callable[..., Result]
    moves: bool


OPERATIONS: dict[str, Definition] = {}


def operation(*names: str, moves: bool = False) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as the meaning of the operations called ``names``."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        for name in names:
            OPERATIONS[name] = Definition(function, moves)
        return function

    return register


def ints(value: Tensor | Sequence[int]) -> list[int]:
    """A parameter that is a vector of numbers, as Python ints."""
    return [int(v) for v in (value.reshape(-1).tolist() if isinstance(value, Tensor) else value)]


def flag(value: Tensor | bool) -> bool:
    """A parameter that is one truth value."""
    return bool(value)


# --- elementwise ----------------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "real_div": torch.true_divide,
    "sub": torch.sub,
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Result]:
    def compute(x: Tensor) -> Tensor:
        return function(x)

    return compute


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Result]:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return compute


for _name, _one in _UNARY.items():
    operation(_name)(_unary(_one))
for _name, _two in _BINARY.items():
    operation(_name)(_binary(_two))


@operation("clip")
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, alpha), beta)


@operation("inverse")
def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


@operation("log")
def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@operation("rsqrt")
def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return 1 / torch.sqrt(x + epsilon)


@operation("leaky_relu")
def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@operation("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"mode {mode!r}; known: EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION")


@operation("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


# --- matrix products ------------------------------------------------------------------------------------


@operation("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@operation("matmul")
def matmul(
    x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False
) -> Tensor:
    # Transposing has no effect on a vector.
    x = x.mT if flag(transpose_x) and x.dim() > 1 else x
    y = y.mT if flag(transpose_y) and y.dim() > 1 else y
    return torch.matmul(x, y)


@operation("einsum")
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@operation("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """A bool mask says who takes part; a float mask is added to the logits."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


@operation("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    """x (N, C, *D), weight (O, C / groups, *K); a convolution of one to three dimensions."""
    rank = x.dim() - 2
    stride = [1] * rank if strides is None else ints(strides)
    dilation = [1] * rank if dilations is None else ints(dilations)
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    pairs = _padding(pad_type, None if pad is None else ints(pad), list(x.shape[2:]), reach, stride)
    if any(before != after for before, after in pairs):
        x = F.pad(x, [amount for pair in reversed(pairs) for amount in pair])
        pairs = [(0, 0)] * rank
    padding = [before for before, _ in pairs]
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * rank, int(groups))


def _padding(
    pad_type: str, pad: list[int] | None, sizes: list[int], reach: list[int], stride: list[int]
) -> list[tuple[int, int]]:
    """Zeros before and after each spatial dimension. ``reach`` is the kernel's extent with its dilation."""
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        amounts = pad or [0] * (2 * len(sizes))
        return list(zip(amounts[::2], amounts[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type!r}; known: valid, custom, same, same_lower")
    pairs = []
    for size, extent, step in zip(sizes, reach, stride, strict=True):
        total = max(0, (math.ceil(size / step) - 1) * step + extent - size)
        less, more = total // 2, total - total // 2
        pairs.append((more, less) if pad_type == "same_lower" else (less, more))
    return pairs


# --- normalization and reduction ------------------------------------------------------------------------


@operation("softmax")
def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    return torch.softmax(x, int(axis))


def _normalized(x: Tensor, axes: list[int], epsilon: Tensor | float) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    return centered / torch.sqrt(centered.square().mean(axes, keepdim=True) + epsilon)


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: list[int]) -> Tensor:
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


@operation("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """Over ``axes`` together (all by default); gamma and beta have the shape of those axes."""
    over = [a % x.dim() for a in (range(x.dim()) if axes is None else ints(axes))]
    shape = [size if i in over else 1 for i, size in enumerate(x.shape)]
    return _scaled(_normalized(x, over, epsilon), gamma, beta, shape)


@operation("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    """x (N, C, *D): each channel of each picture over its own places."""
    channels = [1, -1] + [1] * (x.dim() - 2)
    return _scaled(_normalized(x, list(range(2, x.dim())), epsilon), gamma, beta, channels)


@operation("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """x (N, C, *D) by a given mean and variance per channel."""
    channels = [1, -1] + [1] * (x.dim() - 2)
    deviation = torch.sqrt(variance + epsilon).reshape(channels)
    return _scaled((x - mean.reshape(channels)) / deviation, gamma, beta, channels)


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum_exp": torch.logsumexp,
    "reduce_max": torch.amax,
    "reduce_mean": torch.mean,
    "reduce_min": torch.amin,
    "reduce_sum": torch.sum,
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Result]:
    def compute(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        return function(x, list(range(x.dim())) if axes is None else ints(axes), flag(keep_dims))

    return compute


for _name, _many in _REDUCTIONS.items():
    operation(_name)(_reduction(_many))


def _arg_reduction(function: Callable[..., Tensor]) -> Callable[..., Result]:
    def compute(
        x: Tensor,
        axis: Tensor | int = -1,
        keep_dims: Tensor | bool = False,
        output_dtype: str = "int32",  # the interpreter rounds to the declared type, which says the same
    ) -> Tensor:
        return function(x, int(axis), flag(keep_dims))

    return compute


operation("reduce_argmax")(_arg_reduction(torch.argmax))
operation("reduce_argmin")(_arg_reduction(torch.argmin))


@operation("cumsum")
def cumsum(
    x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | bool = False, reverse: Tensor | bool = False
) -> Tensor:
    """Sums along an axis, from its end when ``reverse``; ``exclusive`` leaves out the element itself."""
    dim = int(axis)
    x = x.flip(dim) if flag(reverse) else x
    sums: Any = torch.cumsum(x, dim)
    sums = sums - x if flag(exclusive) else sums
    return sums.flip(dim) if flag(reverse) else sums
