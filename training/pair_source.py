"""Where a stage's pairs come from: all held on the device, or streamed a shard at a time.

Both look alike to an objective: ``pairs`` and ``text`` are tensors on the device of which it draws rows, with
replacement. Held, they are the whole folder. Streamed, they are one shard, and ``prepare`` puts the next one
into the same memory when its turn comes, so that a step may be one captured CUDA graph either way.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import DataError
from edgeflow.training.corpus import caption_states
from edgeflow.training.models import Parts
from edgeflow.training.pair_shards import list_shards, read_distances, read_facts, read_shard, shard_length
from edgeflow.training.pairs import Pairs
from edgeflow.training.parallel import Processes
from edgeflow.training.sampling import seeded_noise
from edgeflow.training.text_states import GIB, states_bytes

_LOG = logging.getLogger("edgeflow")


@dataclass(frozen=True)
class PairFolder:
    """A folder of pairs that is too large to be held: see :class:`StreamedPairs`."""

    path: Path


class PairSource(Protocol):
    """What an objective draws from. ``text`` float32 (M, L, D): states, by ``pairs.caption``."""

    pairs: Pairs
    text: Tensor

    def prepare(self, done: int) -> None:
        """Called before the step after ``done`` steps."""

    def names(self, index: Tensor) -> list[str]:
        """Names of the examples ``index`` of the step prepared for, for messages."""


def open_pairs(folder: Path, model: Path, device: torch.device, limit_gib: float) -> Pairs | PairFolder:
    """The folder's pairs, loaded where they and their captions' states take at most ``limit_gib``.

    Raises DataError for a folder without whole shards, or with latents of another shape than the model's.
    """
    checkpoint, shards, facts = Checkpoint.open(model), list_shards(folder), read_facts(folder)
    shape, wanted = tuple(facts["latent_shape"]), checkpoint.generation.latent_shape
    if shape != wanted:
        raise DataError(f"pairs: {folder}: expected latents of shape {wanted}, as {model} has, got {shape}")
    count, text = sum(map(shard_length, shards)), checkpoint.config("text_encoder")
    states = states_bytes(
        text["max_position_embeddings"], text["hidden_size"], min(count, int(facts["captions"]["count"]))
    )
    gib = (8 * count * int(np.prod(shape)) + states) / GIB
    if gib <= limit_gib:
        _LOG.info(f"pairs: {count} pairs of {len(shards)} shards are held on the device: {gib:.2f} GiB")
        return Pairs.load(folder, device)
    _LOG.info(
        f"pairs: {count} pairs of {len(shards)} shards are streamed, a shard at a time: with their captions "
        f"they would take {gib:.2f} GiB, more than pairs_gib = {limit_gib:g}"
    )
    return PairFolder(folder)


def pair_source(
    pairs: Pairs | PairFolder, parts: Parts, device: torch.device, *, batch_size: int, keep: float, seed: int
) -> PairSource:
    """The source of an objective whose steps take ``batch_size`` pairs over all processes, of the ``keep``
    nearest."""
    if isinstance(pairs, Pairs):
        return HeldPairs(pairs, parts, device, keep)
    return StreamedPairs(pairs.path, parts, device, batch_size=batch_size, keep=keep, seed=seed)


class HeldPairs:
    """All pairs."""

    def __init__(self, pairs: Pairs, parts: Parts, device: torch.device, keep: float):
        self.pairs = pairs.nearest(keep)
        self.text = caption_states(parts, pairs.captions, device)

    def prepare(self, done: int) -> None:
        """Nothing changes."""

    def names(self, index: Tensor) -> list[str]:
        return self.pairs.names(index)


class StreamedPairs:
    """The shard whose turn it is; each process has its own.

    Every epoch visits all shards in a new order, a shard for as many steps as it has batches, so every pair
    is drawn equally often. Which shard is read at which step depends on seed and step alone: a resumed run
    goes on where it stopped.
    """

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        device: torch.device,
        *,
        batch_size: int,
        keep: float,
        seed: int,
        processes: Processes | None = None,
    ):
        self.parts, self.device = parts, device
        self.processes = processes or Processes.current(device)
        self.shards = list_shards(folder)
        if len(self.shards) < self.processes.size:
            raise DataError(
                f"pairs: {folder}: expected a shard for each of {self.processes.size} processes, got "
                f"{len(self.shards)}; draw them with a smaller shard_size"
            )
        self.kept = _nearest(read_distances(self.shards), keep)
        self.step_pairs, self.seed = max(1, batch_size // self.processes.size), seed
        self.turns = Turns([int(k.sum()) for k in self.kept], self.processes.rank, self.processes.size, seed)
        self._held = -1
        self._allocate()
        self.prepare(0)

    def prepare(self, done: int) -> None:
        """Read the shard whose turn it is after ``done`` steps, unless it is there."""
        if (turn := self.turns.at(done * self.step_pairs)) != self._held:
            self._read(turn)
            self._held = turn

    def names(self, index: Tensor) -> list[str]:
        if self.processes.size == 1:
            return self.pairs.names(index)
        # The other processes draw from shards of their own: at the same rows.
        here = self.shards[self._held].name
        return [f"row {i} of each process's shard, here {here}" for i in index.tolist()]

    def _allocate(self) -> None:
        """The memory that every shard in turn is read into."""
        size, shape = max(int(k.sum()) for k in self.kept), read_facts(self.shards[0].parent)["latent_shape"]
        text = self.parts.text_encoder.to(self.device).config
        states = (size, text.max_position_embeddings, text.hidden_size)
        self.pairs = Pairs(
            noise=torch.zeros(size, *shape, device=self.device),
            latent=torch.zeros(size, *shape, device=self.device),
            caption=torch.arange(size, device=self.device),
            captions=[""] * size,
            seed=torch.zeros(size, dtype=torch.int64),
        )
        self.text = torch.zeros(states, device=self.device)

    def _read(self, number: int) -> None:
        shard, size = read_shard(self.shards[number]), len(self.pairs.captions)
        # A shard with fewer pairs than the largest goes around until the memory is full.
        rows = np.resize(np.flatnonzero(self.kept[number]), size)
        seeds = torch.from_numpy(shard.seed[rows])
        self.pairs.seed.copy_(seeds)
        self.pairs.captions[:] = [shard.caption[i] for i in rows]
        for part in torch.arange(size).split(1024):
            where = slice(int(part[0]), int(part[-1]) + 1)
            self.pairs.noise[where] = seeded_noise(seeds[part], shard.latent.shape[1:]).to(self.device)
            self.pairs.latent[where] = torch.from_numpy(shard.latent[rows[where]]).to(self.device).float()
            self.text[where] = self._states(self.pairs.captions[where])

    def _states(self, captions: Sequence[str]) -> Tensor:
        """States of the captions, each distinct one computed once."""
        distinct = {text: i for i, text in enumerate(dict.fromkeys(captions))}
        index = torch.tensor([distinct[text] for text in captions], device=self.device)
        return caption_states(self.parts, list(distinct), self.device)[index]


class Turns:
    """The shards of one process in the order in which it reads them, epoch after epoch.

    Each epoch's order is a permutation of all shards, dealt to the processes in turn.
    """

    def __init__(self, lengths: Sequence[int], rank: int, world: int, seed: int):
        self.lengths, self.rank, self.world, self.seed = np.asarray(lengths), rank, world, seed
        self._ends: list[int] = [0]  # pairs seen at the end of each epoch
        self._epoch, self._order, self._within = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def at(self, position: int) -> int:
        """The shard that holds the process's pair of this number, counted over all epochs."""
        while self._ends[-1] <= position:
            self._open(len(self._ends) - 1)
            self._ends.append(self._ends[-1] + int(self._within[-1]))
        epoch = bisect.bisect_right(self._ends, position) - 1
        self._open(epoch)
        return int(self._order[np.searchsorted(self._within, position - self._ends[epoch], side="right")])

    def _open(self, epoch: int) -> None:
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
            self._order = order[self.rank :: self.world]
            self._within, self._epoch = np.cumsum(self.lengths[self._order]), epoch


def _nearest(distances: Sequence[NDArray[np.float32]], keep: float) -> list[NDArray[np.bool_]]:
    """Which pairs of each shard are among the ``keep`` nearest of all."""
    every = np.concatenate(distances)
    chosen = np.zeros(len(every), bool)
    chosen[np.argsort(every, kind="stable")[: max(1, int(keep * len(every)))]] = True
    return np.split(chosen, np.cumsum([len(d) for d in distances])[:-1])
