"""The pictures of a quality report: side by side on the same noise, the worst prompts, the NFE curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from edgeflow.pictures import Pixels, contact_sheet, save_png
from edgeflow.quality import QualityReport, Row
from edgeflow.training.evaluate import Measured

_NUM_ROWS = 16
_NUM_WORST = 8


def write_outputs(folder: Path, measured: Measured) -> None:
    """quality.json, sheet.png, worst.png and, where a model was drawn at several steps, nfe.png and
    nfe-curve.png, into an existing folder."""
    (folder / "quality.json").write_text(measured.report.to_json(), encoding="utf-8")
    _sheet(folder / "sheet.png", measured)
    _worst(folder / "worst.png", measured)
    curves = curves_of(measured.report)
    if curves:
        _nfe_sheet(folder / "nfe.png", measured, curves)
        save_png(folder / "nfe-curve.png", draw_curves(curves), {})


def curves_of(report: QualityReport) -> dict[str, dict[int, Row]]:
    """Rectified flows drawn at three numbers of steps or more: name → steps → row."""
    found: dict[str, dict[int, Row]] = {}
    for row in report.rows:
        if row.kind == "rectified-flow":
            found.setdefault(row.model, {})[row.steps] = row
    return {name: dict(sorted(rows.items())) for name, rows in found.items() if len(rows) >= 3}


def _sheet(path: Path, measured: Measured) -> None:
    """A prompt a row: the real picture, the teacher's, each model's, all drawn from the same noise."""
    count = len(measured.prompts)
    columns = [("real", measured.real)]
    if measured.teacher is not None:
        columns.append((f"teacher: {measured.report.rows[0].teacher}", measured.teacher))
    columns += [(row.label, p) for row, p in zip(measured.report.rows, measured.drawn, strict=True)]
    rows = min(_NUM_ROWS, count)
    index = [(2 * i + 1) * count // (2 * rows) for i in range(rows)]
    pictures = [_pixels(p[i]) for i in index for _, p in columns]
    labels = [
        f"{measured.prompts[i]}, seed {measured.seeds[i]}" if n == 0 else label
        for i in index
        for n, (label, _) in enumerate(columns)
    ]
    save_png(path, contact_sheet(pictures, labels, len(columns)), {})


def _worst(path: Path, measured: Measured) -> None:
    """A model a row: the prompts that its pictures agree with least, the worst first."""
    at = {seed: i for i, seed in enumerate(measured.seeds)}
    pictures: list[Pixels] = []
    labels: list[str] = []
    for row, drawn in zip(measured.report.rows, measured.drawn, strict=True):
        for worst in row.worst[:_NUM_WORST]:
            pictures.append(_pixels(drawn[at[worst.seed]]))
            labels.append(f"{row.label}: {worst.prompt} ({worst.agreement:.2f})")
    save_png(path, contact_sheet(pictures, labels, min(_NUM_WORST, len(measured.prompts))), {})


def _nfe_sheet(path: Path, measured: Measured, curves: Mapping[str, Mapping[int, Row]]) -> None:
    """A prompt a row, its noise at rising numbers of Euler steps, for the first curve."""
    rows = list(next(iter(curves.values())).values())
    drawn = [measured.drawn[measured.report.rows.index(row)] for row in rows]
    count = len(measured.prompts)
    index = [(2 * i + 1) * count // 16 for i in range(min(8, count))]
    pictures = [_pixels(p[i]) for i in index for p in drawn]
    labels = [
        f"{measured.prompts[i]} · {row.label.rpartition(', ')[2]}, KID {row.figures['kid']:.3f}"
        for i in index
        for row in rows
    ]
    save_png(path, contact_sheet(pictures, labels, len(rows)), {})


def draw_curves(curves: Mapping[str, Mapping[int, Row]], figure: str = "kid") -> Pixels:
    """KID over the number of Euler steps, one line a model, as pixels (H, W, 3).

    Steps are spaced by their logarithm; each point carries its value, the axis begins at 0.
    """
    width, height, margin = 640, 400, 60
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    values = [row.figures[figure] for rows in curves.values() for row in rows.values()]
    steps = sorted({n for rows in curves.values() for n in rows})
    top = max([*values, 1e-9]) * 1.1

    def place(n: int, value: float) -> tuple[float, float]:
        x = margin + np.log(n / steps[0]) / np.log(steps[-1] / steps[0]) * (width - 2 * margin)
        return float(x), height - margin - max(value, 0.0) / top * (height - 2 * margin)

    draw.line([place(steps[0], 0), place(steps[-1], 0)], fill=(120, 120, 120))
    draw.text((width / 2 - 40, height - 28), "Euler steps (NFE)", fill=(40, 40, 40), font=font)
    for n in steps:
        x, y = place(n, 0)
        draw.text((x - 4, y + 6), str(n), fill=(40, 40, 40), font=font)
    colours = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
    for i, (name, rows) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        points = [place(n, row.figures[figure]) for n, row in rows.items()]
        draw.line(points, fill=colour, width=2)
        for (x, y), row in zip(points, rows.values(), strict=True):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            draw.text((x + 6, y - 16), f"{row.figures[figure]:.3f}", fill=colour, font=font)
        draw.text((margin, 12 + 16 * i), f"KID: {name}", fill=colour, font=font)
    return np.asarray(canvas)


def _pixels(picture: Tensor) -> Pixels:
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
