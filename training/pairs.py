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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeflow.cli.options import progress
from edgeflow.errors import DataError, OutputExistsError
from edgeflow.training.config import to_dict
from edgeflow.training.corpus import caption_states, read_captions, write_captions
from edgeflow.training.models import load_parts
from edgeflow.training.sampling import decode, sample_teacher, seeded_noise
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
    seed: Tensor  # int64 (N,), on the CPU: of the noise

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
            seed=seeds.long(),
        )

    def names(self, index: Tensor) -> list[str]:
        """Seeds and captions of the pairs ``index`` (on the CPU), for messages."""
        captions = [self.captions[i] for i in self.caption[index.to(self.caption.device)].tolist()]
        return [f"seed {s} ({c})" for s, c in zip(self.seed[index].tolist(), captions, strict=True)]

    def nearest(self, keep: float) -> Pairs:
        """The ``keep`` fraction with the shortest ‖x₁ − x₀‖: the farthest are often the solver's failures
        (Re-MeanFlow, arXiv 2511.23342)."""
        distance = (self.latent - self.noise).square().flatten(1).sum(1)
        index = distance.argsort()[: max(1, int(keep * len(distance)))]
        return Pairs(
            self.noise[index], self.latent[index], self.caption[index], self.captions, self.seed[index.cpu()]
        )


class PairDrawer:
    """A teacher and the captions it draws, on the device."""

    def __init__(self, config: PairsConfig, teacher: Path, captions: list[str], device: torch.device):
        self.config, self.captions, self.device = config, captions, device
        parts = load_parts(teacher)
        self.unet = parts.unet.to(device, memory_format=torch.channels_last)
        self.vae = parts.vae.to(device)
        self.text = caption_states(parts, captions, device)
        self.empty = caption_states(parts, [""], device)
        side = self.unet.config.sample_size
        self.shape = (self.unet.config.in_channels, side, side)

    def draw(self, numbers: Tensor) -> Tensor:
        """Latents float16 (N, C, h, w) of the pairs of these numbers, on the CPU."""
        noise = seeded_noise(numbers + self.config.seed, self.shape).to(self.device)
        text = self.text[(numbers % len(self.captions)).to(self.device)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            x = sample_teacher(
                self.unet, text, self.empty, noise, steps=self.config.steps, guidance=self.config.guidance
            )
        return x.half().cpu()

    def draw_sheet(self, path: Path, latents: Tensor) -> None:
        labels = [self.captions[i % len(self.captions)] for i in range(len(latents))]
        draw_sheet(path, decode(self.vae, latents.float().to(self.device)), labels, columns=8)


def draw_pairs(config: PairsConfig, drawer: PairDrawer, out: Path) -> int:
    """Draw pairs into ``out``, a shard at a time; whole shards that are there already are kept, one that
    was cut short (by ``minutes``, or by fewer ``num_pairs``) is drawn again.

    Pair i takes caption i modulo their number, so every caption is drawn equally often. Returns the number
    of pairs on disk.
    """
    per_shard = -(-config.shard_size // config.batch_size) * config.batch_size
    began, drawn, on_disk = time.monotonic(), 0, 0
    for number, start in enumerate(progress(range(0, config.num_pairs, per_shard), "pairs")):
        path, end = out / f"pairs-{number:05d}.safetensors", min(start + per_shard, config.num_pairs)
        if path.is_file() and len(load_file(path)["seed"]) == end - start:
            on_disk += end - start
            continue
        latents: list[Tensor] = []
        for numbers in torch.arange(start, end).split(config.batch_size):
            if config.minutes and time.monotonic() - began > 60 * config.minutes:
                break
            latents.append(drawer.draw(numbers))
        if not latents:
            break
        latent = torch.cat(latents)
        numbers = torch.arange(start, start + len(latent))
        caption = (numbers % len(drawer.captions)).int()
        _save_whole({"seed": numbers + config.seed, "caption": caption, "latent": latent}, path)
        drawn, on_disk = drawn + len(latent), on_disk + len(latent)
        if number == 0:
            drawer.draw_sheet(out / "sheet.png", latent[:32])
    seconds = time.monotonic() - began
    record = {"pairs": drawn, "seconds": round(seconds, 1), "pairs_per_s": round(drawn / seconds, 1)}
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")
    return on_disk


def start_pairs(out: Path, config: PairsConfig, captions: list[str], *, force: bool, resume: bool) -> None:
    """Make the folder. Raises OutputExistsError, or DataError for a --resume that does not fit."""
    if out.exists() and any(out.iterdir()):
        if resume:
            _check_continues(out, config, captions)
        elif not force:
            raise OutputExistsError(out)
        else:
            for stale in (*out.glob("pairs-*.safetensors"), out / "metrics.jsonl"):
                stale.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    write_captions(out / "captions.json", captions)


def _check_continues(out: Path, config: PairsConfig, captions: list[str]) -> None:
    try:
        begun = json.loads((out / "config.json").read_text(encoding="utf-8"))
        same = read_captions(out / "captions.json") == captions and _fixed(begun) == _fixed(to_dict(config))
    except (OSError, ValueError) as error:
        raise DataError(f"pairs: {out}: expected a folder of pairs to resume, got: {error}") from error
    if not same:
        raise DataError(f"pairs: {out}: --resume wants the captions and settings the folder was begun with")


def _fixed(config: dict[str, object]) -> dict[str, object]:
    """What may not change when a folder is continued."""
    return {k: v for k, v in config.items() if k not in ("num_pairs", "minutes")}


def _save_whole(shard: dict[str, Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(shard, partial)
    partial.replace(path)
