"""The emoji set, from made-up icon packages to shards: what stays, what goes, who is held out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeflow.errors import DataError, OutputExistsError, UsageError
from edgeflow.training import emoji_curation as curation
from edgeflow.training.dataset import open_dataset
from edgeflow.training.emoji import build_emoji
from edgeflow.training.emoji_names import NameTable
from edgeflow.training.emoji_sources import SOURCES, Icon, IconSet, Source, fetch, read_icons, read_package

pytest.importorskip("resvg_py")
pytest.importorskip("webdataset")


def box(colour: str) -> str:
    return f'<path fill="{colour}" d="M2 2h12v12H2z"/>'


HALF = '<path fill="red" d="M0 0h8v16H0z"/>'  # the left half
TONES = ("light-skin-tone", "dark-skin-tone")

ALPHA = {
    "icons": {
        "red-apple": {"body": box("#d00")},
        "left-half": {"body": HALF},
        "empty": {"body": '<path fill="#fff" d="M0 0h16v16H0z"/>'},
        "twin": {"body": box("#d00")},
        "old-apple": {"body": box("#a00"), "hidden": True},
        "man": {"body": box("#fc0")},
        **{f"man-{tone}": {"body": box("#c90")} for tone in TONES},
        "mage": {"body": box("#90f")},
        "traffic-light": {"body": box("#333")},
        "six-oclock": {"body": box("#111")},
        "three-oclock": {"body": box("#112")},
        "flag-peru": {"body": box("#113")},
        "flag-japan": {"body": box("#114")},
        "japanese-vacancy-button": {"body": box("#115")},
        "letter-k": {"body": box("#116")},
        "alarm-clock": {"body": box("#117")},
        "broken": {"body": "<path"},
    },
    "aliases": {
        "apple": {"parent": "red-apple"},
        "right-half": {"parent": "left-half", "hFlip": True},
        "lost": {"parent": "nowhere"},
    },
    "width": 16,
    "height": 16,
}
ALPHA_CHARS = {
    "1f34e": "red-apple",
    "1f9d9": "mage",
    "1f468": "man",
    "23f0": "alarm-clock",
    "1f3fb": "man-light-skin-tone",
}
BETA = {
    "icons": {
        "person-mage": {"body": box("#80f")},
        "man": {"body": box("#fd1")},
        **{f"man-{tone}": {"body": box("#c91")} for tone in ("light", "medium", "dark")},
        "traffic-light": {"body": box("#334")},
        "apple": {"body": box("#e00")},
    },
    "width": 16,
    "height": 16,
}
BETA_CHARS = {"1f9d9": "person-mage", "1f468": "man"}
GAMMA = {
    "icons": {
        "redapple": {"body": box("#c00")},
        "alarmclock": {"body": box("#118"), "width": 32, "height": 16},
        "alramclock": {"body": box("#119")},
        "clockalarm": {"body": box("#11a")},
        "manmage": {"body": box("#11b")},
        "xyzzy": {"body": box("#11c")},
    },
    "width": 16,
    "height": 16,
}


def package(
    folder: Path, name: str, icons: dict[str, Any], chars: dict[str, str], **more: Any
) -> tuple[Source, Path]:
    """An icon package as the registry gives it, and the source that pins it."""
    archive = folder / f"{name}.tgz"
    members = {
        "icons.json": {"prefix": name, **icons},
        "chars.json": chars,
        "package.json": {"version": "1.0.0"},
    }
    with tarfile.open(archive, "w:gz") as tar:
        for member, value in members.items():
            content = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    source = Source(
        name=name,
        style=name,
        version="1.0.0",
        integrity=f"sha512-{digest}",
        licence="MIT",
        attribution=f"{name} artists",
        homepage="https://example.org",
        **more,
    )
    return source, archive


@pytest.fixture
def packages(tmp_path: Path) -> dict[Source, Path]:
    folder = tmp_path / "packages"
    folder.mkdir()
    return dict(
        [
            package(folder, "alpha", ALPHA, ALPHA_CHARS),
            package(folder, "beta", BETA, BETA_CHARS, tone_suffixes=("-light", "-medium", "-dark")),
            package(folder, "gamma", GAMMA, {}),
        ]
    )


def build(out: Path, packages: dict[Source, Path], **options: Any) -> dict[str, Any]:
    made = build_emoji(
        out,
        sources=tuple(packages),
        fetch_source=lambda source: read_package(packages[source], source),
        **{"size": 32, "processes": 1, **options},
    )
    return made.summary


def test_what_stays_and_what_goes(tmp_path: Path, packages: dict[Source, Path]) -> None:
    summary = build(tmp_path / "out", packages)
    loaded = open_dataset(tmp_path / "out").load("train", 32)
    got = {style: set() for style in ("alpha", "beta", "gamma")}
    for concept, style, caption in zip(loaded.concepts, loaded.styles, loaded.captions, strict=True):
        got[style].add(concept)
        assert caption == f"{concept}, {style} style"
    assert got["alpha"] == {
        *("red apple", "left half", "right half", "man", "mage", "traffic light"),
        *("three oclock", "flag japan", "alarm clock"),
    }
    assert got["beta"] == {"red apple", "man", "mage", "traffic light"}
    assert got["gamma"] == {"red apple", "alarm clock", "man mage"}
    assert summary["num_images"] == {"train": 16, "test": 0} and not loaded.problems

    dropped = {source["name"]: source["dropped"] for source in summary["sources"]}
    assert dropped["alpha"] == {
        curation.ALIAS: 2,
        curation.HIDDEN: 1,
        curation.SKIN_TONE: 2,
        curation.BLANK: 1,
        curation.SAME_PICTURE: 1,
        curation.UNDRAWABLE: 1,
        "clock face": 1,
        "flag": 1,
        "squared ideograph": 1,
        "keycap, digit or letter": 1,
    }
    assert dropped["beta"] == {curation.SKIN_TONE: 3}
    # alramclock and clockalarm are alarm clocks too, xyzzy is no word.
    assert dropped["gamma"] == {curation.SECOND_DRAWING: 2, curation.NO_WORDS: 1}
    assert summary["problems"] == ["alpha: alias lost names nowhere, which is not there"]
    # Every icon and alias is accounted for.
    icons = sum(len(s["icons"]) + len(s.get("aliases", {})) for s in (ALPHA, BETA, GAMMA))
    assert icons == len(loaded) + sum(sum(d.values()) for d in dropped.values())


def test_pictures_are_what_the_svg_says(tmp_path: Path, packages: dict[Source, Path]) -> None:
    build(tmp_path / "out", packages)
    loaded = open_dataset(tmp_path / "out").load("train", 32)
    at = {key: image for key, image in zip(loaded.keys, loaded.images, strict=True)}
    red, white = [255, 0, 0], [255, 255, 255]
    left, right = at["alpha__left-half"], at["alpha__right-half"]
    assert left[:, 16, 4].tolist() == red and left[:, 16, 28].tolist() == white
    assert right[:, 16, 4].tolist() == white and right[:, 16, 28].tolist() == red
    # 32 × 16 units in a square: half size, centred from top to bottom.
    wide = at["gamma__alarmclock"]
    assert wide[:, 4, 8].tolist() == white and wide[:, 16, 8].tolist() == [0x11, 0x11, 0x88]


@pytest.mark.parametrize(
    ("turn", "corner"),
    [
        ({}, (0, 0)),
        ({"hFlip": True}, (0, 1)),
        ({"vFlip": True}, (1, 0)),
        ({"rotate": 1}, (0, 1)),
        ({"rotate": 2}, (1, 1)),
        ({"rotate": 3}, (1, 0)),
        ({"rotate": 1, "hFlip": True}, (1, 1)),
    ],
)
def test_turned_aliases(turn: dict[str, Any], corner: tuple[int, int]) -> None:
    """A square in the upper left corner lands where the turn brings it (mirror first, then clockwise)."""
    import resvg_py
    from PIL import Image

    body = '<path fill="#000" d="M4 6h4v4h-4z"/>'
    icons = {"icons": {"a": {"body": body}}, "aliases": {"b": {"parent": "a", **turn}}, "left": 4, "top": 6}
    icon_set = read_icons(SOURCES[0], {**icons, "width": 8, "height": 8}, {})
    icon = icon_set.icons[-1]
    assert icon.name == ("b" if turn else "a") and icon_set.num_aliases == (0 if turn else 1)
    png = resvg_py.svg_to_bytes(svg_string=icon.svg(16), background="#fff", skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("L"))
    dark = {(y, x) for y in (0, 1) for x in (0, 1) if pixels[4 + 8 * y, 4 + 8 * x] == 0}
    assert dark == {corner}


def test_the_same_packages_give_the_same_bytes(tmp_path: Path, packages: dict[Source, Path]) -> None:
    build(tmp_path / "one", packages)
    build(tmp_path / "two", packages)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and {"README.md", "dataset.json", "train-000000.tar"} <= set(one)
    shard = json.loads(one["dataset.json"])["shards"][0]
    assert shard["sha256"] == hashlib.sha256(one[shard["file"]]).hexdigest()


def test_two_processes_draw_what_one_draws(tmp_path: Path, packages: dict[Source, Path]) -> None:
    build(tmp_path / "one", packages)
    build(tmp_path / "two", packages, processes=2)
    one, two = ((tmp_path / name / "train-000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two


def test_data_card_names_every_source(tmp_path: Path, packages: dict[Source, Path]) -> None:
    build(tmp_path / "out", packages)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\npretty_name:") and card.count("\n---\n") == 1
    for source in packages:
        for word in (source.licence, source.attribution, source.homepage, source.integrity):
            assert word in card
    assert "| alpha | alpha | [alpha artists](https://example.org) | MIT | 9 | 0 |" in card


def test_existing_output_and_failures_leave_everything_as_it_was(
    tmp_path: Path, packages: dict[Source, Path]
) -> None:
    out = tmp_path / "sets" / "out"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        build(out, packages)

    def refuse(source: Source) -> IconSet:
        raise DataError("no network")

    with pytest.raises(DataError, match="no network"):
        build_emoji(out, sources=tuple(packages), fetch_source=refuse, force=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"] and (out / "mine.txt").read_text() == "mine"
    build(out, packages, force=True)
    assert not (out / "mine.txt").exists() and (out / "train-000000.tar").is_file()
    with pytest.raises(UsageError, match="8 to 1024 pixels, got 4"):
        build(tmp_path / "small", packages, size=4)


def test_limit_keeps_whole_concepts(tmp_path: Path, packages: dict[Source, Path]) -> None:
    build(tmp_path / "all", packages)
    build(tmp_path / "few", packages, limit=4)
    everything, few = (open_dataset(tmp_path / n).load("train", 8) for n in ("all", "few"))
    assert 0 < len(set(few.concepts)) <= 4
    expected = [
        k for k, c in zip(everything.keys, everything.concepts, strict=True) if c in set(few.concepts)
    ]
    assert few.keys == expected


# Names


def one_set(names: dict[str, str | None], name: str = "set") -> IconSet:
    """A set of these icon names; None where the set does not know the code point."""
    icons = {"icons": {n: {"body": ""} for n in names}}
    source = Source(name, name, "1", "", "MIT", "", "")
    return read_icons(source, icons, {code: n for n, code in names.items() if code})


KNOWN = one_set(
    {
        "angry-face": "1f620",
        "person-walking": "1f6b6",
        "blue-heart": "1f499",
        "tokyo-tower": "1f5fc",
        "check-mark-button": "2705",
        "hamster": "1f439",
        "flag-peru": "1f1f5-1f1ea",
    },
    "known",
)


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("angryface", "angry face"),  # joined
        ("angry", "angry face"),  # cut short
        ("walking", "person walking"),
        ("heartblue", "blue heart"),  # turned round
        ("toykotower", "tokyo tower"),  # misspelt
        ("hampster", "hamster"),
        ("whiteheavycheckmark", "check mark button"),  # Unicode's own name
        ("white-heavy-check-mark", "check mark button"),
        ("flag-for-flag-peru", "flag peru"),
        ("blueface", "blue face"),  # unknown, but words
        ("sea-monster", "sea monster"),
        ("qwzrtp", None),
    ],
)
def test_names_come_to_the_same_concept(name: str, concept: str | None) -> None:
    other = one_set({name: None}, "other")
    assert NameTable([KNOWN, other]).concept(other.icons[0], other) == concept


def test_a_code_point_outweighs_a_name() -> None:
    other = one_set({"hamster": "1f620"}, "other")
    assert NameTable([KNOWN, other]).concept(other.icons[0], other) == "angry face"


def test_a_traffic_light_is_no_skin_tone() -> None:
    source = Source("s", "s", "1", "", "MIT", "", "", tone_suffixes=("-light", "-medium", "-dark"))
    names = ("traffic-light", "man", "man-light", "man-medium", "man-dark", "hand-medium-skin-tone-up")
    icon_set = read_icons(source, {"icons": {n: {"body": ""} for n in names}}, {})
    kept, dropped = curation.curate([icon_set])
    assert [e.concept for e in kept] == ["man", "traffic light"]
    assert dropped["s"][curation.SKIN_TONE] == 4


# The split


def pairs(styles: int, concepts: int = 3000) -> set[tuple[str, str]]:
    """Every style knows a different two thirds of the concepts."""
    return {(f"concept {c}", f"style {s}") for c in range(concepts) for s in range(styles) if (c + s) % 3}


def test_held_out_pairs_are_seen_apart() -> None:
    splits = curation.assign_splits(pairs(6))
    train, test = ({p for p, split in splits.items() if split == name} for name in ("train", "test"))
    assert train | test == pairs(6)
    styles_of: dict[str, set[str]] = defaultdict(set)
    for concept, style in train:
        styles_of[concept].add(style)
    assert all(len(styles_of[concept] - {style}) >= 2 for concept, style in test)
    assert {style for _, style in test} <= {style for _, style in train}
    assert 0.03 < len(test) / len(splits) < 0.05
    assert max(Counter(style for _, style in test).values()) < 2 * len(test) / 6


def test_a_concept_of_two_styles_is_never_held_out() -> None:
    few = {(c, s) for c, s in pairs(2, 5000)}
    assert set(curation.assign_splits(few).values()) == {"train"}


def test_a_further_source_brings_no_held_out_pair_back() -> None:
    before, after = curation.assign_splits(pairs(5)), curation.assign_splits(pairs(6))
    held_out = {p for p, split in before.items() if split == "test"}
    assert held_out and all(after[p] == "test" for p in held_out)
    newly = {p for p in before if before[p] == "train" and after[p] == "test"}
    # Only where the concept had fewer than two other styles to be learnt from.
    stays = Counter(c for (c, s), split in before.items() if split == after[c, s] == "train")
    assert newly and all(stays[concept] < 2 for concept, _ in newly)


# Fetching


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_fetch_asks_npm_for_the_pinned_version(
    tmp_path: Path, packages: dict[Source, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, archive = next(iter(packages.items()))
    script = f'echo "$@" > {tmp_path}/asked; for last; do :; done; cp {archive} "$last/x.tgz"'
    fake_npm(tmp_path / "bin", script, monkeypatch)
    assert any(icon.name == "red-apple" for icon in fetch(source).icons)
    assert (tmp_path / "asked").read_text().startswith("pack @iconify-json/alpha@1.0.0 ")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo E404 no such package >&2; exit 1", r"npm could not fetch it \(exit 1\): E404 no such package"),
        ("exit 0", r"npm could not fetch it \(exit 0\): nothing"),
        ('for last; do :; done; echo other > "$last/x.tgz"', r"expected sha512-.*, got sha512-"),
    ],
)
def test_a_fetch_that_fails_is_one_sentence(
    tmp_path: Path, packages: dict[Source, Path], monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    fake_npm(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(DataError, match=message) as caught:
        fetch(next(iter(packages)))
    assert "\n" not in str(caught.value)


def test_no_npm_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="found no npm on PATH"):
        fetch(SOURCES[0])


def test_every_source_is_pinned_and_may_be_passed_on() -> None:
    for source in SOURCES:
        assert len(base64.b64decode(source.integrity.removeprefix("sha512-"))) == 64
        assert source.licence in ("Apache-2.0", "MIT", "CC-BY-4.0") and source.attribution


# The command


@pytest.fixture
def run(packages: dict[Source, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from edgeflow.cli.data import command

    def made(out: Path, **options: Any) -> Any:
        return build_emoji(
            out,
            sources=tuple(packages),
            fetch_source=lambda source: read_package(packages[source], source),
            processes=1,
            **options,
        )

    monkeypatch.setattr("edgeflow.training.emoji.build_emoji", made)
    return lambda *arguments: CliRunner().invoke(command, ["emoji", *map(str, arguments)])


def test_command_prints_a_table_or_json(run: Callable[..., Any], tmp_path: Path) -> None:
    table = run("-o", tmp_path / "a", "--size", 16)
    assert table.exit_code == 0, table.output
    assert "alpha" in table.stdout and "16" in table.stdout and table.stderr == ""
    as_json = run("-o", tmp_path / "b", "--size", 16, "--json", "-q")
    said = json.loads(as_json.stdout)
    assert said["num_images"] == {"train": 16, "test": 0} and said["size"] == 16
    assert said["path"] == str(tmp_path / "b")
    again = run("-o", tmp_path / "b")
    assert isinstance(again.exception, OutputExistsError)
    assert run("-o", tmp_path / "c", "--size", 4).exit_code == 2


def test_icon_svg_is_a_square_document() -> None:
    svg = Icon("x", "<g/>", left=1, top=2, width=10, height=20).svg(64)
    assert 'width="64" height="64" viewBox="1 2 10 20"' in svg


@pytest.mark.slow
def test_the_real_set(tmp_path: Path) -> None:
    """Needs npm and its registry: the pinned packages give the set that the built-in model learnt from."""
    summary = build_emoji(tmp_path / "out", limit=60, size=64).summary
    loaded = open_dataset(tmp_path / "out").load("train", 64)
    assert not loaded.problems and set(loaded.styles) == {source.style for source in SOURCES}
    assert summary["num_concepts"] > 50
    assert sum(s["dropped"][curation.SKIN_TONE] for s in summary["sources"][:4]) > 7000
