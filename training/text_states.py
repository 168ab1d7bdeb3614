"""Text-encoder states of captions: how large they are, and a batch of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GIB = 2**30


def states_bytes(max_tokens: int, width: int, count: int) -> int:
    """Size of the float32 states of ``count`` captions."""
    return 4 * count * max_tokens * width


@torch.no_grad()
def encode(encoder: nn.Module, ids: Tensor) -> Tensor:
    """States (N, L, D) float32 of token ids (N, L), without autocast."""
    with torch.autocast(ids.device.type, enabled=False):
        return encoder(ids).last_hidden_state.float()
