"""Export-ready modules rewritten so that a GPU has less to do: same function, other arithmetic.

Each rewrite takes a module apart in place (on a copy that shares its tensors; see ``rewritten``) and says how
many places it changed; each is exact up to rounding, and tested by itself in float32.

- ``qkv``: a self-attention's three projections are one product, a cross-attention's key and value too;
- ``text_kv``: the keys and values of all cross-attentions are one product of the text;
- ``wide_attention``: heads wider than any fused kernel takes are two products and a softmax;
- ``upsample``: nearest ×2 and a 3×3 convolution are one 2×2 convolution of four times the channels on the
  small picture: of the nine taps of each output pixel only four read different pixels;
- ``product``: a UNet's 3×3 convolution of few pixels is one matrix product;
- ``norm``: group norm of a large picture from each channel's own mean and variance, which in channels-last
  memory are read in one pass along it.

The constant time embedding is folded away before that (edgeflow.components).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from edgeflow.gpu_attention import fuse_projections, project_text_once, unfuse_wide_attention
from edgeflow.gpu_convolutions import convolve_by_product, fuse_upsampling
from edgeflow.gpu_norms import per_channel_norms
from edgeflow.sharing import sharing_copy

REWRITES: Mapping[str, Callable[[nn.Module], int]] = {
    "qkv": fuse_projections,
    "text_kv": project_text_once,
    "wide_attention": unfuse_wide_attention,
    "upsample": fuse_upsampling,
    "product": convolve_by_product,
    "norm": per_channel_norms,
}


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
