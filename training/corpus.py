"""Captioned pictures on the training device."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from edgeflow.tokenizer import ClipTokenizer
from edgeflow.training.dataset import open_dataset
from edgeflow.training.models import Parts

_LOG = logging.getLogger("edgeflow")


@dataclass(frozen=True)
class Corpus:
    """A split in memory: ``images`` uint8 (N, 3, S, S), on ``device``."""

    images: Tensor
    captions: list[str]
    keys: list[str]  # each picture's name in its data set

    @classmethod
    def load(cls, data: Path, split: str, size: int, device: torch.device) -> Corpus:
        """Load a split; unusable pictures are counted and named on stderr. Raises DataError."""
        loaded = open_dataset(data).load(split, size)
        if loaded.problems:
            listed = "; ".join(map(str, loaded.problems))
            _LOG.warning(f"{len(loaded.problems)} pictures of {data} ({split}) cannot be used: {listed}")
        return cls(torch.from_numpy(loaded.images).to(device), loaded.captions, loaded.keys)

    def pictures(self, index: Tensor) -> Tensor:
        """Float pictures in [-1, 1] of shape (len(index), 3, S, S)."""
        return self.images[index].float() / 127.5 - 1.0

    def head(self, count: int) -> Corpus:
        """The first ``count`` pictures."""
        return Corpus(self.images[:count], self.captions[:count], self.keys[:count])

    def names(self, index: Tensor) -> list[str]:
        """Keys and captions of the pictures ``index``, for messages."""
        return [f"{self.keys[i]} ({self.captions[i]})" for i in index.tolist()]


def encode_captions(captions: Iterable[str], tokenizer_dir: Path, device: torch.device) -> Tensor:
    """Token ids (N, L) int64, padded and cut at the tokenizer's own length."""
    tokenizer = ClipTokenizer.from_folder(tokenizer_dir)
    return torch.from_numpy(np.concatenate([tokenizer.encode(c) for c in captions])).to(device)


@torch.no_grad()
def caption_states(parts: Parts, captions: Sequence[str], device: torch.device) -> Tensor:
    """Text-encoder states (N, L, D) float32 of every caption."""
    encoder = parts.text_encoder.to(device)
    ids = encode_captions(captions, parts.tokenizer_dir, device)
    return torch.cat([encoder(i).last_hidden_state for i in ids.split(1024)])


@torch.no_grad()
def encode_pictures(vae: AutoencoderTiny, corpus: Corpus, batch_size: int = 256) -> Tensor:
    """UNet-scale latents (N, C, h, w) float32 of every picture: encoder output × scaling factor."""
    batches = torch.arange(len(corpus.images), device=corpus.images.device).split(batch_size)
    latents = [vae.encode(corpus.pictures(index)).latents for index in batches]
    return torch.cat(latents) * vae.config.scaling_factor


def write_captions(path: Path, captions: list[str]) -> None:
    path.write_text(json.dumps(captions, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def read_captions(path: Path) -> list[str]:
    return json.loads(path.read_text(encoding="utf-8"))
