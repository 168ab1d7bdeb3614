"""Export-ready modules rewritten for Apple's Neural Engine: channels first, heads apart, queries in chunks.

The layout is the one that Apple describes for its engine ("Deploying Transformers on the Apple Neural
Engine", machinelearning.apple.com, 2022): tensors (B, C, 1, S) with the sequence last, every linear layer a
1×1 convolution, each head a product of its own (an einsum that Core ML maps without transposing), and at most
512 queries at once. The function is the same up to rounding; parity reports what it changed as the rewrite
gap, and the tests hold every module against the one that it stands for.

What is rewritten: the UNet's transformers, the autoencoder's attention, CLIP's text transformer. Residual
blocks are convolutions already. A linear layer of integers keeps its integers: they get two axes of length 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.components import TextEncoder, TextLayer
from edgeflow.errors import ExportError
from edgeflow.sharing import sharing_copy

#: Queries that one product takes.
QUERIES = 512
#: Batch, channel of the first factor, one row, sequence: the one product that both halves of attention are.
_PRODUCT = "nchw,nwhu->nchu"


def split_einsum(module: nn.Module) -> nn.Module:
    """A copy of an export-ready module in the Neural Engine's layout; tensors are shared with the original.

    Raises ExportError for an attention or a layer of a form that it has no rewrite for.
    """
    twin = sharing_copy(module)
    if isinstance(twin, TextEncoder):
        return SplitTextEncoder(twin).eval()
    _replace(twin)
    return twin.eval().requires_grad_(False)


def _replace(module: nn.Module) -> None:
    """Put what stands for them in the place of the outermost modules that are known."""
    for name, child in list(module.named_children()):
        kind = _KINDS.get(type(child).__name__)
        if kind is None:
            _replace(child)
        else:
            setattr(module, name, kind(child))


# --- layers ---------------------------------------------------------------------------------------------


def as_convolution(layer: Any) -> nn.Conv2d:
    """A linear layer (O, I) as a 1×1 convolution (O, I, 1, 1) over the same numbers or integers."""
    if type(layer) is nn.Conv2d or type(layer).__name__ == "QuantizedConv2d":
        return layer
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, device="meta")
    conv.bias = layer.bias
    if type(layer) is nn.Linear:
        conv.weight = nn.Parameter(_seen(layer.weight), requires_grad=False)
        return conv
    _expect(type(layer).__name__ == "QuantizedLinear", f"linear layers, got {type(layer).__name__}")
    from edgeflow.quantization.layers import replace_weight

    q, scale, zero_point = (
        None if t is None else _seen(t) for t in (layer.weight_q, layer.weight_scale, layer.weight_zero_point)
    )
    grid = None if layer.input_scale is None else (layer.input_scale, layer.input_zero_point)
    replace_weight(conv, q, scale, zero_point, layer.weight_bits, grid, layer.weight_palette)  # type: ignore[arg-type]
    return conv


def _seen(weight: Tensor) -> Tensor:
    return weight.detach()[:, :, None, None]


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, 1, S)."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        _expect(norm.weight is not None and norm.bias is not None, "layer norms with a factor and a summand")
        self.eps = norm.eps
        self.weight = nn.Parameter(norm.weight.detach()[:, None, None], requires_grad=False)
        self.bias = nn.Parameter(norm.bias.detach()[:, None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        variance = (centred * centred).mean(dim=1, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q (B, H·d, 1, S), k and v (B, H·d, 1, T) → (B, H·d, 1, S), head by head, QUERIES queries at a time.

    ``mask`` (1, T, 1, S) is added to the logits.
    """
    width = q.shape[1] // heads
    keys = _parts(k.transpose(1, 3), width, 3)  # (B, T, 1, d) each
    values = _parts(v, width, 1)
    chunks = _parts(q * width**-0.5, QUERIES, 3)
    masks = [None] * len(chunks) if mask is None else _parts(mask, QUERIES, 3)
    made = []
    for queries, part in zip(chunks, masks, strict=True):
        of_head = zip(_parts(queries, width, 1), keys, values, strict=True)
        made.append(_joined([_head(*head, part) for head in of_head], 1))
    return _joined(made, 3)


def _parts(x: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """Parts of ``size`` and what is left; coremltools takes no split that splits nothing."""
    return (x,) if x.shape[dim] <= size else x.split(size, dim)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, d, 1, S), k (B, T, 1, d), v (B, d, 1, T) → (B, d, 1, S)."""
    logits = torch.einsum(_PRODUCT, k, q)  # (B, T, 1, S)
    weights = (logits if mask is None else logits + mask).softmax(dim=1)
    return torch.einsum(_PRODUCT, v, weights)


class _Attention(nn.Module):
    """diffusers' Attention over (B, C, 1, S), its projections convolutions; ``states`` are (B, D, 1, T)."""

    def __init__(self, attn: Any):
        super().__init__()
        extras = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "add_q_proj", "add_k_proj")
        strange = [name for name in extras if getattr(attn, name, None) is not None]
        _expect(not strange, f"plain attention, got one with {', '.join(strange)}")
        self.heads = attn.heads
        self.to_q, self.to_k, self.to_v = (as_convolution(x) for x in (attn.to_q, attn.to_k, attn.to_v))
        self.to_out = as_convolution(attn.to_out[0])

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.to_out(attention(self.to_q(x), self.to_k(states), self.to_v(states), self.heads))


