"""The limits in force: those given, else the starting gates, wider where rounding explains more. Torch-free.

A value that lies between two steps of a rounded activation goes to one or the other by the last bit of its
float, and no two implementations agree on that bit: from there on they draw different samples of the same
rounding noise. So where a layer's inputs are rounded, two correct ones agree by no more than rounding itself
costs, which is measured: it is the quantization gap, float ↔ quantized, on the same prompts. If each of the
two is at most that far from the float model's output, they are at most twice as far from one another
(‖a − b‖ ≤ ‖a − f‖ + ‖f − b‖): 6.02 dB below the gap's SQNR or PSNR. The max abs is held to the gap's own:
twice that may pass the range of a picture, and a limit beyond it cannot fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeflow.parity_report import GATE_NAMES, GATES, METRICS, QUANTIZATION, Measurement
from edgeflow.quantization.recipe import rounded_components
from edgeflow.spec import PIPELINE

_TWICE_DB = 20 * math.log10(2)


@dataclass(frozen=True)
class Limits:
    """What the gaps of one model are held to; ``given`` is by name (parity_report.GATE_NAMES).

    ``rounded`` has (component, metric) of what rounded activations reach → the widest limit that rounding
    explains, or None where the quantization gap was not measured: nothing can be said then, or gated.
    """

    given: Mapping[str, float]
    rounded: Mapping[tuple[str, str], float | None] = field(default_factory=dict)

    def of(self, gap: str, component: str, metric: str, precision: str) -> float | None:
        """The limit of one measurement; None where there is none."""
        for name, limit in self.given.items():
            if GATE_NAMES[name] == (gap, metric):
                return limit
        starting = GATES[gap, metric].get(precision)
        if starting is None or (component, metric) not in self.rounded:
            return starting
        explained = self.rounded[component, metric]
        if explained is None:
            return None
        return min(starting, explained) if METRICS[metric][1] else max(starting, explained)


def limits(
    given: Mapping[str, float], recipe: Mapping[str, Any] | None, rows: Iterable[Measurement]
) -> Limits:
    """The limits of a model by its recipe (None: float) and the rows of its quantization gap."""
    reached = rounded_components(recipe)
    worst = {(m.component, m.metric): m.worst for m in rows if m.gap == QUANTIZATION}
    return Limits(
        given,
        {
            (component, metric): _explained(metric, worst.get((component, metric)))
            for component in ((*reached, PIPELINE) if reached else ())
            for metric in METRICS
            if metric != "psnr_db" or component == PIPELINE
        },
    )


def _explained(metric: str, gap: float | None) -> float | None:
    """The limit that a quantization gap explains; None for a gap not measured, or not finite at its worst."""
    more_is_better = METRICS[metric][1]
    if gap is None or math.isnan(gap) or gap == (-math.inf if more_is_better else math.inf):
        return None
    return gap - _TWICE_DB if more_is_better else gap
