"""Does a picture show what its caption says? A joint space of both, learnt from real pictures alone.

A small contrastive model (the loss of CLIP, Radford et al. 2021, arXiv 2103.00020) over frozen features: the
picture side is a two-layer network on the judging network's features, the caption side the mean of its
words' vectors through a two-layer network. It is trained afresh from the training pictures in seconds, the
same data and seed giving the same model, and has never seen a generated picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTH = 128  # of the joint space
_HIDDEN = 512
_BATCH_SIZE = 512


class Agreement:
    """Unit vectors (N, 128) of pictures' features and of captions; their product says how well they agree."""

    def __init__(self, features: Tensor, captions: Sequence[str], *, seed: int = 0, steps: int = 300):
        """Learn from real pictures' features (N, D) and their captions (N)."""
        words = sorted({word for caption in captions for word in _words(caption)})
        self._index = {word: i for i, word in enumerate(words)}
        self._mean, self._std = features.mean(0), features.std(0).clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._picture = _head(features.shape[1], dropout=0.3)
            self._embedding = nn.EmbeddingBag(len(words) + 1, _HIDDEN, mode="mean", padding_idx=len(words))
            self._text = _head(_HIDDEN, dropout=0.1)
            self._train(features, captions, steps)

    def _train(self, features: Tensor, captions: Sequence[str], steps: int) -> None:
        x, ids = self._scaled(features), self._ids(captions)
        log_scale = nn.Parameter(torch.tensor(2.5))
        modules = (self._picture, self._embedding, self._text)
        parameters = [p for module in modules for p in module.parameters()] + [log_scale]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        for module in modules:
            module.train()
        for _ in range(steps):
            index = torch.randperm(len(x))[:_BATCH_SIZE]
            a = F.normalize(self._picture(x[index]), dim=1)
            b = F.normalize(self._text(self._embedding(ids[index])), dim=1)
            logits = log_scale.clamp(max=4.6).exp() * a @ b.T
            target = torch.arange(len(index))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        for module in modules:
            module.eval().requires_grad_(False)

    @torch.no_grad()
    def pictures(self, features: Tensor) -> Tensor:
        return F.normalize(self._picture(self._scaled(features)), dim=1)

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Words that no training caption has are passed over."""
        return F.normalize(self._text(self._embedding(self._ids(captions))), dim=1)

    def _scaled(self, features: Tensor) -> Tensor:
        return ((features - self._mean) / self._std).float()

    def _ids(self, captions: Sequence[str]) -> Tensor:
        """Word numbers (N, L), filled up with the number that the embedding passes over."""
        nothing = len(self._index)
        rows = [[self._index[w] for w in _words(c) if w in self._index] for c in captions]
        length = max(1, *map(len, rows))
        return torch.tensor([row + [nothing] * (length - len(row)) for row in rows])


def _head(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(width, _HIDDEN),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, _WIDTH),
    )


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())
