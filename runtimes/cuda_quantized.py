"""A quantized checkpoint's own integers on the GPU, through torchao's int8 tensors.

Linear layers of 8 bits with one scale an output channel run from their integers: weight-only, or, where the
recipe rounds activations, with activations rounded to int8 row by row as they come. All other quantized
layers (convolutions, embeddings, groups of 4 bits, tables) have no such kernel: their weights are made float
once, when the model is loaded, so that they are those of the recipe but no smaller.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeflow import gpu_device
from edgeflow.errors import RuntimeFailure
from edgeflow.sharing import placed_children, sharing_copy


def float_layers(module: nn.Module, *, everything: bool = False) -> tuple[nn.Module, dict[str, int]]:
    """A copy whose quantized layers are plain ones of the same weights, but those that stay integers.

    ``everything``: those too. The counts say how many stay and how many became float; none for a
    float model.
    """
    if not any(hasattr(m, "weight_q") for m in module.modules()):
        return module, {}
    twin = sharing_copy(module)
    counts = {"int8 linear": 0, "made float": 0}
    for parent, name, layer in placed_children(twin):
        if not hasattr(layer, "weight_q"):
            continue
        if _has_kernel(layer) and not everything:
            counts["int8 linear"] += 1
        else:
            setattr(parent, name, _plain(layer))
            counts["made float"] += 1
    return twin, counts


def _has_kernel(layer: Any) -> bool:
    return (
        isinstance(layer, nn.Linear)
        and layer.weight_palette is None
        and layer.weight_zero_point is None
        and layer.weight_bits == 8
        and layer.weight_scale.numel() == layer.out_features
    )


def _plain(layer: Any) -> nn.Module:
    """The float layer of the same class, whose weight is the dequantized one."""
    cls = next(c for c in (nn.Linear, nn.Conv2d, nn.Embedding) if isinstance(layer, c))
    plain = cls.__new__(cls)
    nn.Module.__init__(plain)
    own = {k: v for k, v in layer.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
    plain.__dict__.update(own)
    plain.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    if cls is not nn.Embedding:
        plain.register_parameter("bias", layer.bias)
    return plain


def integer_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn the layers that stayed integers into linear layers of torchao's tensors, in place."""
    found = [placed for placed in placed_children(module) if hasattr(placed[2], "weight_q")]
    if not found:
        return
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    for parent, name, child in found:
        layer: Any = child
        rounds = QuantizeTensorToInt8Kwargs(PerRow()) if layer.input_scale is not None else None
        scale = layer.weight_scale.reshape(-1, 1)
        block = [1, layer.in_features]
        weight = Int8Tensor(layer.weight_q, scale, block, dtype, act_quant_kwargs=rounds)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = layer.bias
        setattr(parent, name, linear)


def to_integers(module: nn.Module, *, activations: bool) -> nn.Module:
    """A copy whose large linear layers are quantized to the nearest by the scheme w8, as the recipe w8 does.

    ``activations``: with a mark that makes ``integer_linears`` round activations row by row.
    """
    from edgeflow.quantization.layers import replace_weight
    from edgeflow.quantization.schemes import SCHEMES, quantize

    twin = sharing_copy(module)
    with torch.no_grad():
        for parent, name, layer in placed_children(twin):
            if type(layer) is nn.Linear:
                q, scale, _ = quantize(layer.weight.float(), SCHEMES["w8"])
                plain = sharing_copy(layer)
                grid = (torch.ones(()), torch.zeros((), dtype=torch.uint8)) if activations else None
                replace_weight(plain, q, scale, None, 8, grid)
                setattr(parent, name, plain)
    return twin


def float8_linears(module: nn.Module) -> int:
    """Let linear layers multiply in float8, weights and activations scaled row by row, in place; how many.

    Raises RuntimeFailure on a chip without float8.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    chip = gpu_device.require_chip()
    if not chip.has_fp8:
        raise RuntimeFailure(
            f"runtime cuda: {chip.name}: float8: expected compute capability 8.9 or later, got "
            "{}.{}".format(*chip.capability)
        )
    fits = [
        m
        for m in module.modules()
        if type(m) is nn.Linear and m.in_features % 16 == 0 and m.out_features % 16 == 0
    ]
    # Its own settings of the compiler tune each kernel by descent: nine minutes and more for a full UNet, and
    # they stay for whatever is compiled after it.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(module, config, filter_fn=lambda m, name: any(m is other for other in fits))
    return len(fits)
