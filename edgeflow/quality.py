"""What a quality measurement says, and its two renderings: JSON and a terminal table. Torch-free.

The JSON (``QualityReport.as_dict``), schema 1, holds nothing of the machine or the moment::

    {"schema": 1, "kind": "quality",
     "data": {"name", "split", "prompts", "train_pictures", "picture_size"},
     "settings": {"seed", "per_prompt", "kid_subsets", "kid_subset_size", "neighbours", "candidates",
                  "floor_draws", "agreement_steps", "features": [name…]},
     "versions": {package: version}, "notes": [sentence…],
     "floor": {figure: value…},
     "rows": [{"model", "checkpoint", "kind", "steps", "guidance", "num_images", "teacher",
               "figures": {figure: value…}, "worst": [{"prompt", "seed", "agreement"}…]}…]}

A figure that was not measured is absent. FIGURES says what each one is; those measured in a network other
than the first carry its name, as in ``frechet@inception-v3``. ``floor`` holds the same figures with real
pictures in the place of the drawn ones, at the same counts: what a perfect model would score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeflow import terminal
from edgeflow.terminal import Part

SCHEMA = 1


@dataclass(frozen=True)
class Figure:
    """How a figure is shown: its column, how many digits, and whether more is better (None: neither)."""

    column: str
    digits: int
    more_is_better: bool | None


#: Every figure, in the table's order. ``kid`` and ``frechet`` compare with the real pictures of the same
#: captions, ``*_train`` with the training pictures.
FIGURES: dict[str, Figure] = {
    "kid": Figure("KID", 3, False),
    "kid_std": Figure("±", 3, None),
    "frechet": Figure("FD", 2, False),
    "kid_train": Figure("KID train", 3, False),
    "kid_train_std": Figure("±", 3, None),
    "frechet_train": Figure("FD train", 2, False),
    "precision": Figure("Precision", 3, True),
    "recall": Figure("Recall", 3, True),
    "r_at_1": Figure("R@1", 3, True),
    "clip_score": Figure("CLIP", 2, True),
    "nearest_train": Figure("Nearest", 4, None),
    "copies": Figure("Copies", 3, False),
    "teacher_psnr_db": Figure("T PSNR dB", 2, True),
    "teacher_distance": Figure("T distance", 4, False),
}


@dataclass(frozen=True)
class Worst:
    """A prompt whose picture agrees least with it."""

    prompt: str
    seed: int
    agreement: float  # cosine of picture and caption in the joint space


@dataclass(frozen=True)
class Row:
    """One model at one number of steps."""

    model: str
    checkpoint: str  # hash
    kind: str  # a checkpoint's kind, or bundle
    steps: int
    guidance: float
    num_images: int
    figures: Mapping[str, float]
    teacher: str | None = None
    worst: tuple[Worst, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.model}, {self.steps} step{'s' * (self.steps > 1)}"


@dataclass(frozen=True)
class Data:
    """The real pictures: how many, of which split the prompts are."""

    name: str
    split: str
    prompts: int
    train_pictures: int
    picture_size: int


@dataclass(frozen=True)
class Settings:
    """What a figure depends on besides the pictures."""

    seed: int = 0
    per_prompt: int = 1  # pictures a caption
    kid_subsets: int = 100
    kid_subset_size: int = 100
    neighbours: int = 3
    candidates: int = 100
    floor_draws: int = 10
    agreement_steps: int = 300
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class QualityReport:
    """All that was measured of some models against one set of real pictures."""

    data: Data
    settings: Settings
    floor: Mapping[str, float]
    rows: tuple[Row, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values (see the module's docstring)."""
        return {
            "schema": SCHEMA,
            "kind": "quality",
            "data": asdict(self.data),
            "settings": {**asdict(self.settings), "features": list(self.settings.features)},
            "versions": dict(sorted(self.versions.items())),
            "notes": list(self.notes),
            "floor": _figures(self.floor),
            "rows": [
                {**asdict(r), "figures": _figures(r.figures), "worst": [asdict(w) for w in r.worst]}
                for r in self.rows
            ],
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def _figures(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no infinity: equal pictures' PSNR is "inf"."""
    return {k: v if math.isfinite(v) else str(v) for k, v in values.items()}


def print_report(report: QualityReport, *, as_json: bool = False) -> None:
    """The report on stdout: JSON, or the tables and notes."""
    terminal.print_report(report, _parts(report), as_json=as_json)


def render(report: QualityReport) -> str:
    """The tables and notes as plain text, no line wrapped."""
    return terminal.plain(_parts(report))


def _parts(report: QualityReport) -> list[Part]:
    return [*(table(report, net) for net in report.settings.features), *summary(report), *report.notes]


def table(report: QualityReport, net: str) -> Part:
    """The figures in one network as a ``rich`` table: the floor first, then a line a model."""
    suffix = "" if net == report.settings.features[0] else f"@{net}"
    rows = [*report.rows]
    known = set(report.floor) | {k for r in rows for k in r.figures}
    names = [n for n in FIGURES if n + suffix in known and not n.endswith("_std")]
    grid = terminal.table(["Model"], [_heading(FIGURES[n]) for n in names], title=f"features: {net}")
    grid.add_row("real pictures (floor)", *(_cell(report.floor, n, suffix) for n in names), end_section=True)
    for row in rows:
        grid.add_row(row.label, *(_cell(row.figures, n, suffix) for n in names))
    return grid


def _heading(figure: Figure) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[figure.more_is_better]
    return figure.column + arrow


def _cell(values: Mapping[str, float], name: str, suffix: str) -> str:
    value, digits = values.get(name + suffix), FIGURES[name].digits
    if value is None:
        return "–"
    if math.isinf(value):
        return "equal"
    std = values.get(f"{name}_std{suffix}")
    return f"{value:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def summary(report: QualityReport) -> list[str]:
    """What the columns are, with every count that they depend on."""
    d, s = report.data, report.settings
    num_images = max((r.num_images for r in report.rows), default=0)
    n = d.prompts
    k, drawn = s.per_prompt, n * s.per_prompt
    train_floor = f"floor: the {n} real pictures" if k == 1 else f"floor: {drawn} of them against the others"
    return [
        f"{num_images} pictures a model, {'one' if k == 1 else k} for each of {n} captions of split "
        f"{d.split!r} of {d.name}; picture i from seed {s.seed} + i",
        f"KID, FD, precision, recall: against these captions' {n} real pictures; floor: {drawn} random "
        f"training pictures in the place of the drawn ones, mean of {s.floor_draws} draws",
        f"KID train, FD train: against {d.train_pictures} training pictures; {train_floor}",
        f"KID is unbiased, ± is the deviation over {s.kid_subsets} subsets of {s.kid_subset_size}; "
        "FD is biased by the count: compare at equal counts, with the floor",
        f"precision, recall: {s.neighbours} neighbours; R@1: among {min(s.candidates, n)} captions, "
        "floor: the captions' own real pictures",
        "Nearest: median cosine distance to the nearest training picture; Copies: the share nearer to one "
        "than 99 % of these captions' real pictures are",
    ]
