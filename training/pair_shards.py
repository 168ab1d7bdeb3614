"""Pairs on disk: webdataset shards, each written whole or not at all.

A folder of pairs holds::

    pairs.json                    teacher, captions and latent shape: what --resume must find unchanged
    config.json                   the stage's resolved configuration
    pairs-00000.tar               ``000000007.json`` {"caption": …, "seed": …} and ``000000007.latent.npy``
    pairs-00000.distance.npy      float32 (N,): ‖x₁ − x₀‖² of the shard's pairs, in their order

A latent is float16 (C, h, w) at UNet scale. The noise x₀ is not stored: it is ``torch.randn`` of a CPU
generator with the pair's seed. The distances say how many pairs a shard has without reading it, and let a
reader leave out the farthest pairs without having seen all of them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflow.errors import BackendMissing, DataError

SCHEMA = 1
FACTS = "pairs.json"
#: Sets of at least this many pairs are read by several processes: one reads some thousands a second.
_MANY, _READERS = 20_000, 8


@dataclass(frozen=True)
class Shard:
    """The pairs of one shard. ``seed`` int64 (N,), ``latent`` float16 (N, C, h, w)."""

    seed: NDArray[np.int64]
    caption: list[str]
    latent: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.seed)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:05d}.tar"


def distance_path(shard: Path) -> Path:
    return shard.with_suffix(".distance.npy")


def write_shard(path: Path, first: int, shard: Shard, distance: NDArray[np.float32]) -> None:
    """Write the pairs numbered from ``first``; equal pairs give equal bytes.

    The shard is there once its tar is: the distances come before it, and a shard that it replaces goes first.
    """
    path.unlink(missing_ok=True)
    with _whole(distance_path(path)) as file:
        np.save(file, distance.astype(np.float32))
    with (
        _whole(path) as file,
        _webdataset().TarWriter(file, user="edgeflow", group="edgeflow", mtime=0) as writer,
    ):
        for i, (seed, caption, latent) in enumerate(
            zip(shard.seed, shard.caption, shard.latent, strict=True)
        ):
            about = {"caption": caption, "seed": int(seed)}
            writer.write({"__key__": f"{first + i:09d}", "json": about, "latent.npy": latent})


class _whole:
    """A file that takes its name once it is complete and on the disk."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Any:
        self.file = self.partial.open("wb")
        return self.file

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


def shard_length(path: Path) -> int:
    """Number of pairs of a whole shard; 0 where there is none."""
    try:
        return len(np.load(distance_path(path), mmap_mode="r")) if path.is_file() else 0
    except (OSError, ValueError):
        return 0


def list_shards(folder: Path) -> list[Path]:
    """The whole shards of a folder, by number. Raises DataError where there is none."""
    shards = [path for path in sorted(folder.glob("pairs-*.tar")) if shard_length(path)]
    if not shards or not (folder / FACTS).is_file():
        raise DataError(f"pairs: {folder}: expected {FACTS} and shards pairs-*.tar, found none")
    return shards


def read_facts(folder: Path) -> dict[str, Any]:
    """``pairs.json``. Raises DataError for one of another schema."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"pairs: {folder / FACTS}: expected a folder of pairs, got: {error}") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise DataError(f"pairs: {folder / FACTS}: expected schema {SCHEMA}")
    return facts


def read_distances(shards: Sequence[Path]) -> list[NDArray[np.float32]]:
    """The squared distances of every shard's pairs."""
    return [np.load(distance_path(shard)) for shard in shards]


def read_shard(path: Path) -> Shard:
    """All pairs of a shard. Raises DataError for one that is cut short or holds something else."""
    _webdataset()
    from webdataset.tariterators import group_by_keys, tar_file_expander

    seeds, captions, latents = [], [], []
    try:
        with path.open("rb") as stream:
            # A stream, not a name: webdataset would expand braces and commands in one.
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                about = json.loads(sample["json"])
                seeds.append(about["seed"])
                captions.append(str(about["caption"]))
                latents.append(np.lib.format.read_array(io.BytesIO(sample["latent.npy"])))
        shard = Shard(np.array(seeds, dtype=np.int64), captions, np.stack(latents))
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"pairs: {path}: the shard cannot be read: {reason}") from error
    if len(shard) != shard_length(path):
        raise DataError(f"pairs: {path}: expected {shard_length(path)} pairs, got {len(shard)}")
    return shard


def read_shards(paths: Sequence[Path]) -> Iterator[Shard]:
    """Every shard in turn; a large set by several processes."""
    if len(paths) < 2 or sum(map(shard_length, paths)) < _MANY:
        yield from map(read_shard, paths)
        return
    from torch.utils.data import DataLoader

    workers = min(_READERS, len(paths), os.cpu_count() or 1)
    # NumPy arrays come through a pipe: containers often have little shared memory, which tensors would take.
    yield from DataLoader(_Shards(paths), batch_size=None, num_workers=workers, collate_fn=_same)


class _Shards:
    """The shards as DataLoader's workers want them."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Shard:
        if i >= len(self.paths):
            raise IndexError(i)
        return read_shard(self.paths[i])


def _same(shard: Shard) -> Shard:
    return shard


def _webdataset() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise BackendMissing("webdataset", "train") from error
    return webdataset
