"""Pictures on disk: PNG with its facts inside, and contact sheets with captions."""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB

_MIN_CELL = 128  # pixels; smaller pictures are enlarged by a whole factor so that a caption fits under them
_GAP = 12
_FONT_SIZE = 12
_MAX_LINES = 3
_MAX_COLUMNS = 8
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def save_png(path: Path, pixels: Pixels, facts: Mapping[str, str]) -> None:
    """Write pixels (H, W, 3) with the facts as text chunks. Equal input gives equal bytes."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_text(key, value)
    Image.fromarray(pixels, "RGB").save(path, format="PNG", pnginfo=info)


def read_facts(path: Path) -> dict[str, str]:
    """The text chunks of a PNG that ``save_png`` wrote."""
    with Image.open(path) as image:
        image.load()
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def slug(prompt: str, length: int = 40) -> str:
    """A prompt as part of a file name: ASCII letters, digits and dashes; "untitled" when none are left."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower())[:length].strip("-") or "untitled"


def contact_sheet(pictures: Sequence[Pixels], captions: Sequence[str], columns: int | None = None) -> Pixels:
    """Pictures of one size on white, row by row, each with its caption under it.

    ``columns`` defaults to what leaves the fewest holes in a sheet about as wide as high. Small pictures are
    enlarged by a whole factor, unsmoothed; long captions are cut after three lines.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"expected a caption for each picture, got {len(pictures)} and {len(captions)}")
    if len({p.shape for p in pictures}) != 1:
        raise ValueError(f"expected pictures of one size, got {sorted({p.shape for p in pictures})}")
    height, width = pictures[0].shape[:2]
    factor = max(1, -(-_MIN_CELL // width))
    columns = columns or best_columns(len(pictures))
    rows = -(-len(pictures) // columns)
    font = ImageFont.load_default(_FONT_SIZE)
    lines = [wrap(caption, width * factor, font) for caption in captions]
    line_height = _FONT_SIZE + 4
    cell = (width * factor + _GAP, height * factor + _GAP + line_height * max(1, *map(len, lines)))
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, text) in enumerate(zip(pictures, lines, strict=True)):
        x, y = _GAP + i % columns * cell[0], _GAP + i // columns * cell[1]
        picture = Image.fromarray(pixels, "RGB").resize(
            (width * factor, height * factor), Image.Resampling.NEAREST
        )
        sheet.paste(picture, (x, y))
        for n, line in enumerate(text):
            draw.text((x, y + height * factor + 3 + n * line_height), line, fill=_INK, font=font)
    return np.asarray(sheet)


def best_columns(count: int) -> int:
    """How many pictures a row: few holes in the last row, near a square, never more than 8 wide."""
    smallest = math.ceil(math.sqrt(count))
    choices = range(smallest, min(_MAX_COLUMNS, 2 * smallest) + 1)
    return min(choices, key=lambda columns: (-count % columns, columns), default=_MAX_COLUMNS)


def wrap(caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """A caption in lines that fit ``width`` pixels, at most three, the last cut with an ellipsis."""
    text = " ".join(_drawable(caption).split())
    lines: list[str] = []
    for characters in range(min(len(text), width), 0, -1):
        lines = textwrap.wrap(text, characters)
        if all(font.getlength(line) <= width for line in lines):
            break
    if len(lines) <= _MAX_LINES:
        return lines
    last = lines[_MAX_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: _MAX_LINES - 1], last.rstrip(" ,") + "…"]


def _drawable(caption: str) -> str:
    """The built-in font knows ASCII: letters lose their accents, what has no ASCII form stays (a box)."""

    def plain(character: str) -> str:
        base = unicodedata.normalize("NFKD", character)
        return base.encode("ascii", "ignore").decode() or (
            "" if unicodedata.combining(character) else character
        )

    return "".join(map(plain, caption))
