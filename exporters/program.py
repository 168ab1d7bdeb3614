"""One ``torch.export`` per component: the program that every exporter lowers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgeflow.components import Component, ComponentSpec
from edgeflow.errors import ExportError
from edgeflow.overflow import Wide


@dataclass(frozen=True)
class Program:
    """A component's spec and its graph. Exporters must leave both as they are: all of them share it.

    ``wide`` is what must stay float32 where the graph is lowered to float16.
    """

    spec: ComponentSpec
    exported: ExportedProgram
    module: nn.Module  # what was exported, float32, for backends that rewrite it first
    example: tuple[Tensor, ...]
    wide: Wide = field(default_factory=Wide)


def dequantize_op() -> Any:
    """The one op that quantized weights come from; see edgeflow.quantization.layers."""
    from edgeflow.quantization import layers  # noqa: F401 - defines the op

    return torch.ops.edgeflow.dequantize.default


def quantize_activation_op() -> Any:
    """The op that rounds a layer's input; see edgeflow.quantization.layers."""
    from edgeflow.quantization import layers  # noqa: F401 - defines the op

    return torch.ops.edgeflow.quantize_activation.default


def has_quantized_weights(program: Program) -> bool:
    """Whether some weight of the program is integers and scales."""
    return bool(program.exported.graph_module.graph.find_nodes(op="call_function", target=dequantize_op()))


def build_program(component: Component) -> Program:
    """Export the component's module once, batch 1, static shapes. Raises ExportError naming the component."""
    args = tuple(component.example[t.name] for t in component.spec.inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(component.module, args)
    except Exception as error:  # torch.export raises whatever the traced code raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"export: {component.spec.name}: torch.export cannot take it: {reason}") from error
    return Program(component.spec, exported, component.module, args)
