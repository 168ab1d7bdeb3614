"""Captions to draw pairs from: what is composed, and that nothing held out is among it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from edgeflow.cli import main
from edgeflow.errors import DataError
from edgeflow.training.captions import collect_captions
from edgeflow.training.dataset import write_shards

TRAIN = [("cat", "flat"), ("cat", "3d"), ("dog", "flat"), ("dog", "ink"), ("flat tyre", "flat")]
TEST = [("cat", "ink"), ("dog", "3d")]


def make_set(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    folder.mkdir()
    for split, pairs in (("train", train), ("test", test)):
        samples = (
            (f"k{i}", buffer.getvalue(), {"caption": f"{c}, {s} style", "concept": c, "style": s})
            for i, (c, s) in enumerate(pairs)
        )
        write_shards(folder, split, samples, "png")
    return folder


def test_composed_captions_are_the_combinations_of_neither_split(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data", TRAIN, TEST)
    found = collect_captions(data, composed=True)
    assert set(found.train) == {f"{c}, {s} style" for c, s in TRAIN}
    # 3 concepts × 3 styles, less five trained on and two held out; "flat tyre" holds a style's name.
    assert found.composed == ["flat tyre, 3d style", "flat tyre, ink style"]
    assert collect_captions(data).composed == []
    assert sorted(found.mixed()) == sorted(found.train + found.composed)
    assert sorted(found.mixed(3)) == sorted(found.train + 3 * found.composed)


def test_a_held_out_caption_never_comes_in(tmp_path: Path) -> None:
    """Neither by its concept and style, nor as the same words of another concept or of the training split."""
    train = [*TRAIN, ("cat, ink style plus", "flat"), ("fox", "flat")]
    data = make_set(tmp_path / "data", train, [*TEST, ("fox", "flat"), ("owl", "flat")])
    found = collect_captions(data, composed=True)
    held_out = {f"{c}, {s} style" for c, s in [*TEST, ("fox", "flat"), ("owl", "flat")]}
    assert not held_out & {*found.train, *found.composed} and found.held_out == 4
    assert not any(c.startswith("owl") for c in found.composed), "a concept that training never met"


def test_recombined_captions_are_new_concepts_of_known_words(tmp_path: Path) -> None:
    train = [("red cat", "flat"), ("big dog with hat", "flat"), ("owl", "ink")]
    data = make_set(tmp_path / "data", train, [("red dog", "flat"), ("owl", "flat")])
    found = collect_captions(data, recombined=20, seed=3)
    assert found == collect_captions(data, recombined=20, seed=3) and found.composed == []
    assert len(found.recombined) == 20 == len(set(found.recombined))
    words = {w for c, _ in train for w in c.split()}
    for caption in found.recombined:
        concept, style = caption.removesuffix(" style").split(", ")
        assert set(concept.split()) <= words and style in ("flat", "ink")
        assert concept not in ("red cat", "big dog with hat", "owl", "red dog")
    assert len(collect_captions(data, recombined=10**6).recombined) < 200, "there are only so many"


def test_the_command_writes_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = make_set(tmp_path / "data", TRAIN, TEST), tmp_path / "new" / "captions.txt"
    assert main(["data", "captions", str(data), "--composed", "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(out), "train": 5, "composed": 2, "recombined": 0, "held_out": 2,
    }  # fmt: skip
    first = out.read_bytes()
    assert first.decode().splitlines() == collect_captions(data, composed=True).mixed()
    assert main(["data", "captions", str(data), "-o", str(out)]) == 2, "it is there already"
    assert out.read_bytes() == first
    assert main(["data", "captions", str(data), "-o", str(out), "--force"]) == 0
    assert len(out.read_text().splitlines()) == 5


def test_a_set_that_cannot_be_composed_is_one_sentence(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (8, 8)).save(plain / "a.png")
    (plain / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a  red\\ncat"}\n')
    assert collect_captions(plain).train == ["a red cat"]
    with pytest.raises(DataError, match=r"captions: .*: expected concept and style in every sample's JSON"):
        collect_captions(plain, composed=True)
    row = {"file_name": "a.png", "text": "a red cat", "concept": "dog", "style": "flat"}
    (plain / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="made of concept and style, got 'a red cat'"):
        collect_captions(plain, composed=True)
