"""Pairs: (noise seed, caption, latent) triples drawn by the teacher, the coupling that reflow straightens.

Drawing is a stage of its own, sized for millions: webdataset shards (edgeflow.training.pair_shards), each
drawn by one of any number of processes, each written whole or not at all. Pair i has the noise of seed
``seed + i`` and caption i modulo their number, so which process draws it does not matter.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli.options import progress
from edgeflow.errors import DataError, OutputExistsError, TrainingError, UsageError
from edgeflow.loading import quiet_libraries
from edgeflow.solvers import scheduler_of
from edgeflow.training.config import to_dict
from edgeflow.training.corpus import caption_states, encode_captions
from edgeflow.training.models import load_parts
from edgeflow.training.pair_shards import (
    FACTS,
    SCHEMA,
    Shard,
    list_shards,
    read_shards,
    shard_length,
    shard_path,
    write_shard,
)
from edgeflow.training.ranks import Ranks
from edgeflow.training.sampling import decode, sample_teacher, seeded_noise
from edgeflow.training.sheet import draw_sheet
from edgeflow.training.text_states import GIB, encode, states_bytes

_LOG = logging.getLogger("edgeflow")
#: Caption states up to this size are computed once, those of more captions a batch at a time.
_TABLE_BYTES = 2 * GIB
#: How long the other processes wait for the first one to make the folder, in seconds.
_PATIENCE_S = 600.0
WEIGHTS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class PairsConfig:
    num_pairs: int
    batch_size: int
    shard_size: int = 20480  # pairs; rounded up to whole batches
    steps: int = 25
    guidance: float = 3.0
    seed: int = 0  # pair i's noise has the seed ``seed + i``
    minutes: float = 0.0  # stop after this much wall time with the whole batches drawn so far; 0: no limit
    bf16: bool = False  # autocast
    weights: str = "float32"  # or float16, bfloat16: what the UNet is held and computed in
    compile: bool = False


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
        noise, latent, caption, seeds, numbers = [], [], [], [], dict[str, int]()
        for shard in read_shards(list_shards(folder)):
            latent.append(torch.from_numpy(shard.latent).to(device).float())
            seeds.append(torch.from_numpy(shard.seed).long())
            noise.append(seeded_noise(seeds[-1], shard.latent.shape[1:]).to(device))
            caption += [numbers.setdefault(text, len(numbers)) for text in shard.caption]
        return cls(
            torch.cat(noise),
            torch.cat(latent),
            torch.tensor(caption, device=device),
            list(numbers),
            torch.cat(seeds),
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

    def __init__(self, config: PairsConfig, teacher: Path, captions: Sequence[str], device: torch.device):
        if config.weights not in WEIGHTS:
            raise UsageError(f"weights: expected one of {', '.join(WEIGHTS)}, got {config.weights!r}")
        self.config, self.captions, self.device = config, captions, device
        checkpoint = Checkpoint.open(teacher)
        self.teacher = {"name": checkpoint.name, "hash": checkpoint.hash}
        self.solver = scheduler_of(checkpoint)
        self.parts = load_parts(teacher)
        dtype = getattr(torch, config.weights)
        with quiet_libraries():
            self.unet = self.parts.unet.to(device, dtype=dtype, memory_format=torch.channels_last)
        self.vae = self.parts.vae.to(device)
        self.encoder = self.parts.text_encoder.to(device)
        # A caption that is drawn once need not be kept.
        small = states_bytes(self.parts, len(captions)) <= _TABLE_BYTES
        self.table = caption_states(self.parts, captions, device) if small else None
        self.empty = caption_states(self.parts, [""], device)
        side = self.unet.config.sample_size
        self.shape = (self.unet.config.in_channels, side, side)
        if config.compile:
            self.unet.compile()

    def caption(self, number: int) -> str:
        return self.captions[number % len(self.captions)]

    def draw(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """float16 latents (N, C, h, w) of these pairs and float32 ‖x₁ − x₀‖² (N,), on the CPU."""
        noise = seeded_noise(numbers + self.config.seed, self.shape).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            x = sample_teacher(
                self.unet,
                self._text(numbers),
                self.empty,
                noise,
                steps=self.config.steps,
                guidance=self.config.guidance,
                solver=self.solver,
            )
        latent = x.half()
        if not torch.isfinite(latent).all():
            raise TrainingError(
                f"pairs: a latent of pairs {int(numbers[0])} to {int(numbers[-1])} is not finite; try "
                "--set weights=bfloat16 or float32, or a lower guidance"
            )
        return latent.cpu(), (latent.float() - noise).square().flatten(1).sum(1).cpu()

    def _text(self, numbers: Tensor) -> Tensor:
        if self.table is not None:
            return self.table[(numbers % len(self.captions)).to(self.device)]
        captions = [self.caption(i) for i in numbers.tolist()]
        return encode(self.encoder, encode_captions(captions, self.parts.tokenizer_dir, self.device))

    def draw_sheet(self, path: Path, latents: Tensor) -> None:
        labels = [self.caption(i) for i in range(len(latents))]
        draw_sheet(path, decode(self.vae, latents.float().to(self.device), 8), labels, columns=8)


def draw_pairs(config: PairsConfig, drawer: PairDrawer, out: Path, ranks: Ranks | None = None) -> int:
    """Draw this process's share of the pairs into ``out``, a shard at a time.

    Shard n falls to process n modulo their number. Whole shards that are there already are kept, one that
    was cut short (by ``minutes``, or by fewer ``num_pairs``) is drawn again. Returns the number of this
    process's pairs on disk.
    """
    ranks, per_shard = ranks or Ranks(), _per_shard(config)
    began, drawn, on_disk = time.monotonic(), 0, 0
    shards = range(ranks.rank, -(-config.num_pairs // per_shard), ranks.world)
    for number in progress(shards, "pairs"):
        first, path = number * per_shard, shard_path(out, number)
        wanted = min(per_shard, config.num_pairs - first)
        if shard_length(path) == wanted:
            on_disk += wanted
            continue
        latent, distance = _draw_shard(drawer, torch.arange(first, first + wanted), began)
        if not len(latent):
            break
        seeds = np.arange(first, first + len(latent), dtype=np.int64)
        captions = [drawer.caption(i) for i in seeds.tolist()]
        write_shard(path, first, Shard(seeds + config.seed, captions, latent.numpy()), distance.numpy())
        drawn, on_disk = drawn + len(latent), on_disk + len(latent)
        if number == 0:
            drawer.draw_sheet(out / "sheet.png", latent[:32])
    _log(out, ranks, drawn, time.monotonic() - began)
    return on_disk


def _per_shard(config: PairsConfig) -> int:
    """Pairs of a whole shard: whole batches."""
    return -(-config.shard_size // config.batch_size) * config.batch_size


def _draw_shard(drawer: PairDrawer, numbers: Tensor, began: float) -> tuple[Tensor, Tensor]:
    """Latents and distances of these pairs, or of the batches for which there was time."""
    minutes, parts = drawer.config.minutes, []
    for batch in numbers.split(drawer.config.batch_size):
        if minutes and time.monotonic() - began > 60 * minutes:
            break
        parts.append(drawer.draw(batch))
    if not parts:
        return torch.empty(0), torch.empty(0)
    return torch.cat([latent for latent, _ in parts]), torch.cat([distance for _, distance in parts])


def _log(out: Path, ranks: Ranks, drawn: int, seconds: float) -> None:
    record = {"pairs": drawn, "seconds": round(seconds, 1), "pairs_per_s": round(drawn / seconds, 1)}
    if ranks.world > 1:
        record["rank"] = ranks.rank
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


def read_prompts(path: Path) -> list[str]:
    """The captions of a text file, one a line; blank lines are left out. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"prompts: {path}: expected a UTF-8 text file, one caption a line, got: {error}"
        ) from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise DataError(f"prompts: {path}: expected a caption a line, found none")
    return captions


