"""A scatter plot as inline SVG that takes its colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeflow.html_page import escape

_WIDTH, _HEIGHT = 400, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 16, 46
_LINE = 15  # height of a label


@dataclass(frozen=True)
class Point:
    """One model: where it lies, how its y may vary, and whether it is what the others are held against."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    base: bool = False
    size: float = 5.0  # radius


@dataclass(frozen=True)
class Axis:
    """A title, whether the axis begins at 0, and whether values are spaced by their logarithm."""

    title: str
    zero: bool = False
    log: bool = False


def scatter(points: Sequence[Point], x: Axis, y: Axis, *, described: str) -> str:
    """The plot; ``described`` is read out in its place. The base's y is drawn across as a dashed line."""
    xs = _scale([p.x for p in points], x.log, _LEFT, _WIDTH - _RIGHT, from_zero=x.zero)
    spread = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    ys = _scale(spread, y.log, _HEIGHT - _BOTTOM, _TOP, from_zero=y.zero)
    parts = [*_grid(xs, ys, x, y)]
    taken: list[tuple[float, float, float, float]] = []
    for p in points:
        if p.base:
            at = ys.place(p.y)
            taken.append((_LEFT, at - 1, _WIDTH - _RIGHT, at + 1))
            parts.append(
                f'<line class="dashed" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            )
    for p in points:
        if p.low is not None and p.high is not None:
            a, b = ys.place(p.low), ys.place(p.high)
            at = xs.place(p.x)
            parts.append(f'<line class="whisker" x1="{at:.1f}" x2="{at:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>')
            taken.append((at - 2, min(a, b), at + 2, max(a, b)))
    for p in points:
        parts.append(_dot(p, xs.place(p.x), ys.place(p.y)))
        taken.append(_box(xs.place(p.x) - p.size, ys.place(p.y), 2 * p.size, 2 * p.size))
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        parts.append(_label(p, xs.place(p.x), ys.place(p.y), taken))
    inside = "\n".join(parts)
    said = f'role="img" aria-label="{escape(described)}"'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" {said}>\n{inside}\n</svg>'


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool
    start: float
    end: float

    def place(self, value: float) -> float:
        a, b, v = (math.log(n) if self.log else n for n in (self.low, self.high, value))
        return self.start + (v - a) / (b - a) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        step = nice((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [n * 10.0**p for p in powers for n in (1, 2, 5)]
    return [v for v in every if low <= v <= high]


def _scale(
    values: Sequence[float], log: bool, start: float, end: float, *, from_zero: bool = False
) -> _Scale:
    low, high = min(values), max(values)
    if log:
        return _Scale(low / 1.25, high * 1.25, True, start, end)
    margin = (high - low or abs(high) or 1.0) * 0.12
    if from_zero:
        return _Scale(0.0, high * 1.12, False, start, end)
    return _Scale(low - margin, high + margin, False, start, end)


def _grid(xs: _Scale, ys: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    lines = []
    for value in ys.ticks:
        at = ys.place(value)
        lines.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(
            f'<text class="soft" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_show(value)}</text>'
        )
    for value in xs.ticks:
        at = xs.place(value)
        lines.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        lines.append(
            f'<text class="soft" x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{_show(value)}</text>'
        )
    lines.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    lines.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>')
    turned = f'transform="translate(14 {(_TOP + bottom) / 2:.0f}) rotate(-90)"'
    lines.append(f'<text {turned} text-anchor="middle">{escape(y.title)}</text>')
    return lines


def _show(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _dot(p: Point, x: float, y: float) -> str:
    kind = "base" if p.base else "dot"
    title = f"<title>{escape(p.label)}</title>"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{p.size:.1f}">{title}</circle>'


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return (x, y - height / 2, x + width, y + height / 2)


def _label(p: Point, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """The point's name, at the first place beside it where nothing else lies yet."""
    name = p.label if len(p.label) <= 30 else "…" + p.label[-29:]
    width, gap = 6.8 * len(name), p.size + 4
    places = [
        (anchor, x + dx, y + dy)
        for dy in (0, *(sign * n * _LINE for n in range(1, 7) for sign in (-1, 1)))
        for anchor, dx in (("start", gap), ("end", -gap), ("start", -width / 2))
        if dy or abs(dx) == gap
    ]
    fitting = [place for place in places if _fits(place, width)]
    free = [place for place in fitting if not any(_overlap(_extent(place, width), t) for t in taken)]
    anchor, tx, ty = (free or fitting or places)[0]
    taken.append(_extent((anchor, tx, ty), width))
    label = f'<text x="{tx:.1f}" y="{ty + 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
    if abs(ty - y) <= _LINE:
        return label
    left, top, right, bottom = _extent((anchor, tx, ty), width)  # so far off that a line must lead to it
    end = min(max(x, left), right), bottom if ty < y else top
    return f'<line class="axis" x1="{x:.1f}" y1="{y:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>{label}'


def _extent(place: tuple[str, float, float], width: float) -> tuple[float, float, float, float]:
    anchor, x, y = place
    return _box(x if anchor == "start" else x - width, y, width, _LINE - 1)


def _fits(place: tuple[str, float, float], width: float) -> bool:
    left, top, right, bottom = _extent(place, width)
    return left >= _LEFT and right <= _WIDTH and top >= 0 and bottom <= _HEIGHT - _BOTTOM


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
