"""The verdict: what exported or quantized models lost against the model they were made from. Torch-free.

The JSON (``VerdictReport.as_dict``), schema 1::

    {"schema": 1, "kind": "verdict", "passed": bool, "failures": [sentence…], "notes": [sentence…],
     "data": {"name", "split", "prompts", "picture_size"},
     "settings": {"seed", "resamples", "candidates", "features"}, "versions": {package: version},
     "gates": {name: limit}, "model": ROW, "rows": [ROW…]}

    ROW = {"name", "checkpoint", "kind", "runtime", "backend", "precision", "recipe", "bytes", "graph_bytes",
           "figures": {figure: value}, "changes": {figure: {"value", "low", "high", "verdict"}},
           "closeness": {figure: {"value", "low", "high"}},
           "worst": [{"prompt", "seed", "psnr_db", "distance"}…],
           "graphs": [{"name", "file", "inputs", "outputs"}…],
           "layers": [{"component", "layer", "bits", "shape", "sqnr_db"}…], "speed": SPEED or null}

``model`` is what the rows are held against; ``changes`` are differences to it, each with its 95 % interval
and ``inside the noise``, ``better`` or ``worse``. ``closeness`` compares a row's pictures with the model's
own of the same prompt and noise. +inf (equal pictures) is the string "inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeflow.quality import Data, Figure

SCHEMA = 1
INSIDE, BETTER, WORSE = "inside the noise", "better", "worse"

#: Figures that hold pictures against real ones; a row's is compared with the model's.
FIGURES: dict[str, Figure] = {
    "kid": Figure("KID", 4, False),
    "fd": Figure("FD", 2, False),
    "r_at_1": Figure("R@1", 3, True),
    "real_distance": Figure("Real distance", 4, False),
}
#: Figures that hold a row's pictures against the model's.
CLOSENESS: dict[str, Figure] = {
    "psnr_worst_db": Figure("PSNR worst", 1, True),
    "psnr_median_db": Figure("median", 1, True),
    "distance": Figure("Distance", 4, False),
    "fd_ratio": Figure("FD ratio", 3, False),
}


@dataclass(frozen=True)
class Change:
    """How far a figure is from the model's own, and what can be said of it."""

    value: float
    low: float
    high: float
    verdict: str

    @classmethod
    def of(cls, value: float, low: float, high: float, *, more_is_better: bool) -> Change:
        """The verdict of an interval: outside zero on one side or the other, or not."""
        beyond = BETTER if (value > 0) == more_is_better else WORSE
        return cls(value, low, high, INSIDE if low <= 0 <= high else beyond)


@dataclass(frozen=True)
class Close:
    """A figure of closeness with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class WorstPicture:
    """One prompt's picture, against the model's own."""

    prompt: str
    seed: int
    psnr_db: float
    distance: float


@dataclass(frozen=True)
class Layer:
    """One quantized layer; ``sqnr_db`` is of its weight, where the float one is at hand."""

    component: str
    layer: str
    bits: int
    shape: tuple[int, ...]
    sqnr_db: float | None


@dataclass(frozen=True)
class VerdictRow:
    """One model: what it is, how good its pictures are, and how near the model's own."""

    name: str
    checkpoint: str  # hash
    kind: str  # bundle, or a checkpoint's kind
    runtime: str
    backend: str
    precision: str
    recipe: Mapping[str, Any] | None
    bytes: int
    graph_bytes: int
    figures: Mapping[str, float]
    changes: Mapping[str, Change] = field(default_factory=dict)
    closeness: Mapping[str, Close] = field(default_factory=dict)
    worst: tuple[WorstPicture, ...] = ()
    graphs: tuple[Mapping[str, Any], ...] = ()
    layers: tuple[Layer, ...] = ()
    speed: Mapping[str, Any] | None = None

    @property
    def sentence(self) -> str:
        """What is said of the row in one line."""
        by_verdict: dict[str, list[str]] = {}
        for name, change in self.changes.items():
            by_verdict.setdefault(change.verdict, []).append(FIGURES[name].column)
        parts = [f"{_join(by_verdict[v])} {v}" for v in (WORSE, BETTER, INSIDE) if v in by_verdict]
        worst = self.closeness.get("psnr_worst_db")
        if worst is not None:
            parts.append(
                "every picture equal" if math.isinf(worst.value) else f"worst picture {worst.value:.1f} dB"
            )
        return f"{self.name}: {'; '.join(parts)}"


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


@dataclass(frozen=True)
class VerdictSettings:
    """What a figure depends on besides the pictures."""

    seed: int = 0
    resamples: int = 1000
    frechet_resamples: int = 300
    candidates: int = 100
    agreement_steps: int = 300
    features: str = ""


@dataclass(frozen=True)
class VerdictReport:
    """All rows against one model."""

    data: Data
    settings: VerdictSettings
    model: VerdictRow
    rows: tuple[VerdictRow, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gates: Mapping[str, float | str] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values (see the module's docstring)."""
        data = {k: v for k, v in asdict(self.data).items() if k != "train_pictures"}
        return _plain(
            {
                "schema": SCHEMA,
                "kind": "verdict",
                "passed": self.passed,
                "failures": list(self.failures),
                "notes": list(self.notes),
                "data": data,
                "settings": asdict(self.settings),
                "versions": dict(sorted(self.versions.items())),
                "gates": dict(self.gates),
                "model": asdict(self.model),
                "rows": [asdict(row) for row in self.rows],
            }
        )

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no infinity: equal pictures' PSNR is "inf"."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
