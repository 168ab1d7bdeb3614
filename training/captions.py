"""The captions of a data set as a text file, one a line: what a teacher may be asked to draw.

Where a set knows each picture's concept and style, ``composed`` captions name every combination of a known
concept and a known style that has no picture: the teacher draws them from what it learnt of either. The
combinations of the split ``test`` are held out, in whatever words: a model judged by them has met none.

``recombined`` captions go on from there: the beginning of one concept and the end of another, "cat with white
cane". A set of pictures gives few captions, and a student that has met only those learns each by heart, while
its teacher's picture of any others changes with the noise.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgeflow.errors import DataError, EdgeflowError, OutputExistsError
from edgeflow.training.dataset import Sample, open_dataset

_MOST_WORDS = 6  # of a recombined concept
_CONCEPT, _STYLE = "\x00concept\x00", "\x00style\x00"


@dataclass(frozen=True)
class Captions:
    """``train``: the distinct captions of the training pictures; ``composed`` and ``recombined``: those
    without a picture; ``held_out``: how many distinct captions of the split ``test`` were kept out."""

    train: list[str]
    composed: list[str]
    recombined: list[str]
    held_out: int

    def mixed(self, composed_times: int = 1) -> list[str]:
        """All of them, a composed one so many times, in an order in which the first N are a fair sample."""
        lines = self.train + self.composed * composed_times + self.recombined
        keys = [hashlib.sha256(f"{i} {line}".encode()).digest() for i, line in enumerate(lines)]
        return [line for _, line in sorted(zip(keys, lines, strict=True))]


def collect_captions(data: Path, *, composed: bool = False, recombined: int = 0, seed: int = 0) -> Captions:
    """Captions of the data set in the folder ``data``, with ``recombined`` of that many (fewer where there
    are no more), chosen by ``seed``.

    Raises DataError for a folder that is no data set, and with ``composed`` or ``recombined`` for one whose
    samples do not say concept and style or whose captions are not built from them in one way.
    """
    opened = open_dataset(data)
    train = list(opened.iterate("train", lambda problem: None))
    test = list(opened.iterate("test", lambda problem: None)) if "test" in opened.splits else []
    held_out = {_line(sample.caption) for sample in test}
    seen = {_line(sample.caption) for sample in train} - held_out
    if not seen:
        raise DataError(f"captions: {data}: expected captions in split 'train', found none")
    template = _template([*train, *test], data) if composed or recombined else ""
    known = seen | held_out
    made = _compose(train, test, template) - known if composed else set()
    mixed = _recombine(train, test, template, recombined, random.Random(seed)) - known - made
    return Captions(sorted(seen), sorted(made), sorted(mixed), len(held_out))


def write_caption_lines(path: Path, captions: Iterable[str], *, force: bool) -> None:
    """Write a caption a line, UTF-8. Raises OutputExistsError, or EdgeflowError for a place that cannot be
    written."""
    if path.exists() and not (force and path.is_file()):
        raise OutputExistsError(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise EdgeflowError(f"output: {path}: expected a writable file, got: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _compose(train: list[Sample], test: list[Sample], template: str) -> set[str]:
    pictured = {(s.concept, s.style) for s in (*train, *test)}
    concepts, styles = {s.concept for s in train}, {s.style for s in train}
    wanted = {(c, s) for c in concepts for s in styles} - pictured
    return {_fill(template, concept, style) for concept, style in wanted}


def _recombine(
    train: list[Sample], test: list[Sample], template: str, count: int, chance: random.Random
) -> set[str]:
    """``count`` captions of new concepts in known styles; fewer where a thousand tries find none."""
    known = {_line(s.concept) for s in (*train, *test)}
    words = sorted({tuple(s.concept.split()) for s in train})
    heads = [w[:n] for w in words for n in range(1, len(w) + 1)]
    tails = [w[n:] for w in words for n in range(1, len(w))]
    styles, made, failed = sorted({s.style for s in train}), set[str](), 0
    while len(made) < count and failed < 1000 and tails:
        concept = (*chance.choice(heads), *chance.choice(tails))
        caption = _fill(template, " ".join(concept), chance.choice(styles))
        new = len(set(concept)) == len(concept) <= _MOST_WORDS and " ".join(concept) not in known
        failed = 0 if new and caption not in made else failed + 1
        if new:
            made.add(caption)
    return made


def _template(samples: list[Sample], data: Path) -> str:
    """The one form that gives every caption from its concept and style."""
    for sample in samples:
        if not (sample.concept and sample.style):
            raise DataError(
                f"captions: {data}: expected concept and style in every sample's JSON, "
                f"found none for {sample.key!r}"
            )
    counts = Counter(s.caption.replace(s.concept, _CONCEPT, 1).replace(s.style, _STYLE, 1) for s in samples)
    template = counts.most_common(1)[0][0]
    if _CONCEPT not in template or _STYLE not in template:
        first = samples[0].caption
        raise DataError(f"captions: {data}: expected captions made of concept and style, got {first!r}")
    for sample in samples:
        if _fill(template, sample.concept, sample.style) != _line(sample.caption):
            form = template.replace(_CONCEPT, "CONCEPT").replace(_STYLE, "STYLE")
            raise DataError(
                f"captions: {data}: expected every caption to be {form!r}, "
                f"got {sample.caption!r} for {sample.key!r}"
            )
    return template


def _fill(template: str, concept: str, style: str) -> str:
    return _line(template.replace(_CONCEPT, concept).replace(_STYLE, style))


def _line(caption: str) -> str:
    """On one line, whatever white space it held."""
    return " ".join(caption.split())
