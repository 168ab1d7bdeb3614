"""What reflow and distillation share: a velocity network whose text encoder stays as the teacher's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgeflow.training import flow
from edgeflow.training.corpus import caption_states
from edgeflow.training.models import Parts, save_parts
from edgeflow.training.sampling import decode, seeded_noise
from edgeflow.training.sheet import draw_sheet, sheet_prompts


def velocity_field(unet: nn.Module, text: Tensor) -> flow.Velocity:
    """The UNet as a velocity field under text states (N, L, D)."""
    return lambda x, t: unet(x, t, text).sample.float()


def save_flow(parts: Parts, unet: nn.Module, folder: Path, facts: dict[str, object]) -> None:
    """A checkpoint with ``unet`` in place of the parts' own; licence, origin and prompts are inherited."""
    kept = ("licence", "origin", "prompts", "picture_size")  # the last is not in what others published
    inherited = {k: parts.facts[k] for k in kept if k in parts.facts}
    save_parts(dataclasses.replace(parts, unet=unet), folder, {**inherited, **facts})


@torch.no_grad()
def draw_flow_sheet(
    path: Path, parts: Parts, unet: nn.Module, captions: list[str], step_counts: Sequence[int], bf16: bool
) -> None:
    """Eight prompts a row; each group of rows is the same noise at every number of Euler steps."""
    device = next(unet.parameters()).device
    vae = parts.vae.to(device)
    prompts = sheet_prompts(captions, 32 // len(step_counts) // 8 * 8 or 8)
    text = caption_states(parts, prompts, device)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = seeded_noise(torch.arange(len(prompts)), shape).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        drawn = [decode(vae, flow.euler(velocity_field(unet, text), noise, n)) for n in step_counts]
    rows, labels = [], []
    for first in range(0, len(prompts), 8):
        for count, pictures in zip(step_counts, drawn, strict=True):
            rows.append(pictures[first : first + 8])
            labels += [f"{p} · {count} step{'s' * (count > 1)}" for p in prompts[first : first + 8]]
    draw_sheet(path, torch.cat(rows), labels, columns=8)
