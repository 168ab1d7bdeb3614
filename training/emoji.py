"""Open emoji artwork as a captioned text-to-image set: fetch, curate, render, split, write."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeflow.errors import BackendMissing, DataError, UsageError
from edgeflow.staging import staged_folder
from edgeflow.training import emoji_curation as curation
from edgeflow.training.data_card import data_card
from edgeflow.training.dataset import SPLITS, write_shards
from edgeflow.training.emoji_sources import SOURCES, IconSet, Source, fetch

SCHEMA = 1
SIZES = (8, 1024)  # pixels, square
RENDER_PROCESSES = 2
#: A picture whose pixels are all but this share nearly white shows nothing (a white square on white).
MIN_INK = 0.01
_NEARLY_WHITE = 225

#: Told of progress: what is being done, how much is done, and of how much (0 where nobody knows).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Drawing:
    """One rendered icon: lossless WebP bytes, the SHA-256 of its pixels, its share of inked pixels."""

    webp: bytes
    pixels: str
    ink: float


@dataclass(frozen=True)
class EmojiSet:
    """What was written: the content of ``dataset.json``."""

    path: Path
    summary: dict[str, Any]


def build_emoji(
    out: Path,
    *,
    size: int = 128,
    sources: Sequence[Source] = SOURCES,
    fetch_source: Callable[[Source], IconSet] = fetch,
    limit: int | None = None,
    force: bool = False,
    processes: int = RENDER_PROCESSES,
    progress: Progress = lambda *_: None,
) -> EmojiSet:
    """Write the emoji dataset to the folder ``out``: shards, ``README.md`` and ``dataset.json``.

    ``size`` is the pictures' side in pixels; ``limit`` keeps the first so many concepts by hash (for a quick
    try). Equal sources give equal bytes. Raises OutputExistsError, DataError, or BackendMissing (resvg,
    webdataset).
    """
    low, high = SIZES
    if not low <= size <= high:
        raise UsageError(f"emoji data: size: expected {low} to {high} pixels, got {size}")
    _require_packages()
    # Staged first: an output that is there or can't be written is said before minutes of work.
    with staged_folder(out, force=force) as folder:
        icon_sets = []
        for number, source in enumerate(sources):
            progress("fetching", number, len(sources))
            icon_sets.append(fetch_source(source))
        entries, dropped = curation.curate(icon_sets)
        if limit is not None:
            entries = _first_concepts(entries, limit)
        drawn = _distinct(entries, render(entries, size, processes, progress), dropped)
        if not drawn:
            raise DataError("emoji data: expected pictures, got none worth drawing from these sources")
        problems = [problem for icon_set in icon_sets for problem in icon_set.problems]
        return EmojiSet(out, _write(folder, drawn, sources, dropped, problems, size))


def _require_packages() -> None:
    for package in ("resvg_py", "webdataset"):
        if importlib.util.find_spec(package) is None:
            raise BackendMissing(package, "train")


def render(
    entries: Sequence[curation.Entry], size: int, processes: int, progress: Progress
) -> Iterator[Drawing | None]:
    """Render on white, in order, at ``size`` × ``size`` pixels; None for what resvg refuses."""
    work = [(entry.icon.svg(size), size) for entry in entries]
    if processes <= 1:
        for number, item in enumerate(work, 1):
            progress("rendering", number, len(work))
            yield _render_one(item)
        return
    # spawn: a forked child of a process that already runs torch's threads may hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, drawing in enumerate(pool.imap(_render_one, work, chunksize=32), 1):
            progress("rendering", number, len(work))
            yield drawing


def _render_one(work: tuple[str, int]) -> Drawing | None:
    import resvg_py

    svg, size = work
    try:
        # No system fonts: the same picture on every machine.
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError:
        return None
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if picture.size != (size, size):
        return None
    pixels = np.asarray(picture)
    buffer = io.BytesIO()
    # Flat artwork: lossless costs a tenth more than quality 90 and keeps the pixels exact.
    picture.save(buffer, "WEBP", lossless=True, quality=75, method=4)
    ink = float((pixels.min(axis=2) < _NEARLY_WHITE).mean())
    return Drawing(buffer.getvalue(), hashlib.sha256(pixels.tobytes()).hexdigest(), ink)


def _first_concepts(entries: Sequence[curation.Entry], limit: int) -> list[curation.Entry]:
    concepts = {entry.concept for entry in entries}
    chosen = set(sorted(concepts, key=lambda c: hashlib.sha256(c.encode()).hexdigest())[:limit])
    return [entry for entry in entries if entry.concept in chosen]


def _distinct(
    entries: Sequence[curation.Entry],
    drawings: Iterator[Drawing | None],
    dropped: dict[str, Counter[str]],
) -> list[tuple[curation.Entry, Drawing]]:
    """What remains without the unrenderable, the blank, and the second of equal pictures."""
    kept: list[tuple[curation.Entry, Drawing]] = []
    seen: set[str] = set()
    for entry, drawing in zip(entries, drawings, strict=True):
        counts = dropped[entry.source.name]
        if drawing is None:
            counts[curation.UNDRAWABLE] += 1
        elif drawing.ink < MIN_INK:
            counts[curation.BLANK] += 1
        elif drawing.pixels in seen:
            counts[curation.SAME_PICTURE] += 1
        else:
            seen.add(drawing.pixels)
            kept.append((entry, drawing))
    return kept


def _write(
    folder: Path,
    drawn: Sequence[tuple[curation.Entry, Drawing]],
    sources: Sequence[Source],
    dropped: dict[str, Counter[str]],
    problems: list[str],
    size: int,
) -> dict[str, Any]:
    """Write shards, data card and ``dataset.json``; returns the latter's content."""
    splits = curation.assign_splits((entry.concept, entry.source.style) for entry, _ in drawn)
    # Stored in the order of a hash, so that a stream of shards is already mixed.
    drawn = sorted(drawn, key=lambda item: hashlib.sha256(item[0].key.encode()).hexdigest())
    kept = [(entry, splits[entry.concept, entry.source.style]) for entry, _ in drawn]
    shards: list[dict[str, Any]] = []
    for split in SPLITS:
        part = (
            (entry.key, drawing.webp, _known(entry))
            for entry, drawing in drawn
            if splits[entry.concept, entry.source.style] == split
        )
        shards += write_shards(folder, split, part, "webp")
    summary = _summary(kept, sources, dropped, problems, shards, size)
    text = json.dumps(summary, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(data_card(summary), encoding="utf-8")
    return summary


def _known(entry: curation.Entry) -> dict[str, str]:
    return {
        "caption": entry.caption,
        "concept": entry.concept,
        "style": entry.source.style,
        "source": entry.source.name,
        "licence": entry.source.licence,
    }


def _summary(
    kept: Sequence[tuple[curation.Entry, str]],
    sources: Sequence[Source],
    dropped: dict[str, Counter[str]],
    problems: list[str],
    shards: list[dict[str, Any]],
    size: int,
) -> dict[str, Any]:
    counts = Counter((entry.source.name, split) for entry, split in kept)
    return {
        "schema": SCHEMA,
        "name": "emoji",
        "size": size,
        "num_images": {split: sum(n for (_, s), n in counts.items() if s == split) for split in SPLITS},
        "num_concepts": len({entry.concept for entry, _ in kept}),
        "bytes": sum(shard["bytes"] for shard in shards),
        "sources": [
            {
                "name": source.name,
                "package": source.package,
                "version": source.version,
                "integrity": source.integrity,
                "style": source.style,
                "licence": source.licence,
                "attribution": source.attribution,
                "homepage": source.homepage,
                "train": counts[source.name, "train"],
                "test": counts[source.name, "test"],
                "dropped": {reason: n for reason, n in sorted(dropped[source.name].items()) if n},
            }
            for source in sources
        ],
        "problems": problems,
        "shards": shards,
    }
