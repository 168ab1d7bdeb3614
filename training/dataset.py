"""Captioned pictures on disk, written and read: webdataset shards, or a Hugging Face ``imagefolder``.

A sample of a shard is ``KEY.webp`` (or png, jpg, jpeg), ``KEY.txt`` with the caption, and ``KEY.json`` with
``caption, concept, style, source, licence``; either text part may be missing. A folder of shards named
``train-*.tar`` and ``test-*.tar`` has these splits; shards named otherwise are all train. An imagefolder has
``metadata.jsonl`` with ``file_name`` and ``text`` or ``caption``, at its root or in ``train/`` and
``test/``.

What cannot be used is a :class:`Problem` with a key and a reason: counted and named, not fatal, not silent.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgeflow.errors import DataError

PICTURE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
SPLITS = ("train", "test")
SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
SAMPLES_PER_SHARD = 2000
METADATA = "metadata.jsonl"
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Problem:
    """One sample that cannot be used: which, and why."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """One captioned picture: ``picture`` is RGB, at its own size, what was transparent made white."""

    key: str
    picture: Image.Image
    caption: str
    concept: str  # "" where the set does not say
    style: str  # "" where the set does not say


@dataclass(frozen=True)
class Loaded:
    """A split in memory. ``images`` is uint8 (N, 3, size, size), RGB; the lists have N items in its order."""

    images: NDArray[np.uint8]
    captions: list[str]
    keys: list[str]
    concepts: list[str]
    styles: list[str]
    problems: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class _Raw:
    """One sample still in bytes. ``where`` names it in a problem; ``content`` is the picture, or why none."""

    key: str
    where: str
    content: bytes | Problem
    caption: str = ""
    known: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionedPictures:
    """An opened set. Nothing is read but names until :meth:`iterate` or :meth:`load`."""

    path: Path
    kind: str  # "webdataset" or "imagefolder"
    files: Mapping[str, tuple[Path, ...]]  # split → its shards, or its metadata files

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def iterate(self, split: str, on_problem: Callable[[Problem], None]) -> Iterator[Sample]:
        """Stream a split's usable samples in the order they are stored; ``on_problem`` is told of the others.

        Raises DataError when the set has no such split.
        """
        if split not in self.files:
            raise DataError(
                f"dataset: {self.path}: expected a split {split!r}; known: {', '.join(self.files) or 'none'}"
            )
        if self.kind == "webdataset":
            raw = _read_shards(self.files[split], on_problem)
        else:
            raw = _read_imagefolder(self.path, split, self.files[split], on_problem)
        for item in raw:
            picture = _decode(item)
            caption = item.caption.strip()
            if isinstance(picture, Problem):
                on_problem(picture)
            elif not caption:
                on_problem(Problem(item.where, "empty caption"))
            else:
                words = {name: str(item.known.get(name) or "") for name in ("concept", "style")}
                yield Sample(key=item.key, picture=picture, caption=caption, **words)

    def load(self, split: str, size: int, limit: int | None = None) -> Loaded:
        """Read a split into memory at ``size`` × ``size`` pixels, see :func:`fit_square`.

        ``limit`` stops after that many usable pictures. Raises DataError when none is usable.
        """
        problems: list[Problem] = []
        images: list[NDArray[np.uint8]] = []
        samples: list[tuple[str, str, str, str]] = []
        for sample in self.iterate(split, problems.append):
            images.append(np.asarray(fit_square(sample.picture, size)).transpose(2, 0, 1))
            samples.append((sample.caption, sample.key, sample.concept, sample.style))
            if limit is not None and len(images) >= limit:
                break
        if not images:
            first = f"; the first problem: {problems[0]}" if problems else ""
            raise DataError(
                f"dataset: {self.path}: expected pictures in split {split!r}, got 0 usable ones of "
                f"{len(problems)}{first}"
            )
        captions, keys, concepts, styles = (list(column) for column in zip(*samples, strict=True))
        return Loaded(np.stack(images), captions, keys, concepts, styles, problems)


def open_dataset(path: Path | str) -> CaptionedPictures:
    """Open a folder of webdataset shards or an imagefolder.

    Raises DataError when the folder is missing or is neither.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"dataset: {path}: expected a folder of shards or pictures, got no folder")
    shards = sorted(file for file in path.iterdir() if file.name.endswith(SHARD_ENDINGS))
    if shards:
        named = {split: tuple(s for s in shards if s.name.startswith(f"{split}-")) for split in SPLITS}
        named = {split: files for split, files in named.items() if files}
        return CaptionedPictures(path, "webdataset", named or {"train": tuple(shards)})
    found: dict[str, tuple[Path, ...]] = {}
    if (path / METADATA).is_file():
        found["train"] = (path / METADATA,)
        if _mentions_test(path / METADATA):
            found["test"] = (path / METADATA,)
    for split in SPLITS:
        if (path / split / METADATA).is_file():
            found[split] = (*found.get(split, ()), path / split / METADATA)
    if not found:
        raise DataError(f"dataset: {path}: expected *.tar shards or an imagefolder's {METADATA}, got neither")
    return CaptionedPictures(path, "imagefolder", found)


