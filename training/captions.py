"""The captions of a data set as a text file, one a line: what a teacher may be asked to draw.

Where a set knows each picture's concept and style, ``composed`` captions name every combination of a known
concept and a known style that has no picture: the teacher draws them from what it learnt of either. The
combinations of the split ``test`` are held out, in whatever words: a model judged by them has met none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgeflow.errors import DataError, EdgeflowError, OutputExistsError
from edgeflow.training.dataset import Sample, open_dataset

_CONCEPT, _STYLE = "\x00concept\x00", "\x00style\x00"


@dataclass(frozen=True)
class Captions:
    """``train``: the distinct captions of the training pictures; ``composed``: those without a picture;
    ``held_out``: how many distinct captions of the split ``test`` were kept out."""

    train: list[str]
    composed: list[str]
    held_out: int

    @property
    def mixed(self) -> list[str]:
        """All of them in the order of a hash, so that the first N of the file are a fair sample."""
        return sorted(self.train + self.composed, key=lambda c: hashlib.sha256(c.encode()).hexdigest())


def collect_captions(data: Path, *, composed: bool = False) -> Captions:
    """Captions of the data set in the folder ``data``.

    Raises DataError for a folder that is no data set, and with ``composed`` for one whose samples do not say
    concept and style or whose captions are not built from them in one way.
    """
    opened = open_dataset(data)
    train = list(opened.iterate("train", lambda problem: None))
    test = list(opened.iterate("test", lambda problem: None)) if "test" in opened.splits else []
    held_out = {_line(sample.caption) for sample in test}
    seen = {_line(sample.caption) for sample in train} - held_out
    if not seen:
        raise DataError(f"captions: {data}: expected captions in split 'train', found none")
    made = _compose(train, test, data) - seen - held_out if composed else set()
    return Captions(sorted(seen), sorted(made), len(held_out))


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


def _compose(train: list[Sample], test: list[Sample], data: Path) -> set[str]:
    template = _template([*train, *test], data)
    pictured = {(s.concept, s.style) for s in (*train, *test)}
    concepts, styles = {s.concept for s in train}, {s.style for s in train}
    wanted = {(c, s) for c in concepts for s in styles} - pictured
    return {_fill(template, concept, style) for concept, style in wanted}


def _template(samples: list[Sample], data: Path) -> str:
    """The one form that gives every caption from its concept and style."""
    for sample in samples:
        if not (sample.concept and sample.style):
            raise DataError(
                f"captions: {data}: --composed: expected concept and style in every sample's JSON, "
                f"found none for {sample.key!r}"
            )
    counts = Counter(s.caption.replace(s.concept, _CONCEPT, 1).replace(s.style, _STYLE, 1) for s in samples)
    template = counts.most_common(1)[0][0]
    if _CONCEPT not in template or _STYLE not in template:
        first = samples[0].caption
        raise DataError(
            f"captions: {data}: --composed: expected captions made of concept and style, got {first!r}"
        )
    for sample in samples:
        if _fill(template, sample.concept, sample.style) != _line(sample.caption):
            form = template.replace(_CONCEPT, "CONCEPT").replace(_STYLE, "STYLE")
            raise DataError(
                f"captions: {data}: --composed: expected every caption to be {form!r}, "
                f"got {sample.caption!r} for {sample.key!r}"
            )
    return template


def _fill(template: str, concept: str, style: str) -> str:
    return _line(template.replace(_CONCEPT, concept).replace(_STYLE, style))


def _line(caption: str) -> str:
    """On one line, whatever white space it held."""
    return " ".join(caption.split())
