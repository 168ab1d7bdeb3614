"""Attention rewritten for a GPU: fewer and larger products (rewrites of edgeflow.gpu_rewrites)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.components import TextLayer
from edgeflow.sharing import constant, placed_children

#: A head wider than this has no flash or cuDNN kernel.
WIDEST_HEAD = 256


def fuse_projections(module: nn.Module) -> int:
    """The rewrite ``qkv``, over diffusers' Attention and edgeflow's TextLayer."""
    count = 0
    for parent, name, child in placed_children(module):
        if isinstance(child, TextLayer) and _plain(child.q_proj, child.k_proj, child.v_proj):
            setattr(parent, name, FusedTextLayer(child))
            count += 1
        elif _is_attention(child) and _plain(child.to_q, child.to_k, child.to_v):
            if child.is_cross_attention:
                child.to_kv = _stacked(child.to_k, child.to_v)
            else:
                child.to_qkv = _stacked(child.to_q, child.to_k, child.to_v)
                del child.to_q
            del child.to_k, child.to_v
            child.processor = AttentionProcessor(wide=getattr(child.processor, "wide", False))
            count += 1
    return count


def project_text_once(module: nn.Module) -> int:
    """The rewrite ``text_kv``, over diffusers' UNet2DConditionModel and its cross-attentions."""
    count = 0
    for parent, name, unet in placed_children(module):
        if type(unet).__name__ == "UNet2DConditionModel":
            found = [m for m in unet.modules() if _is_attention(m) and m.is_cross_attention]
            if found and all(_plain(*_text_projections(m)) for m in found):
                setattr(parent, name, TextOnce(unet, found))
                count += len(found)
    return count


def unfuse_wide_attention(module: nn.Module) -> int:
    """The rewrite ``wide_attention``, over diffusers' Attention."""
    count = 0
    for _, _, child in placed_children(module):
        if _is_attention(child) and child.inner_dim // child.heads > WIDEST_HEAD:
            child.processor = AttentionProcessor(wide=True)
            count += 1
    return count


class FusedTextLayer(nn.Module):
    """edgeflow's TextLayer with its three projections in one: (N, L, D) → (N, L, D).

    The mask that TextEncoder gives is causal, which attention kernels know by themselves: they skip what it
    hides, and read none.
    """

    def __init__(self, layer: TextLayer):
        super().__init__()
        self.num_heads = layer.num_heads
        self.norm1, self.norm2, self.mlp = layer.norm1, layer.norm2, layer.mlp
        self.qkv_proj = _stacked(layer.q_proj, layer.k_proj, layer.v_proj)
        self.out_proj = layer.out_proj

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (_heads(t, self.num_heads) for t in self.qkv_proj(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out_proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class TextOnce(nn.Module):
    """A UNet whose keys and values of all cross-attentions are one product of the text, made first.

    Called as the UNet is. Its blocks are given (N, L, all keys and values) in the text's place, of which each
    attention takes its part.
    """

    def __init__(self, unet: Any, attentions: list[Any]):
        super().__init__()
        layers = [layer for attn in attentions for layer in _text_projections(attn)]
        self.unet, self.text_kv = unet, _stacked(*layers)
        begin = 0
        for attn in attentions:
            end = begin + sum(layer.out_features for layer in _text_projections(attn))
            for old in ("to_k", "to_v", "to_kv"):
                if hasattr(attn, old):
                    delattr(attn, old)
            attn.to_kv = _Part(begin, end)
            attn.processor = AttentionProcessor(wide=getattr(attn.processor, "wide", False))
            begin = end

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **rest: Any) -> Any:
        return self.unet(sample, timestep, self.text_kv(encoder_hidden_states), **rest)


class _Part(nn.Module):
    """Features begin … end of the last axis."""

    def __init__(self, begin: int, end: int):
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.begin : self.end]


class AttentionProcessor:
    """What diffusers' Attention calls: pictures (N, C, H, W) or tokens (N, L, C) → the same shape.

    Takes fused projections where the module has them. ``wide`` computes the attention as two products.
    """

    def __init__(self, wide: bool = False):
        self.wide = wide

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("attention: expected no mask")
        x = hidden_states
        tokens = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        q, k, v = (_heads(t, attn.heads) for t in _projections(attn, tokens, encoder_hidden_states))
        if self.wide:
            attended = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        y = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        if x.dim() == 4:
            y = y.transpose(1, 2).reshape(x.shape)
        return (y + x if attn.residual_connection else y) / attn.rescale_output_factor


def _projections(attn: Any, tokens: Tensor, states: Tensor | None) -> tuple[Tensor, ...]:
    if hasattr(attn, "to_qkv"):
        return tuple(attn.to_qkv(tokens).chunk(3, dim=-1))
    states = tokens if states is None else states
    if hasattr(attn, "to_kv"):
        return (attn.to_q(tokens), *attn.to_kv(states).chunk(2, dim=-1))
    return attn.to_q(tokens), attn.to_k(states), attn.to_v(states)


def _text_projections(attn: Any) -> tuple[Any, ...]:
    """A cross-attention's layers that take the text, keys before values."""
    return (attn.to_kv,) if hasattr(attn, "to_kv") else (attn.to_k, attn.to_v)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _is_attention(module: Any) -> bool:
    """Whether it is diffusers' Attention in the form that Stable Diffusion has: no extra norms or inputs."""
    return type(module).__name__ == "Attention" and all(
        getattr(module, name, None) is None
        for name in ("norm_q", "norm_k", "norm_cross", "spatial_norm", "add_q_proj", "add_k_proj")
    )


def _plain(*layers: Any) -> bool:
    """Whether all are float linear layers that agree in having a bias; integers stay their layer's own."""
    return all(type(layer) is nn.Linear for layer in layers) and len({x.bias is None for x in layers}) == 1


def _stacked(*layers: nn.Linear) -> nn.Linear:
    """One linear layer that gives the outputs of all, one after the other."""
    first, width = layers[0], sum(layer.out_features for layer in layers)
    fused = nn.Linear(first.in_features, width, bias=first.bias is not None, device="meta")
    fused.weight = constant(torch.cat([layer.weight for layer in layers]))
    if first.bias is not None:
        fused.bias = constant(torch.cat([layer.bias for layer in layers]))
    return fused
