"""Where the emoji artwork comes from: six open icon packages at pinned versions, fetched by the npm client.

Every package is checked against a pinned sha512 before a byte of it is read, so the same edgeflow always
sees the same drawings. The packages are in Iconify's format: ``icons.json`` (SVG bodies and aliases) and,
for some, ``chars.json`` (Unicode code points → icon name).
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeflow.errors import DataError

#: Minutes of patience for one package (the largest is 14 MiB).
FETCH_TIMEOUT_S = 600


@dataclass(frozen=True)
class Source:
    """One icon package: what to fetch, what it must hash to, and what its artists ask for."""

    name: str  # the package's last name, also the source's name in the dataset
    style: str  # the style's words in a caption
    version: str
    integrity: str  # npm's: "sha512-" + base64
    licence: str  # SPDX
    attribution: str
    homepage: str
    tone_suffixes: tuple[str, ...] = ()  # how the set marks a skin tone, beyond the usual "skin tone" words

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}"


_FLUENT_TONES = ("-medium-light", "-medium-dark", "-light", "-medium", "-dark")

SOURCES: tuple[Source, ...] = (
    Source(
        name="noto",
        style="noto",
        version="1.2.9",
        integrity="sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        licence="Apache-2.0",
        attribution="Noto Emoji, Google Inc",
        homepage="https://github.com/googlefonts/noto-emoji",
    ),
    Source(
        name="fluent-emoji-flat",
        style="fluent flat",
        version="1.2.6",
        integrity="sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        licence="MIT",
        attribution="Fluent Emoji, Microsoft Corporation",
        homepage="https://github.com/microsoft/fluentui-emoji",
        tone_suffixes=_FLUENT_TONES,
    ),
    Source(
        name="fluent-emoji",
        style="fluent",
        version="1.2.7",
        integrity="sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        licence="MIT",
        attribution="Fluent Emoji, Microsoft Corporation",
        homepage="https://github.com/microsoft/fluentui-emoji",
        tone_suffixes=_FLUENT_TONES,
    ),
    Source(
        name="twemoji",
        style="twemoji",
        version="1.2.5",
        integrity="sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        licence="CC-BY-4.0",
        attribution="Twemoji, Twitter, Inc and other contributors",
        homepage="https://github.com/jdecked/twemoji",
    ),
    Source(
        name="emojione",
        style="emojione",
        version="1.2.3",
        integrity="sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        licence="CC-BY-4.0",
        attribution="Emoji One (EmojiTwo)",
        homepage="https://github.com/EmojiTwo/emojitwo",
    ),
    Source(
        name="fxemoji",
        style="fxemoji",
        version="1.2.2",
        integrity="sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        licence="Apache-2.0",
        attribution="FxEmojis, Mozilla",
        homepage="https://github.com/mozilla/fxemoji",
    ),
)


@dataclass(frozen=True)
class Icon:
    """One drawing: an SVG body with the box it is drawn in and how an alias turned it."""

    name: str
    body: str
    left: float
    top: float
    width: float
    height: float
    h_flip: bool = False
    v_flip: bool = False
    quarter_turns: int = 0

    def svg(self, size: int) -> str:
        """A whole SVG document of ``size`` × ``size`` pixels, the drawing centred in it."""
        body = self.body
        centre_x, centre_y = self.left + self.width / 2, self.top + self.height / 2
        if self.h_flip or self.v_flip:
            x, y = -1 if self.h_flip else 1, -1 if self.v_flip else 1
            move = f"translate({centre_x - x * centre_x:g} {centre_y - y * centre_y:g})"
            body = f'<g transform="{move} scale({x} {y})">{body}</g>'
        if self.quarter_turns % 4:
            turn = f"rotate({90 * (self.quarter_turns % 4)} {centre_x:g} {centre_y:g})"
            body = f'<g transform="{turn}">{body}</g>'
        box = f"{self.left:g} {self.top:g} {self.width:g} {self.height:g}"
        if self.quarter_turns % 2:
            box = (
                f"{centre_x - self.height / 2:g} {centre_y - self.width / 2:g} {self.height:g} {self.width:g}"
            )
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{size}" height="{size}" viewBox="{box}">{body}</svg>'
        )


@dataclass(frozen=True)
class IconSet:
    """A package, read: its drawings, the names it knows them by, and what was no drawing of its own."""

    source: Source
    icons: tuple[Icon, ...]  # sorted by name
    also_called: Mapping[str, tuple[str, ...]]  # icon name → its aliases
    codepoints: Mapping[str, str]  # icon name → code points as in "1f9d1-200d-1f3a8", where known
    hidden: tuple[str, ...]  # drawings that the set itself has replaced
    num_aliases: int  # aliases that are the same picture under another name
    problems: tuple[str, ...] = field(default=())  # icons that could not be read, named


def fetch(source: Source) -> IconSet:
    """Fetch one package with the npm client, verify it, read it.

    Raises DataError when npm is missing or fails, or the package is not the pinned one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"emoji data: {source.package}: expected the npm client to fetch it, found no npm on PATH; "
            "install Node.js"
        )
    with tempfile.TemporaryDirectory(prefix="edgeflow-emoji-") as folder:
        spec = f"{source.package}@{source.version}"
        command = [npm, "pack", spec, "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, cwd=folder
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"emoji data: {spec}: npm gave no answer in {FETCH_TIMEOUT_S} s") from error
        archives = sorted(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise DataError(f"emoji data: {spec}: npm could not fetch it (exit {done.returncode}): {said}")
        return read_package(archives[0], source)


def read_package(archive: Path, source: Source) -> IconSet:
    """Read a package archive (.tgz) after checking its sha512. Raises DataError when it is another one."""
    content = archive.read_bytes()
    got = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if got != source.integrity:
        raise DataError(
            f"emoji data: {source.package}@{source.version}: expected {source.integrity}, got {got}; "
            "this is not the package that edgeflow was made with"
        )
    members: dict[str, Any] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in ("icons", "chars", "package"):
                try:
                    stream = tar.extractfile(f"package/{name}.json")
                except KeyError:
                    continue
                if stream is not None:
                    members[name] = json.load(stream)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"emoji data: {source.package}: the package cannot be read: {error}") from error
    version = members.get("package", {}).get("version")
    if "icons" not in members or version != source.version:
        raise DataError(
            f"emoji data: {source.package}: expected icons.json at version {source.version}, "
            f"got version {version}"
        )
    return read_icons(source, members["icons"], members.get("chars", {}))


