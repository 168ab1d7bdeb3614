"""Export-ready modules rewritten so that a GPU has less to do: same function, other arithmetic.

Each rewrite takes a module apart in place (on a copy that shares its tensors; see ``rewritten``) and says how
many places it changed; each is exact up to rounding, and tested by itself in float32.

- ``qkv``: a self-attention's three projections are one product, a cross-attention's key and value too;
- ``wide_attention``: heads wider than any fused kernel takes are two products and a softmax;
- ``upsample``: nearest ×2 and a 3×3 convolution are one 2×2 convolution of four times the channels on the
  small picture: of the nine taps of each output pixel only four read different pixels;
- ``norm``: group norm from each channel's own mean and variance, which in channels-last memory are read in
  one pass along it.

The constant time embedding is folded away before that (edgeflow.components).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.components import TextLayer
from edgeflow.sharing import sharing_copy
from edgeflow.upsampling import expect_twice, is_plain_3x3, phase_kernels, replace_upsamplers

#: A head wider than this has no flash or cuDNN kernel.
WIDEST_HEAD = 256


def rewritten(module: nn.Module, names: Sequence[str] | None = None) -> tuple[nn.Module, dict[str, int]]:
    """A copy of an export-ready module with the rewrites ``names`` (all by default), and how often each held.

    The original is left as it is and shares the tensors that no rewrite touches. Raises ValueError for a name
    that is not known.
    """
    wanted = list(REWRITES) if names is None else list(names)
    unknown = sorted(set(wanted) - set(REWRITES))
    if unknown:
        raise ValueError(f"rewrite {unknown[0]!r} is not known; known: {', '.join(REWRITES)}")
    twin = sharing_copy(module)
    with torch.no_grad():
        counts = {name: REWRITES[name](twin) for name in REWRITES if name in wanted}
    return twin.eval().requires_grad_(False), counts


# --- one product for several projections ----------------------------------------------------------------


def fuse_projections(module: nn.Module) -> int:
    """The rewrite ``qkv``, over diffusers' Attention and edgeflow's TextLayer."""
    count = 0
    for parent, name, child in _children(module):
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


def unfuse_wide_attention(module: nn.Module) -> int:
    """The rewrite ``wide_attention``, over diffusers' Attention."""
    count = 0
    for _, _, child in _children(module):
        if _is_attention(child) and child.inner_dim // child.heads > WIDEST_HEAD:
            child.processor = AttentionProcessor(wide=True)
            count += 1
    return count


