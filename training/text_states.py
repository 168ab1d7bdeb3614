"""Text-encoder states of captions: from a table where it fits in memory, a batch at a time where not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeflow.training.corpus import caption_states, encode_captions
from edgeflow.training.models import Parts

GIB = 2**30


def states_bytes(parts: Parts, count: int) -> int:
    """Size of the float32 states of ``count`` captions."""
    config = parts.text_encoder.config
    return 4 * count * config.max_position_embeddings * config.hidden_size


class TextStates:
    """States (N, L, D) float32 of captions by their number, on ``device``.

    Up to ``limit`` bytes they are computed once; beyond, only token ids are kept and each batch is encoded
    when it is asked for.
    """

    def __init__(self, parts: Parts, captions: Sequence[str], device: torch.device, limit: float):
        self.parts, self.device = parts, device
        self.encoder = parts.text_encoder.to(device)
        self.table: Tensor | None = None
        if states_bytes(parts, len(captions)) <= limit:
            self.table = caption_states(parts, captions, device)
        else:
            self.ids = torch.cat(
                [
                    encode_captions(captions[i : i + 8192], parts.tokenizer_dir, torch.device("cpu")).int()
                    for i in range(0, len(captions), 8192)
                ]
            ).to(device)

    def __getitem__(self, index: Tensor) -> Tensor:
        if self.table is not None:
            return self.table[index]
        return encode(self.encoder, self.ids[index].long())


@torch.no_grad()
def encode(encoder: torch.nn.Module, ids: Tensor) -> Tensor:
    """States (N, L, D) float32 of token ids (N, L), computed as the table's are: without autocast."""
    with torch.autocast(ids.device.type, enabled=False):
        return encoder(ids).last_hidden_state.float()
