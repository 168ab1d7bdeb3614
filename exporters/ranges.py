"""What a program computes on real inputs, node by node: its output, and how large every value gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeflow.errors import ExportError
from edgeflow.exporters.program import Program
from edgeflow.overflow import LIMIT, Range

_DTYPES = {"float32": torch.float32, "int32": torch.int32}


def run_recorded(program: Program, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Any], list[Range]]:
    """The program in eager fp32 on arrays by the spec's names: its outputs, and a Range for every float node.

    Raises ExportError naming the first node whose value is not finite.
    """
    recorder = _Recorder(program)
    tensors = [torch.as_tensor(inputs[t.name]).to(_DTYPES[t.dtype]) for t in program.spec.inputs]
    with torch.no_grad():
        result = recorder.run(*tensors)
    results = result if isinstance(result, (tuple, list)) else (result,)
    names = [t.name for t in program.spec.outputs]
    return {n: r.numpy() for n, r in zip(names, results, strict=True)}, recorder.ranges


class _Recorder(torch.fx.Interpreter):
    def __init__(self, program: Program):
        super().__init__(program.exported.module())
        self.ranges: list[Range] = []
        self._graph = program.spec.name

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            name = getattr(n.target, "_schema", None)
            op = name.name.partition("::")[2] if name is not None else str(n.target)
            args = [self.env.get(a) if isinstance(a, torch.fx.Node) else a for a in n.args]
            found = Range(n.name, op, _module(n), _largest(result), _inside(op, args, n.kwargs, self.env))
            if not found.finite:
                raise ExportError(
                    f"export: {self._graph}: {found.place}: expected finite values in fp32 on the model's "
                    f"own prompts, got {found.largest}"
                )
            self.ranges.append(found)
        return result


def _largest(x: Tensor) -> float:
    """The largest magnitude, without a copy; NaN where there is one."""
    if not x.numel():
        return 0.0
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))


def _inside(op: str, args: list[Any], kwargs: Mapping[str, Any], env: Mapping[Any, Any]) -> float:
    """The largest value that an operation computes on its way: a norm's squares, an attention's logits.

    Of logits that float16 certainly holds it is a bound, which costs less than the logits.
    """
    if op == "group_norm":
        x, groups = args[0], args[1]
        x = x.reshape(x.shape[0], groups, -1)
        return max(_largest(g - g.mean()) ** 2 for rows in x for g in rows)
    if op == "scaled_dot_product_attention":
        q, k = (t.reshape(-1, *t.shape[-2:]) for t in args[:2])
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        # A product of two vectors is at most that of their lengths; where that is small, none is computed.
        lengths = [t.norm(dim=-1).amax(dim=-1) for t in (q, k)]
        bound = float(scale * (lengths[0] * lengths[1]).amax())
        return bound if bound <= LIMIT else max(scale * _largest(a @ b.T) for a, b in zip(q, k, strict=True))
    return 0.0


def _module(node: torch.fx.Node) -> str:
    """The module that the node was traced in, by its path."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
