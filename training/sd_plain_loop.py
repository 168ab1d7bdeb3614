"""The loop that full-size training is compared with: diffusers' own examples/text_to_image, on pairs.

What ``train_text_to_image.py`` does by default with ``--mixed_precision bf16 --use_ema`` is done here in its
order: accelerate's autocast over float32 weights, PyTorch's attention, AdamW and the moving average as they
come, the loss read back at every step; no compilation, no CUDA graph, no channels-last. Its picture encoding
is left out, and the text states are given, as they are to the loop it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeflow.training import flow


@dataclass(frozen=True)
class PlainBatch:
    """Inputs of one step, float32: ``noise``, ``latent`` (N, C, h, w), ``text`` (N, L, D), ``tau`` (N,)."""

    noise: Tensor
    latent: Tensor
    text: Tensor
    tau: Tensor


def plain_loop(
    unet: Any,
    draw: Callable[[], PlainBatch],
    *,
    learning_rate: float,
    pictures: Callable[[Tensor], Tensor] | None = None,
    distance: nn.Module | None = None,
) -> Callable[[], float]:
    """A function that takes one step and returns its loss. ``unet`` is trained in place.

    With ``pictures`` (latents to pictures) and ``distance`` the loss is the pictures' distance instead of the
    velocity's L2.
    """
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    device = next(unet.parameters()).device
    accelerator = Accelerator(mixed_precision="bf16", cpu=device.type == "cpu")
    unet.train().requires_grad_(True)
    average = EMAModel(unet.parameters(), decay=0.9999)
    average.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=1000)
    model, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)

    def step() -> float:
        with accelerator.accumulate(model):
            batch = draw()
            x = flow.interpolate(batch.noise, batch.latent, batch.tau)
            predicted = model(x, flow.timestep(batch.tau), batch.text, return_dict=False)[0]
            if pictures is None or distance is None:
                loss = functional.mse_loss(predicted.float(), (batch.latent - batch.noise).float())
            else:
                with accelerator.autocast():
                    with torch.no_grad():
                        wanted = pictures(batch.latent)
                    loss = distance(pictures(x + predicted), wanted)
            shown = accelerator.gather(loss.repeat(len(x))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        average.step(model.parameters())
        return shown

    return step
