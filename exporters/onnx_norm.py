"""Group norm as ONNX's ``InstanceNormalization`` over the groups, then one factor and one summand a channel.

ONNX Runtime has no kernel for ``GroupNormalization`` on a CPU: it takes each apart into some thirty
operations, several of which pass over the whole picture, and takes longer to open the graph
(docs/fusions.md has the figures). ``InstanceNormalization`` is one kernel there. It sums in the graph's own
precision, so float16 graphs keep it in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnxscript import opset21 as op

#: What stays float32 in a float16 graph.
SINGLE = "InstanceNormalization"


def _translate(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Any:
    """x (1, C, …) → the same shape."""
    shape = [int(size) for size in x.shape]
    groups = [shape[0], num_groups, math.prod(shape[1:]) // num_groups]
    ones = op.Constant(value_floats=[1.0] * num_groups)
    zeros = op.Constant(value_floats=[0.0] * num_groups)
    folded = op.Reshape(x, op.Constant(value_ints=groups))
    normal = op.InstanceNormalization(folded, ones, zeros, epsilon=eps)
    y = op.Reshape(normal, op.Constant(value_ints=shape))
    channels = op.Constant(value_ints=[shape[1], *(1 for _ in shape[2:])])
    y = y if weight is None else op.Mul(y, op.Reshape(weight, channels))
    return y if bias is None else op.Add(y, op.Reshape(bias, channels))


TRANSLATIONS = {torch.ops.aten.group_norm.default: _translate}
