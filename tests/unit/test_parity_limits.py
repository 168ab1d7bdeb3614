"""Limits: those asked for, else the starting gates, wider only where rounded activations explain it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edgeflow.parity_limits import limits
from edgeflow.parity_report import END_TO_END, LOWERING, QUANTIZATION, REWRITE, UNGATED, Measurement

ROUNDED = {"rules": [{"component": "unet", "pattern": "*", "scheme": "w8a8"}]}


def row(component: str, metric: str, *values: float) -> Measurement:
    facts: dict[str, Any] = {"model": "m", "checkpoint": "c", "bundle": None, "runtime": "torch"}
    return Measurement(
        QUANTIZATION, **facts, precision="fp32", component=component, against="floats", metric=metric,
        gate=None, prompts=tuple(map(str, values)), values=values, status=UNGATED,
    )  # fmt: skip


ROWS = [
    row("text_encoder", "sqnr_db", 40.0),
    row("unet", "sqnr_db", 30.0, 26.0),
    row("unet", "max_abs", 0.01, 0.02),
    row("pipeline", "sqnr_db", 90.0),
    row("pipeline", "psnr_db", 33.0),
    row("pipeline", "max_abs", 1e-5),
]


def test_the_worst_prompts_gap_doubled_is_the_limit_of_what_is_rounded() -> None:
    found = limits({}, ROUNDED, ROWS)
    twice = 20 * math.log10(2)
    assert found.of(LOWERING, "unet", "sqnr_db", "fp16") == pytest.approx(26 - twice)
    assert found.of(REWRITE, "unet", "max_abs", "fp32") == pytest.approx(0.02)  # not doubled
    assert found.of(END_TO_END, "pipeline", "psnr_db", "fp32") == pytest.approx(33 - twice)


def test_a_limit_is_never_narrower_than_the_starting_gate() -> None:
    found = limits({}, ROUNDED, ROWS)
    assert found.of(LOWERING, "pipeline", "sqnr_db", "fp32") == 60  # the gap is 90 dB
    assert found.of(REWRITE, "pipeline", "max_abs", "fp32") == 1e-4


def test_what_is_not_rounded_keeps_the_starting_gates() -> None:
    for found in (limits({}, ROUNDED, ROWS), limits({}, None, [])):
        assert found.of(REWRITE, "text_encoder", "max_abs", "fp32") == 1e-4
        assert found.of(LOWERING, "decoder", "sqnr_db", "fp16") == 40
    weights = {"rules": [{"component": "unet", "pattern": "*", "scheme": "w8"}]}
    assert limits({}, weights, ROWS).of(LOWERING, "unet", "sqnr_db", "fp16") == 40


@pytest.mark.parametrize(
    "rows", [[], [row("unet", "sqnr_db", math.nan)], [row("unet", "sqnr_db", -math.inf)]]
)
def test_a_gap_that_was_not_measured_gates_nothing(rows: list[Measurement]) -> None:
    assert limits({}, ROUNDED, rows).of(LOWERING, "unet", "sqnr_db", "fp32") is None


def test_equal_pictures_widen_nothing_and_what_is_asked_for_holds() -> None:
    equal = [row("unet", "sqnr_db", math.inf), row("unet", "max_abs", 0.0)]
    assert limits({}, ROUNDED, equal).of(REWRITE, "unet", "sqnr_db", "fp32") == 80
    assert limits({}, ROUNDED, equal).of(REWRITE, "unet", "max_abs", "fp32") == 1e-4
    assert limits({"lowering": 5.0}, ROUNDED, ROWS).of(LOWERING, "unet", "sqnr_db", "fp32") == 5