def start_pairs(
    out: Path,
    config: PairsConfig,
    drawer: PairDrawer,
    *,
    force: bool,
    resume: bool,
    ranks: Ranks | None = None,
) -> None:
    """Make the folder, or check that it can be continued; of several processes the first one makes it.

    Raises OutputExistsError, DataError for a --resume that does not fit or a folder that never came.
    """
    ranks, facts = ranks or Ranks(), _facts(config, drawer)
    if ranks.world > 1 and force:
        raise UsageError(f"--force: {out}: expected one process, got {ranks.world}; remove the folder first")
    if ranks.rank:
        _wait_for(out, config, facts)
        return
    if out.exists() and any(out.iterdir()):
        if resume:
            _check_continues(out, config, facts)
        elif not force:
            raise OutputExistsError(out)
        else:
            for stale in (*out.glob("pairs-*"), out / FACTS, out / "metrics.jsonl"):
                stale.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", to_dict(config))
    _write_json(out / FACTS, facts)


def check_pairs(out: Path, *, force: bool, resume: bool, ranks: Ranks | None = None) -> None:
    """What ``start_pairs`` can say of the folder before the teacher is read. Raises OutputExistsError."""
    first = ranks is None or ranks.rank == 0
    if first and not (resume or force) and out.exists() and (out.is_file() or any(out.iterdir())):
        raise OutputExistsError(out)


def _facts(config: PairsConfig, drawer: PairDrawer) -> dict[str, object]:
    digest = sha256("\n".join(drawer.captions).encode()).hexdigest()
    return {
        "schema": SCHEMA,
        "teacher": drawer.teacher,
        "captions": {"count": len(drawer.captions), "sha256": digest},
        "latent_shape": list(drawer.shape),
        "shard_size": _per_shard(config),
    }


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def _check_continues(out: Path, config: PairsConfig, facts: dict[str, object]) -> None:
    try:
        begun = json.loads((out / "config.json").read_text(encoding="utf-8"))
        drawn = json.loads((out / FACTS).read_text(encoding="utf-8"))
        wrong = [k for k in facts if drawn.get(k) != facts[k]]
        wrong += [k for k, v in _fixed(to_dict(config)).items() if begun.get(k) != v]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"pairs: {out}: expected a folder of pairs to resume, got: {error}") from error
    if wrong:
        raise DataError(
            f"pairs: {out}: --resume wants the captions, teacher and settings the folder was begun with; "
            f"different: {', '.join(wrong)}"
        )


def _fixed(config: dict[str, object]) -> dict[str, object]:
    """What may not change when a folder is continued."""
    return {k: v for k, v in config.items() if k not in ("num_pairs", "minutes")}


def _wait_for(out: Path, config: PairsConfig, facts: dict[str, object]) -> None:
    """Until the first process has made the folder."""
    until = time.monotonic() + _PATIENCE_S
    while not (out / FACTS).is_file():
        if time.monotonic() > until:
            raise DataError(f"pairs: {out}: expected process 0 to make the folder within {_PATIENCE_S:.0f} s")
        time.sleep(0.2)
    _check_continues(out, config, facts)
