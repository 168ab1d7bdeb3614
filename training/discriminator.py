"""A discriminator of small heads on frozen features, conditioned on the caption.

Projected GAN (Sauer et al. 2021, arXiv 2111.01007) judges in the feature space of a pretrained network; ADD
(Sauer et al. 2023, arXiv 2311.17042) does so to train one-step models beside a distillation loss. The caption
enters by a projection (Miyato & Koyama 2018, arXiv 1802.05637), weights are kept at spectral norm 1
(Miyato et al. 2018, arXiv 1802.05957), the losses are the hinge's. What a head computes is normalised between
its layers, as in StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515): without that, three maps of norm 1 left
so little of the difference between two like pictures that the hinge loss stayed at 1.97 of 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

#: Logits of each head, float32 (N, positions): above 0 speaks for a real picture.
Logits = list[Tensor]


@dataclass(frozen=True)
class Judged:
    """Logits of one batch. ``real``, ``fake`` and ``mismatched`` (real pictures under another's caption)
    carry gradients to the discriminator alone, ``drawn`` (the fakes once more) to the pictures alone."""

    real: Logits
    fake: Logits
    mismatched: Logits
    drawn: Logits


class _Head(nn.Module):
    """Features (N, C, h, w) of unit length over C, caption (N, T) → logits (N, h·w)."""

    def __init__(self, channels: int, width: int, text_width: int):
        super().__init__()
        self.scale = channels**0.5  # features come in with a mean square of 1
        self.mix = spectral_norm(nn.Conv2d(channels, width, 1))
        self.look = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.verdict = spectral_norm(nn.Conv2d(width, 1, 1))
        self.caption = spectral_norm(nn.Linear(text_width, width, bias=False))

    def weights(self) -> list[Tensor]:
        """Normalised weights and biases. In train mode each call is one power iteration, in place."""
        layers = (self.mix, self.look, self.verdict)
        return [t for layer in layers for t in (layer.weight, layer.bias)] + [self.caption.weight]

    def judge(self, weights: list[Tensor], features: Tensor, text: Tensor) -> Tensor:
        mix, mix_bias, look, look_bias, verdict, verdict_bias, caption = weights
        h = F.leaky_relu(_normalised(F.conv2d(features * self.scale, mix, mix_bias)), 0.2)
        h = F.leaky_relu(_normalised(F.conv2d(h, look, look_bias, padding=1)), 0.2)
        wanted = F.linear(text, caption).unsqueeze(2).unsqueeze(3) / h.shape[1] ** 0.5
        logits = F.conv2d(h, verdict, verdict_bias) + (h * wanted).sum(1, keepdim=True)
        return logits.float().flatten(1)


def _normalised(h: Tensor) -> Tensor:
    """Mean 0 and variance 1 in groups of 8 channels, each picture by itself: a verdict is of one picture."""
    return F.group_norm(h, h.shape[1] // 8)


class Discriminator(nn.Module):
    """Heads on each tap of a frozen feature network.

    ``steps`` counts the forward passes of training; it lies in the state, so that a resumed run knows.
    """

    steps: Tensor

    def __init__(self, channels: Sequence[int], text_width: int, width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(_Head(c, width, text_width) for c in channels)
        self.register_buffer("steps", torch.zeros(()))

    def forward(
        self,
        real: Sequence[Tensor],
        real_text: Tensor,
        drawn: Sequence[Tensor],
        drawn_text: Tensor,
        *,
        mismatched: bool = False,
    ) -> Judged:
        """Judge features of real and drawn pictures, a list of (N, C, h, w) each, under captions (N, T).

        One call serves both sides: the drawn features' gradients stop before the heads' parameters in
        ``Judged.drawn``, the parameters' before the features everywhere else.
        """
        with torch.no_grad():
            self.steps.add_(1.0)
        judged = Judged([], [], [], [])
        for head, x, y in zip(self.heads, real, drawn, strict=True):
            with torch.autocast(x.device.type, enabled=False):  # power iterations want float32
                weights = head.weights()
            judged.real.append(head.judge(weights, x.detach(), real_text))
            judged.fake.append(head.judge(weights, y.detach(), drawn_text))
            if mismatched:
                judged.mismatched.append(head.judge(weights, x.detach(), real_text.roll(1, 0)))
            judged.drawn.append(head.judge([w.detach() for w in weights], y, drawn_text))
        return judged


def mean_logit(logits: Logits) -> Tensor:
    """Mean over pictures and positions, every head counting alike."""
    return torch.stack([x.mean() for x in logits]).mean()


def generator_loss(drawn: Logits) -> Tensor:
    """The hinge loss's generator side: −E D(drawn)."""
    return -mean_logit(drawn)


def discriminator_loss(real: Logits, fake: Logits) -> Tensor:
    """Hinge: E max(0, 1 − D(real)) + E max(0, 1 + D(fake))."""
    return mean_logit([F.relu(1.0 - x) for x in real]) + mean_logit([F.relu(1.0 + x) for x in fake])


def mismatch_loss(mismatched: Logits) -> Tensor:
    """Hinge of a real picture under another's caption, which counts as not real (Reed et al. 2016,
    arXiv 1605.05396)."""
    return mean_logit([F.relu(1.0 + x) for x in mismatched])