def read_icons(source: Source, icons: Mapping[str, Any], chars: Mapping[str, str]) -> IconSet:
    """Resolve Iconify's defaults and aliases. A turned or mirrored alias is a picture of its own."""
    box = {key: icons[key] for key in ("left", "top", "width", "height") if key in icons}
    found: dict[str, Icon] = {}
    hidden: list[str] = []
    problems: list[str] = []
    for name, entry in icons["icons"].items():
        if entry.get("hidden"):
            hidden.append(name)
            continue
        found[name] = _icon(name, {**box, **entry})
    also_called: dict[str, list[str]] = {}
    turned: dict[str, Icon] = {}
    num_aliases = 0
    for name, alias in icons.get("aliases", {}).items():
        parent, turn = _resolve_alias(alias, icons.get("aliases", {}))
        if parent not in found:
            if parent not in icons["icons"]:
                problems.append(f"{source.name}: alias {name} names {parent}, which is not there")
            num_aliases += 1
        elif turn["hFlip"] or turn["vFlip"] or turn["rotate"] % 4:
            turned[name] = _icon(name, {**box, **icons["icons"][parent], **turn})
        else:
            num_aliases += 1
            also_called.setdefault(parent, []).append(name)
    every = {**found, **turned}
    codepoints: dict[str, str] = {}
    for codepoint, name in sorted(chars.items()):
        codepoints.setdefault(name, codepoint)
    return IconSet(
        source=source,
        icons=tuple(every[name] for name in sorted(every)),
        also_called={name: tuple(sorted(names)) for name, names in sorted(also_called.items())},
        codepoints=codepoints,
        hidden=tuple(sorted(hidden)),
        num_aliases=num_aliases,
        problems=tuple(problems),
    )


def _resolve_alias(alias: Mapping[str, Any], aliases: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The icon at the end of a chain of aliases, and the turns made on the way (Iconify's rules)."""
    turn: dict[str, Any] = {"hFlip": False, "vFlip": False, "rotate": 0}
    seen: set[str] = set()
    while True:
        turn["hFlip"] ^= bool(alias.get("hFlip"))
        turn["vFlip"] ^= bool(alias.get("vFlip"))
        turn["rotate"] = (turn["rotate"] + int(alias.get("rotate", 0))) % 4
        parent = str(alias["parent"])
        if parent not in aliases or parent in seen:
            return parent, turn
        seen.add(parent)
        alias = aliases[parent]


def _icon(name: str, entry: Mapping[str, Any]) -> Icon:
    return Icon(
        name=name,
        body=entry["body"],
        left=float(entry.get("left", 0)),
        top=float(entry.get("top", 0)),
        width=float(entry.get("width", 16)),
        height=float(entry.get("height", 16)),
        h_flip=bool(entry.get("hFlip", False)),
        v_flip=bool(entry.get("vFlip", False)),
        quarter_turns=int(entry.get("rotate", 0)),
    )