def fit_square(picture: Image.Image, size: int) -> Image.Image:
    """Scale an RGB picture so that its shorter side is ``size`` pixels, and cut the middle square out."""
    if picture.size == (size, size):
        return picture
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def write_shards(
    folder: Path, split: str, samples: Iterable[tuple[str, bytes, Mapping[str, Any]]], suffix: str
) -> list[dict[str, Any]]:
    """Write ``SPLIT-000000.tar`` … under ``folder``; equal samples give equal bytes.

    A sample is its key (no dot, no slash), the encoded picture, and what goes in its JSON (with ``caption``).
    Returns each shard's ``file, split, samples, bytes, sha256``.
    """
    import webdataset

    written: list[dict[str, Any]] = []
    pending = list(samples)
    for start in range(0, len(pending), SAMPLES_PER_SHARD):
        part = pending[start : start + SAMPLES_PER_SHARD]
        shard = folder / f"{split}-{len(written):06d}.tar"
        # A shard's members carry no time and no user of this machine.
        with webdataset.TarWriter(str(shard), user="edgeflow", group="edgeflow", mtime=0) as writer:
            for key, content, known in part:
                if "." in key or "/" in key:
                    raise ValueError(f"write_shards: key {key!r}: expected no dot and no slash")
                text = json.dumps(dict(known), ensure_ascii=False, sort_keys=True)
                writer.write(
                    {
                        "__key__": key,
                        suffix: content,
                        "json": text.encode(),
                        "txt": str(known["caption"]).encode(),
                    }
                )
        content = shard.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        written.append(
            {
                "file": shard.name,
                "split": split,
                "samples": len(part),
                "bytes": len(content),
                "sha256": digest,
            }
        )
    return written


def _decode(item: _Raw) -> Image.Image | Problem:
    if isinstance(item.content, Problem):
        return item.content
    try:
        with Image.open(io.BytesIO(item.content)) as opened:
            opened.load()
            if opened.mode in ("RGB", "L"):
                return opened.convert("RGB")
            layered = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Problem(item.where, f"broken picture: {_one_line(error)}")
    ground = Image.new("RGBA", layered.size, (*WHITE, 255))
    return Image.alpha_composite(ground, layered).convert("RGB")


def _one_line(error: Exception) -> str:
    # Pillow's message for an unknown format holds the buffer's address, which differs between runs.
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    return " ".join(str(error).split()) or type(error).__name__


def _read_shards(shards: Iterable[Path], on_problem: Callable[[Problem], None]) -> Iterator[_Raw]:
    for shard in shards:
        try:
            with tarfile.open(shard, "r|*") as tar:
                for key, parts in _samples(tar):
                    yield _raw_sample(f"{shard.name}:{key}", key, parts)
        except (tarfile.TarError, OSError, EOFError) as error:
            on_problem(Problem(shard.name, f"the shard breaks off: {_one_line(error)}"))


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Neighbouring members with the same name up to the first dot of the file name are one sample."""
    key, parts = "", dict[str, bytes]()
    try:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            this = f"{folder}/{stem}" if folder else stem
            if this != key:
                if parts:
                    yield key, parts
                key, parts = this, {}
            parts[suffix.lower()] = stream.read()
    except (tarfile.TarError, OSError, EOFError):
        if parts:
            yield key, parts
        raise
    if parts:
        yield key, parts


def _raw_sample(where: str, key: str, parts: Mapping[str, bytes]) -> _Raw:
    suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in parts), None)
    if suffix is None:
        return _Raw(key, where, Problem(where, f"no picture among {', '.join(sorted(parts))}"))
    known: Mapping[str, Any] = {}
    try:
        known = json.loads(parts["json"]) if "json" in parts else {}
        caption = (
            parts["txt"].decode() if "txt" in parts else str(known.get("caption") or known.get("text") or "")
        )
    except (ValueError, AttributeError) as error:
        return _Raw(key, where, Problem(where, f"broken caption: {_one_line(error)}"))
    return _Raw(key, where, parts[suffix], caption, known)


def _read_imagefolder(
    root: Path, split: str, files: Iterable[Path], on_problem: Callable[[Problem], None]
) -> Iterator[_Raw]:
    for metadata in files:
        folder = metadata.parent
        # A file in the split's own folder speaks for that split alone, whatever its rows are called.
        shared = folder == root
        listed: set[Path] = set()
        for number, row in _rows(metadata):
            name = str(row.get("file_name") or "") if row else ""
            if row is None or not name:
                if not shared or split == "train":
                    where = f"{_below(root, metadata)}:{number}"
                    on_problem(Problem(where, "expected a JSON object with file_name"))
                continue
            listed.add(folder / name)
            if not shared or _split_of(name) == split:
                where = _below(root, folder / name)
                caption = str(row.get("text") or row.get("caption") or "")
                yield _Raw(where, where, _read_picture(folder, name, where), caption, row)
        for file in sorted(_pictures(root, split) if shared else folder.rglob("*")):
            if file.suffix.lower().lstrip(".") in PICTURE_SUFFIXES and file not in listed:
                on_problem(Problem(_below(root, file), f"no line in {METADATA}"))


def _pictures(root: Path, split: str) -> Iterator[Path]:
    """What lies in ``root`` for a split that ``root``'s own metadata speaks for."""
    for file in root.rglob("*"):
        name = _below(root, file)
        if _split_of(name) == split and not (root / name.partition("/")[0] / METADATA).is_file():
            yield file


def _split_of(name: str) -> str:
    return "test" if name.startswith("test/") else "train"


def _below(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def _rows(metadata: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Line number and row; None for a line that is no JSON object."""
    for number, line in enumerate(metadata.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else None


def _mentions_test(metadata: Path) -> bool:
    return any(row and _split_of(str(row.get("file_name", ""))) == "test" for _, row in _rows(metadata))


def _read_picture(folder: Path, name: str, where: str) -> bytes | Problem:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        return Problem(where, "lies outside the dataset's folder")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return Problem(where, "the file is missing")
    except OSError as error:
        return Problem(where, f"cannot be read: {error.strerror}")