class _Gated(nn.Module):
    """diffusers' feed-forward layer with its gate: (B, C, 1, S) → (B, C, 1, S)."""

    def __init__(self, ff: Any):
        super().__init__()
        kinds = [type(x).__name__ for x in ff.net]
        _expect(kinds[0] == "GEGLU" and len(kinds) == 3, f"GEGLU feed-forward layers, got {kinds}")
        self.proj_in, self.proj_out = as_convolution(ff.net[0].proj), as_convolution(ff.net[2])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=1)
        return self.proj_out(value * F.gelu(gate))


class _Block(nn.Module):
    """diffusers' BasicTransformerBlock: (B, C, 1, S) → (B, C, 1, S); ``states`` are (B, D, 1, T)."""

    def __init__(self, block: Any):
        super().__init__()
        plain = block.norm_type == "layer_norm" and block.pos_embed is None and block.attn2 is not None
        _expect(plain, f"blocks of layer norms and two attentions, got norm {block.norm_type!r}")
        self.only_cross = block.only_cross_attention
        self.crosses = block.attn2.is_cross_attention
        self.norm1, self.norm2, self.norm3 = (ChannelNorm(n) for n in (block.norm1, block.norm2, block.norm3))
        self.attn1, self.attn2, self.ff = _Attention(block.attn1), _Attention(block.attn2), _Gated(block.ff)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, states if self.only_cross else h)
        h = self.norm2(x)
        x = x + self.attn2(h, states if self.crosses else h)
        return x + self.ff(self.norm3(x))


# --- what stands in the modules -------------------------------------------------------------------------


class SplitTransformer(nn.Module):
    """diffusers' Transformer2DModel: (B, C, H, W) and states (B, T, D) → a tuple of (B, C, H, W)."""

    def __init__(self, model: Any):
        super().__init__()
        _expect(model.is_input_continuous, "transformers over pictures")
        self.norm, self.proj_in, self.proj_out = (
            model.norm,
            as_convolution(model.proj_in),
            as_convolution(model.proj_out),
        )
        self.blocks = nn.ModuleList(_Block(block) for block in model.transformer_blocks)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        states = encoder_hidden_states.transpose(1, 2).unsqueeze(2)
        x = self.proj_in(self.norm(hidden_states))
        shape = x.shape
        x = x.reshape(shape[0], shape[1], 1, -1)
        for block in self.blocks:
            x = block(x, states)
        return (self.proj_out(x.reshape(shape)) + hidden_states,)


class SplitPictureAttention(nn.Module):
    """The autoencoder's attention over a picture's places: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, attn: Any):
        super().__init__()
        _expect(
            attn.group_norm is not None and attn.residual_connection, "an attention with norm and residual"
        )
        self.norm, self.attention, self.factor = attn.group_norm, _Attention(attn), attn.rescale_output_factor

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        x = self.norm(hidden_states)
        x = x.reshape(*x.shape[:2], 1, -1)
        return (self.attention(x, x).reshape(hidden_states.shape) + hidden_states) / self.factor


class SplitTextEncoder(nn.Module):
    """edgeflow's TextEncoder: ids (1, L) → (1, L, D)."""

    mask: Tensor

    def __init__(self, model: TextEncoder):
        super().__init__()
        self.token_embedding, self.positions = model.token_embedding, model.positions
        self.register_buffer("mask", model.mask.transpose(2, 3).transpose(1, 2))  # (1, T, 1, S)
        self.layers = nn.ModuleList(_SplitTextLayer(layer) for layer in model.layers)  # type: ignore[arg-type]
        self.final_layer_norm = model.final_layer_norm

    def forward(self, input_ids: Tensor) -> Tensor:
        x = (self.token_embedding(input_ids) + self.positions).transpose(1, 2).unsqueeze(2)
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.final_layer_norm(x.squeeze(2).transpose(1, 2))


class _SplitTextLayer(nn.Module):
    """edgeflow's TextLayer over (1, D, 1, L)."""

    def __init__(self, layer: TextLayer):
        super().__init__()
        self.heads, mlp = layer.num_heads, layer.mlp
        self.norm1, self.norm2 = ChannelNorm(layer.norm1), ChannelNorm(layer.norm2)
        self.q, self.k, self.v, self.out = (
            as_convolution(x) for x in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
        )
        self.fc1, self.activation, self.fc2 = (
            as_convolution(mlp.fc1),
            mlp.activation_fn,
            as_convolution(mlp.fc2),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(attention(self.q(h), self.k(h), self.v(h), self.heads, mask))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


_KINDS: dict[str, Callable[[Any], nn.Module]] = {
    "Transformer2DModel": SplitTransformer,
    "Attention": SplitPictureAttention,
    "TextEncoder": SplitTextEncoder,
}


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ExportError(f"export: attention split-einsum: expected {what}")
