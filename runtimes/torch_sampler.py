"""A many-step model in eager float32 PyTorch: the untouched modules, integrated in the steps asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeflow.checkpoint import Checkpoint
from edgeflow.loading import load_modules
from edgeflow.solvers import solve
from edgeflow.spec import PIPELINE
from edgeflow.tokenizer import ClipTokenizer


class TorchSampler:
    """Draws from a rectified flow or a diffusion model with classifier-free guidance."""

    name: ClassVar[str] = "torch"

    def __init__(self, checkpoint: Checkpoint, steps: int, guidance: float):
        self.checkpoint, self.steps, self.guidance = checkpoint, steps, guidance
        self._text, self._unet, self._vae = load_modules(checkpoint)
        tokenizer = ClipTokenizer.from_folder(checkpoint.generation.tokenizer_dir)
        self._empty = self._encode(torch.from_numpy(tokenizer.encode("")))

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph pipeline alone: input_ids (1, L) and noise (1, C, h, w) → image (1, 3, H, W) in [0, 1].

        Raises ValueError for another graph.
        """
        if graph != PIPELINE:
            raise ValueError(f"graph {graph!r}: a many-step model has the graph {PIPELINE!r} alone")
        text = self._encode(torch.from_numpy(np.asarray(inputs["input_ids"], np.int64)))
        noise = torch.from_numpy(np.asarray(inputs["noise"], np.float32))
        with torch.no_grad():
            latent = solve(self.checkpoint, lambda x, t: self._predict(x, t, text), noise, self.steps)
            image = self._vae.decode(latent / self.checkpoint.latent_scale).sample
        return {"image": (image / 2 + 0.5).clamp(0, 1).numpy()}

    def _encode(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self._text(ids).last_hidden_state

    def _predict(self, latent: Tensor, timestep: Any, text: Tensor) -> Tensor:
        """v(∅) + w·(v(text) − v(∅)); for w ≤ 1, as in InstaFlow's and diffusers' pipelines, v(text)."""
        if self.guidance <= 1:
            return self._unet(latent, timestep, text).sample
        both = torch.cat([self._empty, text])
        empty, conditional = self._unet(torch.cat([latent, latent]), timestep, both).sample.chunk(2)
        return empty + self.guidance * (conditional - empty)
