"""Pairs: (noise seed, caption, latent) triples drawn by the teacher, the coupling that reflow straightens.

A folder of pairs holds ``captions.json`` (the distinct captions), ``config.json`` and shards
``pairs-00000.safetensors`` with ``seed`` int64 (N,), ``caption`` int32 (N,) and ``latent`` float16
(N, C, h, w) at UNet scale. The noise is not stored: it is ``torch.randn`` of a CPU generator with the seed.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeflow.errors import DataError, OutputExistsError
from edgeflow.training.config import to_dict
from edgeflow.training.corpus import encode_captions, read_captions, write_captions
from edgeflow.training.models import load_parts
from edgeflow.training.sampling import decode, sample_teacher
from edgeflow.training.sheet import draw_sheet


@dataclass(frozen=True)
class PairsConfig:
    num_pairs: int
    batch_size: int
    shard_size: int = 20480  # pairs; rounded up to whole batches
    steps: int = 25
    guidance: float = 3.0
    seed: int = 0  # pair i's noise has the seed ``seed + i``
    minutes: float = 0.0  # stop after this much wall time with the whole batches drawn so far; 0: no limit
    bf16: bool = False


@dataclass(frozen=True)
class Pairs:
    """All pairs of a folder, on one device. ``noise`` and ``latent`` are float32 (N, C, h, w)."""

    noise: Tensor
    latent: Tensor
    caption: Tensor  # int64 (N,) into ``captions``
    captions: list[str]

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Pairs:
        """Raises DataError for a folder without whole shards."""
        shards = sorted(folder.glob("pairs-*.safetensors"))
        if not shards or not (folder / "captions.json").is_file():
            raise DataError(f"pairs: {folder}: expected captions.json and pairs-*.safetensors, found none")
        try:
            parts = [load_file(shard) for shard in shards]
        except SafetensorError as error:
            raise DataError(f"pairs: {folder}: a shard cannot be read: {error}") from error
        seeds = torch.cat([p["seed"] for p in parts])
        latent = torch.cat([p["latent"] for p in parts])
        return cls(
            noise=seeded_noise(seeds, tuple(latent.shape[1:])).to(device),
            latent=latent.to(device).float(),
            caption=torch.cat([p["caption"] for p in parts]).to(device).long(),
            captions=read_captions(folder / "captions.json"),
        )

    def nearest(self, keep: float) -> Pairs:
        """The ``keep`` fraction with the shortest ‖x₁ − x₀‖: the farthest are often the solver's failures
        (Re-MeanFlow, arXiv 2511.23342)."""
        distance = (self.latent - self.noise).square().flatten(1).sum(1)
        index = distance.argsort()[: max(1, int(keep * len(distance)))]
        return Pairs(self.noise[index], self.latent[index], self.caption[index], self.captions)


def seeded_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32 (N, *shape): row i is ``torch.randn`` of a CPU generator seeded with ``seeds[i]``."""
    rows = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds.tolist()]
    return torch.stack(rows)


def draw_pairs(
    config: PairsConfig, teacher: Path, captions: list[str], out: Path, device: torch.device
) -> int:
    """Draw pairs into ``out``, whole shards at a time; a folder with shards of the same config is continued.

    Pair i takes caption i modulo their number, so every caption is drawn equally often. Returns the number
    of pairs on disk.
    """
    parts = load_parts(teacher)
    unet, vae = parts.unet.to(device, memory_format=torch.channels_last), parts.vae.to(device)
    encoder = parts.text_encoder.to(device)
    with torch.no_grad():
        ids = encode_captions(captions, parts.tokenizer_dir, device)
        text = torch.cat([encoder(i).last_hidden_state for i in ids.split(1024)])
        empty = encoder(encode_captions([""], parts.tokenizer_dir, device)).last_hidden_state
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    per_shard = -(-config.shard_size // config.batch_size) * config.batch_size
    starts = range(0, config.num_pairs, per_shard)
    began = time.monotonic()
    drawn = 0
    for number, start in enumerate(
        track(starts, "pairs", console=Console(stderr=True), disable=not Console(stderr=True).is_terminal)
    ):
        path = out / f"pairs-{number:05d}.safetensors"
        end = min(start + per_shard, config.num_pairs)
        if path.is_file():
            drawn = end
            continue
        latents = []
        for first in range(start, end, config.batch_size):
            if config.minutes and time.monotonic() - began > 60 * config.minutes:
                end = first
                break
            numbers = torch.arange(first, min(first + config.batch_size, end))
            noise = seeded_noise(numbers + config.seed, shape).to(device)
            states = text[(numbers % len(captions)).to(device)]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                x = sample_teacher(unet, states, empty, noise, steps=config.steps, guidance=config.guidance)
            latents.append(x.half().cpu())
        if not latents:
            break
        numbers = torch.arange(start, end)
        shard = {
            "seed": numbers + config.seed,
            "caption": (numbers % len(captions)).int(),
            "latent": torch.cat(latents),
        }
        _save_whole(shard, path)
        drawn = end
        if number == 0:
            labels = [captions[i % len(captions)] for i in range(min(32, end))]
            draw_sheet(
                out / "sheet.png", decode(vae, shard["latent"][:32].float().to(device)), labels, columns=8
            )
    seconds = time.monotonic() - began
    record = {"pairs": drawn, "seconds": round(seconds, 1), "pairs_per_s": round(drawn / seconds, 1)}
    (out / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return drawn


def start_pairs(out: Path, config: PairsConfig, captions: list[str], *, force: bool, resume: bool) -> None:
    """Make the folder. Raises OutputExistsError, or DataError for a --resume with other captions or settings."""
    text = json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"
    if out.exists() and any(out.iterdir()):
        if resume:
            same = read_captions(out / "captions.json") == captions
            if not same or _fixed(json.loads((out / "config.json").read_text())) != _fixed(to_dict(config)):
                raise DataError(
                    f"pairs: {out}: --resume wants the captions and settings the folder was begun with"
                )
        elif not force:
            raise OutputExistsError(out)
        else:
            for shard in out.glob("pairs-*.safetensors"):
                shard.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(text, encoding="utf-8")
    write_captions(out / "captions.json", captions)


def _fixed(config: dict[str, object]) -> dict[str, object]:
    """What may not change when a folder is continued."""
    return {k: v for k, v in config.items() if k not in ("num_pairs", "minutes")}


def _save_whole(shard: dict[str, Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(shard, partial)
    partial.replace(path)