class FusedTextLayer(nn.Module):
    """edgeflow's TextLayer with its three projections in one: (N, L, D) → (N, L, D)."""

    def __init__(self, layer: TextLayer):
        super().__init__()
        self.num_heads = layer.num_heads
        self.norm1, self.norm2, self.mlp = layer.norm1, layer.norm2, layer.mlp
        self.qkv_proj = _stacked(layer.q_proj, layer.k_proj, layer.v_proj)
        self.out_proj = layer.out_proj

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (_heads(t, self.num_heads) for t in self.qkv_proj(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out_proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


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


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _is_attention(module: nn.Module) -> bool:
    """Whether it is diffusers' Attention in the form that Stable Diffusion has: no extra norms or inputs."""
    this: Any = module
    return type(module).__name__ == "Attention" and all(
        getattr(this, name, None) is None
        for name in ("norm_q", "norm_k", "norm_cross", "spatial_norm", "add_q_proj", "add_k_proj")
    )


def _plain(*layers: Any) -> bool:
    """Whether all are float linear layers that agree in having a bias; integers stay their layer's own."""
    return all(type(layer) is nn.Linear for layer in layers) and len({x.bias is None for x in layers}) == 1


def _stacked(*layers: nn.Linear) -> nn.Linear:
    """One linear layer that gives the outputs of all, one after the other."""
    first, width = layers[0], sum(layer.out_features for layer in layers)
    fused = nn.Linear(first.in_features, width, bias=first.bias is not None, device="meta")
    fused.weight = _constant(torch.cat([layer.weight for layer in layers]))
    if first.bias is not None:
        fused.bias = _constant(torch.cat([layer.bias for layer in layers]))
    return fused


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# --- upsampling and convolution in one ------------------------------------------------------------------


def fuse_upsampling(module: nn.Module) -> int:
    """The rewrite ``upsample``, over diffusers' Upsample2D and nn.Upsample before a convolution."""
    sequences = [child for child in module.modules() if isinstance(child, nn.Sequential)]
    return replace_upsamplers(module, SubpixelConv) + sum(map(_fuse_sequence, sequences))


def _fuse_sequence(layers: nn.Sequential) -> int:
    count = 0
    for i in range(len(layers) - 1):
        up: Any = layers[i]
        doubles = isinstance(up, nn.Upsample) and (up.mode, float(up.scale_factor or 0)) == ("nearest", 2.0)
        if doubles and is_plain_3x3(layers[i + 1]):
            layers[i], layers[i + 1] = SubpixelConv(layers[i + 1]), nn.Identity()
            count += 1
    return count


class SubpixelConv(nn.Module):
    """A 3×3 convolution of a picture upsampled ×2 to the nearest, from the picture itself.

    (N, C, H, W) → (N, O, 2H, 2W). Output pixel 2i + a reads the upsampled rows 2i + a − 1 … 2i + a + 1, which
    are two rows of the input: i − 1 and i for a = 0, with the taps w₀ and w₁ + w₂, and i and i + 1 for a = 1,
    with w₀ + w₁ and w₂; columns alike. All four phases are one 2×2 convolution of 4·O channels over the input
    with a border of zeros, of which phase (a, b) takes the part that begins at (a, b). 16 products for each
    input pixel in place of 36.
    """

    def __init__(self, conv: Any):
        super().__init__()
        self.out_channels = conv.out_channels
        self.weight = _constant(phase_kernels(conv.weight).flatten(0, 2))  # phase (a, b) at 2a + b
        self.bias = None if conv.bias is None else _constant(conv.bias.repeat(4))

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        expect_twice(output_size)
        height, width = x.shape[-2:]
        y = F.conv2d(x, self.weight, self.bias, padding=1).unflatten(1, (2, 2, self.out_channels))
        rows = [
            torch.stack([y[:, a, b, :, a : a + height, b : b + width] for b in (0, 1)], dim=-1)
            for a in (0, 1)
        ]
        return torch.stack(rows, dim=-3).flatten(-2).flatten(-3, -2)


# --- group norm -----------------------------------------------------------------------------------------


def per_channel_norms(module: nn.Module) -> int:
    """The rewrite ``norm``, over nn.GroupNorm."""
    found = [
        (parent, name, child) for parent, name, child in _children(module) if type(child) is nn.GroupNorm
    ]
    for parent, name, child in found:
        setattr(parent, name, ChannelGroupNorm(child))
    return len(found)


class ChannelGroupNorm(nn.Module):
    """Group norm (N, C, …) → the same shape, in float32 inside.

    A group's mean is that of its channels' means m, its variance the mean of their variances and the variance
    of m. Then one factor and one summand a channel.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        dims = tuple(range(2, x.dim()))
        var, mean = torch.var_mean(wide, dim=dims, correction=0)
        means = mean.unflatten(1, (self.num_groups, -1))
        spread, middle = torch.var_mean(means, dim=2, correction=0, keepdim=True)
        spread = spread + var.unflatten(1, (self.num_groups, -1)).mean(dim=2, keepdim=True)
        inverse = torch.rsqrt(spread + self.eps).expand_as(means).flatten(1)
        factor = inverse if self.weight is None else inverse * self.weight.float()
        summand = -middle.expand_as(means).flatten(1) * factor
        if self.bias is not None:
            summand = summand + self.bias.float()
        shape = (*x.shape[:2], *(1 for _ in dims))
        return torch.addcmul(summand.view(shape), wide, factor.view(shape)).to(x.dtype)


REWRITES: Mapping[str, Callable[[nn.Module], int]] = {
    "qkv": fuse_projections,
    "wide_attention": unfuse_wide_attention,
    "upsample": fuse_upsampling,
    "norm": per_channel_norms,
}


def _children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every child with its parent and name in it, listed before anything is changed."""
    yield from [(p, name, child) for p in module.modules() for name, child in p.named_children()]
