"""Group norm rewritten for a GPU (a rewrite of edgeflow.gpu_rewrites)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.sharing import placed_children

#: From so many pixels of a batch on, the passes over memory take longer than the launches (docs/cuda.md).
MANY_PIXELS = 128 * 128


def per_channel_norms(module: nn.Module) -> int:
    """The rewrite ``norm``, over nn.GroupNorm."""
    found = [placed for placed in placed_children(module) if type(placed[2]) is nn.GroupNorm]
    for parent, name, child in found:
        setattr(parent, name, ChannelGroupNorm(child))
    return len(found)


class ChannelGroupNorm(nn.Module):
    """Group norm (N, C, …) → the same shape, in float32 inside.

    Of a large picture a group's mean is that of its channels' means m, its variance the mean of their
    variances and the variance of m. Then one factor and one summand a channel. Small ones are left to
    PyTorch's own: fewer kernels.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() < MANY_PIXELS * x.shape[1]:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.by_channel(x)

    def by_channel(self, x: Tensor) -> Tensor:
        """The norm from the channels' own statistics."""
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
        factor, summand = (_in_memory(t).view(shape) for t in (factor, summand))
        return torch.addcmul(summand, wide, factor).to(x.dtype)


def _in_memory(tensor: Tensor) -> Tensor:
    """The tensor itself. A compiler cannot see through its strides, so it computes the tensor once, where it
    would else compute it anew for each pixel that it is applied to."""
    return tensor.as_strided(tensor.shape, tensor.stride())
