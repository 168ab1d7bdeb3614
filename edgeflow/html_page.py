"""One self-contained HTML file: escaping, tables, inline pictures, and a style for light and dark.

Nothing is fetched and no script runs. Wide tables scroll within themselves, so a page fits any width.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CSS = """
:root { color-scheme: light dark; --bg: #fbfbf9; --card: #ffffff; --ink: #1c1e21; --soft: #5c636b;
  --line: #e0e0da; --same: #2c6e49; --worse: #b3261e; --better: #1f5fa8; --mark: #d9480f; --bar: #4c78a8;
  --same-bg: #e3f1e8; --worse-bg: #fbe4e1; --better-bg: #e1ecf8; --board: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --card: #1c1f25; --ink: #e8e6e1; --soft: #a2a8b0;
  --line: #33383f; --same: #7fd1a0; --worse: #ff9d92; --better: #8fc1ff; --mark: #ff9455; --bar: #7aa6d6;
  --same-bg: #1d3427; --worse-bg: #43211f; --better-bg: #1c2f47; --board: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 10px; }
h3 { font-size: 1rem; margin: 24px 0 8px; overflow-wrap: anywhere; }
p, li { max-width: 78ch; } p { margin: 6px 0; }
.lead, .note, figcaption, .quiet { color: var(--soft); } .note { font-size: .875rem; }
ul { padding-left: 20px; margin: 8px 0; } li { margin: 3px 0; overflow-wrap: anywhere; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
th:first-child, td:first-child, .text { text-align: left; }
tbody th { color: var(--ink); position: sticky; left: 0; background: var(--card); max-width: 15em;
  white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
td small, th small { display: block; color: var(--soft); font-size: .78rem; font-weight: 400;
  line-height: 1.35; }
.chip { display: inline-block; padding: 0 8px; border-radius: 99px; font-size: .78rem; font-weight: 600;
  white-space: nowrap; }
.same { color: var(--same); background: var(--same-bg); } .worse { color: var(--worse);
  background: var(--worse-bg); } .better { color: var(--better); background: var(--better-bg); }
.plots { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; } .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px; min-width: 0; }
svg { display: block; width: 100%; height: auto; max-width: 560px; } svg text { fill: var(--ink);
  font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
svg .soft { fill: var(--soft); } svg .axis { stroke: var(--line); } svg .dot { fill: var(--bar); }
svg .base { fill: var(--mark); } svg .whisker { stroke: var(--bar); stroke-width: 1.5; }
svg .dashed { stroke: var(--mark); stroke-dasharray: 4 4; }
.pairs { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); }
.pair { display: grid; gap: 6px; grid-template-columns: repeat(4, 1fr); align-content: start; }
.pair figcaption { font-size: .78rem; line-height: 1.3; }
.pair .what { grid-column: 1 / -1; font-size: .875rem; }
.pair img { width: 100%; height: auto; display: block; border-radius: 6px; background: var(--board);
  border: 1px solid var(--line); }
.bars { display: grid; grid-template-columns: minmax(0, 1.4fr) minmax(0, 1.6fr) 8em; gap: 3px 10px;
  font-size: .82rem; align-items: center; }
.bars .name { overflow-wrap: anywhere; }
.bars .value { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 9px; border-radius: 3px; background: var(--bar); }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
"""


def escape(text: object) -> str:
    """Text as HTML, quotes included."""
    return html.escape(str(text))


def document(title: str, body: Iterable[str]) -> str:
    """The whole file; ``body`` is HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[int] = ()) -> str:
    """A table in a box that scrolls; cells are HTML, a row's first cell is its heading.

    ``texts`` are the columns, by number, that are words and stand on the left.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        made = []
        for number, cell in enumerate(row):
            kind = "th" if number == 0 else tag
            left = ' class="text"' if number in texts else ""
            scope = f' scope="{"col" if tag == "th" else "row"}"' if kind == "th" else ""
            made.append(f"<{kind}{scope}{left}>{cell}</{kind}>")
        return "<tr>" + "".join(made) + "</tr>"

    lines = "\n".join(cells("td", row) for row in rows)
    return (
        '<div class="scroll" tabindex="0"><table>\n<thead>'
        + cells("th", head)
        + f"</thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>"
    )


def picture(pixels: NDArray[np.uint8], alt: str) -> str:
    """``<img>`` with the PNG of pixels (3, H, W) or (H, W, 3) within it."""
    from PIL import Image

    if pixels.shape[0] == 3 and pixels.shape[-1] != 3:
        pixels = pixels.transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels), "RGB").save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}" loading="lazy">'
    )


def bars(rows: Sequence[tuple[str, float, str]], *, most: float | None = None) -> str:
    """Horizontal bars: (name, length, what is written beside it); ``most`` is a full bar's length."""
    full = most or max((value for _, value, _ in rows), default=1.0) or 1.0
    made = []
    for name, value, said in rows:
        share = max(0.0, min(1.0, value / full))
        made.append(
            f'<span class="name">{escape(name)}</span>'
            f'<span><i style="width:{100 * share:.1f}%"></i></span><span class="value">{escape(said)}</span>'
        )
    return f'<div class="bars">{"".join(made)}</div>'


def listing(items: Iterable[str]) -> str:
    """A list of texts."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def chip(text: str, kind: str) -> str:
    """A word in a coloured box: same, worse or better."""
    return f'<span class="chip {kind}">{escape(text)}</span>'


def number(value: Any, digits: int) -> str:
    """A figure with its digits, ``–`` for None."""
    return "–" if value is None else f"{value:.{digits}f}"
