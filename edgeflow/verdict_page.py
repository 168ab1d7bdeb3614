"""The verdict as one HTML file: figures, size against quality, pictures, layers, what ran how. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflow.html_page import bars, chip, document, escape, listing, picture, table
from edgeflow.speed import show_ratio
from edgeflow.svg_plot import Axis, Point, scatter
from edgeflow.verdict import BETTER, FIGURES, INSIDE, Layer, VerdictReport, VerdictRow, WorstPicture
from edgeflow.verdict_table import heading, sentences, show_close, signed, summary

_MIB = 2**20
#: How many of a model's worst prompts are shown, and how many layers before the rest is folded away.
NUM_PAIRS, NUM_LAYERS = 8, 16
#: A model whose worst picture is this near to the model's own has its pictures folded away.
FOLDED_FROM_DB = 48.0
#: What a difference of 1 of 255 is multiplied by where the largest one leaves room, at most.
_GAIN = 16


@dataclass(frozen=True)
class Pictures:
    """What was drawn: uint8 (N, 3, S, S) each, picture i of the same prompt and noise everywhere."""

    seeds: Sequence[int]
    real: NDArray[np.uint8]
    model: NDArray[np.uint8]
    drawn: Sequence[NDArray[np.uint8]]  # by row of the report


@dataclass(frozen=True)
class Sensitivity:
    """What each layer's integers cost at the picture, as a recipe's search measured it."""

    source: str
    figure: str  # what the numbers are
    layers: tuple[tuple[str, float], ...] = field(default=())  # layer → how much it costs, more is worse


def verdict_page(report: VerdictReport, pictures: Pictures, sensitivity: Sequence[Sensitivity] = ()) -> str:
    """The whole file."""
    count = len(report.rows)
    title = f"What {count} model{'s' * (count > 1)} lost against {report.model.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{report.data.prompts} prompts, the same noise for every model; '
        f"differences carry 95&nbsp;% intervals, bootstrapped over prompts.</p>",
        listing(sentences(report)),
        *_gates(report),
        "<h2>Figures</h2>",
        _figures(report),
        f'<p class="note">In each cell: the figure, its difference to {escape(report.model.name)} with the '
        "95&nbsp;% interval, and what can be said of it. ↓ less is better, ↑ more is better.</p>",
        *_plots(report),
        *_speed(report),
        *_pairs(report, pictures),
        *_sensitivity(sensitivity),
        *_layers(report),
        *_precision(report),
        "<h2>How it was measured</h2>",
        listing([*summary(report), *report.notes]),
        f'<p class="note">{escape(" · ".join(f"{k} {v}" for k, v in sorted(report.versions.items())))}</p>',
    ]
    return document(title, body)


def _gates(report: VerdictReport) -> Iterator[str]:
    if not report.gates:
        return
    asked = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in report.gates.items())
    state = chip("gates failed", "worse") if report.failures else chip("gates passed", "same")
    yield f"<p>{state} <code>{escape(asked)}</code></p>"
    if report.failures:
        said = f"<summary>{len(report.failures)} failures</summary>{listing(report.failures)}"
        yield f"<details open>{said}</details>"


def _figures(report: VerdictReport) -> str:
    head = ["Model", "MiB", "Worst PSNR ↑", "Distance ↓", *(escape(heading(name)) for name in FIGURES)]
    return table(head, [_row(row) for row in (report.model, *report.rows)])


def _row(row: VerdictRow) -> list[str]:
    cells = [f"{escape(row.name)}<small>{escape(row.runtime)} {escape(row.precision)}</small>"]
    cells.append(f"{row.graph_bytes / _MIB:.2f}")
    cells += [_psnr(row), show_close(row, "distance")]
    for name, figure in FIGURES.items():
        cell, digits = f"{row.figures[name]:.{figure.digits}f}", figure.digits
        change = row.changes.get(name)
        if change is not None:
            between = f"{signed(change.low, digits)} … {signed(change.high, digits)}"
            cell += (
                f"<small>{_times(row, name)}{signed(change.value, digits)}</small><small>{between}</small>"
            )
            cell += chip(change.verdict, {INSIDE: "same", BETTER: "better"}.get(change.verdict, "worse"))
        cells.append(cell)
    return cells


def _psnr(row: VerdictRow) -> str:
    worst, median = (show_close(row, name) for name in ("psnr_worst_db", "psnr_median_db"))
    if worst in ("–", "equal"):
        return worst
    return f"{worst} dB<small>median {median}{'' if median == 'equal' else ' dB'}</small>"


def _times(row: VerdictRow, name: str) -> str:
    """FD's ratio to the model's, which is what gates and goals are given in."""
    ratio = row.closeness.get("fd_ratio")
    return f"× {ratio.value:.3f}, " if name == "fd" and ratio is not None else ""


# --- plots -----------------------------------------------------------------------------------------------


def _plots(report: VerdictReport) -> Iterator[str]:
    everyone = (report.model, *report.rows)
    yield "<h2>Size against quality</h2>"
    yield '<div class="plots">'
    for figure, title in (("fd", "Fréchet distance"), ("kid", "KID")):
        points = [_point(row, report.model, figure) for row in everyone]
        plot = scatter(
            points, Axis("MiB of weights and graphs", zero=True), Axis(f"{title}, less is better"),
            described=f"{title} against size, of {', '.join(row.name for row in everyone)}",
        )  # fmt: skip
        caption = f"Dashed: {report.model.name}. Whiskers: the 95 % interval of the difference to it."
        yield f'<figure class="card">{plot}<figcaption class="note">{escape(caption)}</figcaption></figure>'
    yield "</div>"


def _point(row: VerdictRow, model: VerdictRow, figure: str) -> Point:
    change = row.changes.get(figure)
    own = model.figures[figure]
    return Point(
        label=row.name,
        x=row.graph_bytes / _MIB,
        y=row.figures[figure],
        low=None if change is None else own + change.low,
        high=None if change is None else own + change.high,
        base=change is None,
    )


# --- speed -----------------------------------------------------------------------------------------------


def _speed(report: VerdictReport) -> Iterator[str]:
    measured = [row for row in (report.model, *report.rows) if row.speed is not None]
    if not measured:
        return
    yield "<h2>Speed on the machine that measured</h2>"
    head = [
        "Model",
        "First picture",
        "Load",
        "Picture",
        "p90",
        "Range",
        "Peak RSS",
        "On disk",
        "× fp32",
        "× fp16",
    ]
    rows = []
    for row in measured:
        speed: Mapping[str, Any] = row.speed or {}
        warm = speed["warm_ms"]
        rows.append(
            [
                f"{escape(row.name)}<small>{escape(row.runtime)} {escape(row.precision)}</small>",
                f"{speed['first_picture_ms']['median']:.0f} ms",
                f"{speed['load_ms']['median']:.0f} ms",
                f"{warm['median']:.1f} ms",
                f"{warm['p90']:.1f} ms",
                f"{warm['low']:.1f} … {warm['high']:.1f}",
                f"{speed['peak_rss_mib']:.0f} MiB",
                f"{row.bytes / _MIB:.1f} MiB",
                *(_ratio(speed, precision) for precision in ("fp32", "fp16")),
            ]
        )
    yield table(head, rows)
    threads = sorted({row.speed["threads"] for row in measured if row.speed})
    launches = measured[0].speed["launches"] if measured[0].speed else 0
    yield (
        f'<p class="note">{" or ".join(map(str, threads))} threads; {launches} processes a model, drawing in '
        "turns; × is how many times as long a picture takes as with the float bundle of the same runtime, "
        "with its 95&nbsp;% interval over processes. First picture: from the start of the process.</p>"
    )


def _ratio(speed: Mapping[str, Any], precision: str) -> str:
    shown = show_ratio(speed, precision)
    for word, kind in (("slower", "worse"), ("faster", "better"), ("inside the noise", "same")):
        if shown.endswith(word):
            value, _, interval = shown.removesuffix(word).strip().partition(" ")
            return f"{value}<small>{escape(interval)}</small>{chip(word, kind)}"
    return shown


# --- pictures --------------------------------------------------------------------------------------------


def _pairs(report: VerdictReport, pictures: Pictures) -> Iterator[str]:
    yield "<h2>Worst pictures first</h2>"
    yield (
        f'<p class="note">The prompts whose pictures are farthest from {escape(report.model.name)}\'s. '
        "Differences are amplified by the factor beside them; mid-grey is no difference.</p>"
    )
    for row, drawn in zip(report.rows, pictures.drawn, strict=True):
        near = row.closeness["psnr_worst_db"].value >= FOLDED_FROM_DB
        yield f"<h3>{escape(row.name)}</h3>"
        if near:
            yield "<details><summary>Every picture is so near that no difference can be seen</summary>"
        yield '<div class="pairs">'
        yield from (
            _pair(worst, report.model.name, row.name, drawn, pictures) for worst in row.worst[:NUM_PAIRS]
        )
        yield "</div></details>" if near else "</div>"


def _pair(worst: WorstPicture, model: str, name: str, drawn: NDArray[np.uint8], pictures: Pictures) -> str:
    """A prompt: the model's picture, the row's, their difference, and a real one."""
    i = list(pictures.seeds).index(worst.seed)
    quality = "equal" if math.isinf(worst.psnr_db) else f"{worst.psnr_db:.1f} dB"
    shown, gain = amplified(pictures.model[i], drawn[i])
    cells = [
        (pictures.model[i], model),
        (drawn[i], name),
        (shown, f"difference × {gain}"),
        (pictures.real[i], "a real picture"),
    ]
    figures = "".join(_captioned(p, f"{worst.prompt}: {what}", what) for p, what in cells)
    said = f"<b>{escape(worst.prompt)}</b> <span class='quiet'>seed {worst.seed}, {quality}</span>"
    return f'<div class="card pair"><div class="what">{said}</div>{figures}</div>'


def _captioned(pixels: NDArray[np.uint8], alt: str, caption: str) -> str:
    return f"<figure>{picture(pixels, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


def amplified(reference: NDArray[np.uint8], actual: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """128 + gain · (actual − reference), and the gain: a power of two that keeps most pixels in range."""
    difference = actual.astype(np.int32) - reference.astype(np.int32)
    largest = float(np.quantile(np.abs(difference), 0.995))
    gain = 1
    while gain < _GAIN and 2 * gain * max(largest, 1.0) <= 127:
        gain *= 2
    return np.clip(128 + gain * difference, 0, 255).astype(np.uint8), gain


# --- layers and precision --------------------------------------------------------------------------------


def _sensitivity(found: Sequence[Sensitivity]) -> Iterator[str]:
    if found:
        yield "<h2>What each layer costs at the picture</h2>"
    for one in found:
        yield f"<h3>{escape(one.source)}</h3>"
        ranked = sorted(one.layers, key=lambda layer: -layer[1])
        yield f'<p class="note">{escape(one.figure)}, the costliest first.</p>'
        yield _folded([(name, value, f"{value:.4g}") for name, value in ranked])


def _layers(report: VerdictReport) -> Iterator[str]:
    known: dict[tuple[Layer, ...], list[str]] = {}
    for row in report.rows:
        if row.layers:  # a checkpoint and its bundles have the same
            known.setdefault(row.layers, []).append(row.name)
    if known:
        yield "<h2>Weights, layer by layer</h2>"
    for layers, names in known.items():
        bits: dict[int, list[Layer]] = {}
        for layer in layers:
            bits.setdefault(layer.bits, []).append(layer)
        said = ", ".join(f"{len(group)} layers in {n} bits" for n, group in sorted(bits.items()))
        yield f"<h3>{escape(', '.join(names))}</h3>"
        measured = sorted((x for x in layers if x.sqnr_db is not None), key=lambda x: x.sqnr_db or 0.0)
        if not measured:
            yield f'<p class="note">{said}; the float weights are not at hand to measure against.</p>'
            continue
        yield f'<p class="note">{said}. Signal to quantization noise of each weight, the noisiest first.</p>'
        yield _folded(
            [
                (f"{x.component} {x.layer}", float(x.sqnr_db or 0.0), f"{x.bits} bit, {x.sqnr_db:.1f} dB")
                for x in measured
            ]
        )


def _folded(rows: Sequence[tuple[str, float, str]]) -> str:
    """Bars of the first layers, the rest behind a fold."""
    most = max(value for _, value, _ in rows)
    first = f'<div class="card">{bars(rows[:NUM_LAYERS], most=most)}</div>'
    if len(rows) <= NUM_LAYERS:
        return first
    rest = f'<div class="card">{bars(rows[NUM_LAYERS:], most=most)}</div>'
    return f"{first}<details><summary>{len(rows) - NUM_LAYERS} more</summary>{rest}</details>"


def _precision(report: VerdictReport) -> Iterator[str]:
    yield "<h2>What ran at which precision</h2>"
    rows = []
    for row in (report.model, *report.rows):
        graphs = "<br>".join(
            f"{escape(g['name'])}: {escape(_dtypes(g['inputs']))} → {escape(_dtypes(g['outputs']))}"
            for g in row.graphs
        )
        recipe = row.recipe or {}
        rules = "<br>".join(
            escape(f"{r['component']} {r['pattern']}: {r['scheme']}") for r in recipe.get("rules", [])[:12]
        )
        more = len(recipe.get("rules", [])) - 12
        rows.append(
            [
                f"{escape(row.name)}<small>{escape(row.checkpoint[:12])}</small>",
                f"{escape(row.backend)}<small>{escape(row.kind)}</small>",
                escape(row.precision),
                graphs or "the checkpoint's own modules, float32 arithmetic",
                (rules or "–") + (f"<br>and {more} rules more" if more > 0 else ""),
            ]
        )
    yield table(["Model", "Runs in", "Precision", "Graphs", "Recipe"], rows, texts=(1, 2, 3, 4))
    if any(row.runtime == "openvino" for row in report.rows):
        yield '<p class="note">OpenVINO runs in float32 arithmetic, whatever its weights are stored in.</p>'


def _dtypes(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in tensors.items())
