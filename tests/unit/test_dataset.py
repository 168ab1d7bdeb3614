"""Reading and writing captioned sets: what is usable is read right, what is not is named."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeflow.errors import DataError
from edgeflow.training.dataset import Problem, fit_square, open_dataset, write_shards


def picture(colour: tuple[int, ...], size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def plain_tar(path: Path, members: dict[str, bytes]) -> None:
    """A shard made by the standard library alone, not by the code under test."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def known(caption: str, **more: str) -> dict[str, str]:
    return {"caption": caption, "concept": "", "style": "", **more}


def test_shards_round_trip(tmp_path: Path) -> None:
    colours = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250)}
    samples = [
        (key, picture(rgb, kind="PNG"), known(f"a {key} é", concept=key, style="flat"))
        for key, rgb in colours.items()
    ]
    shards = write_shards(tmp_path, "train", samples[:2], "png")
    write_shards(tmp_path, "test", samples[2:], "png")
    assert [(s["file"], s["samples"]) for s in shards] == [("train-000000.tar", 2)]

    opened = open_dataset(tmp_path)
    assert opened.splits == ("train", "test")
    train, test = opened.load("train", 16), opened.load("test", 16)
    assert train.images.shape == (2, 3, 16, 16) and train.images.dtype == np.uint8
    assert train.captions == ["a a é", "a b é"] and train.keys == ["a", "b"]
    assert train.concepts == ["a", "b"] and train.styles == ["flat", "flat"]
    assert train.images[0, :, 5, 5].tolist() == [250, 0, 0]
    assert test.images[0, :, 0, 0].tolist() == [0, 0, 250]
    assert not train.problems and not test.problems


def test_shards_hold_what_webdataset_itself_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shards(
        tmp_path,
        "train",
        [("k1", picture((1, 2, 3)), known("one")), ("k2", picture((4, 5, 6)), known("two"))],
        "png",
    )
    read = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [(s["__key__"], s["txt"], s["json"]["caption"]) for s in read] == [
        ("k1", "one", "one"),
        ("k2", "two", "two"),
    ]
    assert read[1]["png"][0, 0].tolist() == [4, 5, 6]


def test_shards_are_the_same_bytes_twice_and_carry_no_time(tmp_path: Path) -> None:
    samples = [(f"k{i}", picture((i, i, i)), known(f"grey {i}")) for i in range(3)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, "train", samples, "png")
    one, two = ((tmp_path / name / "train-000000.tar").read_bytes() for name in ("one", "two"))
    assert one == two
    with tarfile.open(tmp_path / "one" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "edgeflow")}


def test_many_samples_become_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeflow.training.dataset.SAMPLES_PER_SHARD", 2)
    samples = [(f"k{i}", picture((i, 0, 0)), known(f"red {i}")) for i in range(5)]
    shards = write_shards(tmp_path, "train", samples, "png")
    assert [s["samples"] for s in shards] == [2, 2, 1]
    assert open_dataset(tmp_path).load("train", 8).keys == [f"k{i}" for i in range(5)]


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_a_key_that_would_split_a_sample_is_misuse(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="no dot and no slash"):
        write_shards(tmp_path, "train", [(key, b"", known("x"))], "png")


def test_broken_samples_of_a_shard_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    whole = picture((9, 9, 9), (64, 64))
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(noise, "PNG")
    plain_tar(
        tmp_path / "shard.tar",
        {
            "good.png": whole,
            "good.txt": b"a good one",
            "cut.png": noise.getvalue()[:700],
            "cut.txt": b"cut in the middle",
            "text.png": b"this is no picture",
            "text.txt": b"not a picture",
            "mute.png": whole,
            "mute.txt": b"  \n",
            "bare.png": whole,
            "lost.txt": b"a caption alone",
            "odd.png": whole,
            "odd.json": b"{not json",
            "json.png": whole,
            "json.json": b'{"caption": "from json"}',
        },
    )
    loaded = open_dataset(tmp_path).load("train", 8)
    assert loaded.captions == ["a good one", "from json"]
    reasons = {p.key.removeprefix("shard.tar:"): p.reason for p in loaded.problems}
    assert set(reasons) == {"cut", "text", "mute", "bare", "lost", "odd"}
    assert "broken picture" in reasons["cut"] and reasons["text"] == "broken picture: not a picture"
    assert reasons["mute"] == reasons["bare"] == "empty caption"
    assert reasons["lost"] == "no picture among txt"
    assert reasons["odd"].startswith("broken caption")


def test_a_shard_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    members = {
        f"k{i}.{part}": picture((i, 0, 0)) if part == "png" else b"red"
        for i in range(4)
        for part in ("png", "txt")
    }
    plain_tar(tmp_path / "train-000000.tar", members)
    whole = (tmp_path / "train-000000.tar").read_bytes()
    (tmp_path / "train-000000.tar").write_bytes(whole[: 512 * 9 + 20])  # within the third sample's picture
    loaded = open_dataset(tmp_path).load("train", 8)
    assert loaded.keys == ["k0", "k1"]
    assert [p.key for p in loaded.problems] == ["train-000000.tar"]
    assert "breaks off" in loaded.problems[0].reason


def test_a_packed_shard_is_read_too(tmp_path: Path) -> None:
    plain_tar(tmp_path / "s.tar", {"k.png": picture((7, 7, 7)), "k.txt": b"grey"})
    (tmp_path / "train-0.tar.gz").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    (tmp_path / "s.tar").unlink()
    assert open_dataset(tmp_path).load("train", 8).captions == ["grey"]


def imagefolder(root: Path, rows: list[str], pictures: dict[str, bytes]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name, content in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def row(name: str, **columns: str) -> str:
    return json.dumps({"file_name": name, **columns})


def test_imagefolder_with_every_kind_of_trouble(tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(picture((1, 1, 1)))
    root = imagefolder(
        tmp_path / "set",
        [
            row("one.png", text="number one"),
            row("sub/two.jpg", caption="number two", concept="two", style="photo"),
            row("missing.png", text="not there"),
            row("broken.png", text="broken"),
            row("empty.png", text=""),
            row("../outside.png", text="outside"),
            "{no json",
            json.dumps({"text": "no file name"}),
        ],
        {
            "one.png": picture((10, 20, 30)),
            "sub/two.jpg": picture((200, 200, 200), kind="JPEG"),
            "broken.png": b"\x89PNG\r\n\x1a\nbroken",
            "empty.png": picture((0, 0, 0)),
            "unnamed.png": picture((0, 0, 0)),
        },
    )
    loaded = open_dataset(root).load("train", 16)
    assert loaded.captions == ["number one", "number two"]
    assert loaded.images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert (loaded.concepts, loaded.styles) == (["", "two"], ["", "photo"])
    reasons = {p.key: p.reason for p in loaded.problems}
    assert set(reasons) == {
        *("missing.png", "broken.png", "empty.png", "../outside.png", "unnamed.png"),
        *("metadata.jsonl:7", "metadata.jsonl:8"),
    }
    assert reasons["missing.png"] == "the file is missing"
    assert reasons["../outside.png"] == "lies outside the dataset's folder"
    assert reasons["unnamed.png"] == "no line in metadata.jsonl"


@pytest.mark.parametrize("layout", ["one metadata file", "a metadata file per split"])
def test_imagefolder_splits(tmp_path: Path, layout: str) -> None:
    pictures = {"train/a.png": picture((1, 0, 0)), "test/b.png": picture((2, 0, 0))}
    if layout == "one metadata file":
        imagefolder(tmp_path, [row(name, text=name) for name in pictures], pictures)
    else:
        for name, content in pictures.items():
            split, file = name.split("/")
            imagefolder(tmp_path / split, [row(file, text=name)], {file: content})
    opened = open_dataset(tmp_path)
    assert opened.splits == ("train", "test")
    for split, name in (("train", "train/a.png"), ("test", "test/b.png")):
        loaded = opened.load(split, 8)
        assert loaded.captions == [name] and not loaded.problems


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    plain_tar(tmp_path / "s.tar", {"k.png": picture((255, 0, 0, 0)), "k.txt": b"nothing at all"})
    assert (open_dataset(tmp_path).load("train", 4).images == 255).all()


def test_fit_square_cuts_the_middle_out() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (0, 200, 0)
    fitted = np.asarray(fit_square(Image.fromarray(wide), 10))
    assert fitted.shape == (10, 10, 3) and (fitted == (0, 200, 0)).all()
    assert fit_square(Image.fromarray(wide).resize((60, 20)), 40).size == (40, 40)


def test_iterate_streams_and_reports(tmp_path: Path) -> None:
    plain_tar(
        tmp_path / "s.tar",
        {"a.png": picture((1, 1, 1), (20, 10)), "a.txt": b"one", "b.png": b"", "b.txt": b"two"},
    )
    problems: list[Problem] = []
    stream = open_dataset(tmp_path).iterate("train", problems.append)
    first = next(stream)
    assert (first.key, first.picture.size, first.picture.mode) == ("a", (20, 10), "RGB")
    assert problems == []
    assert list(stream) == []
    assert [p.key for p in problems] == ["s.tar:b"]


def test_limit_stops_early(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [(f"k{i}", picture((i, 0, 0)), known("x")) for i in range(4)], "png")
    assert open_dataset(tmp_path).load("train", 4, limit=2).keys == ["k0", "k1"]


def test_what_is_no_dataset_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"\*\.tar shards or an imagefolder"):
        open_dataset(tmp_path)
    plain_tar(tmp_path / "train-0.tar", {"a.png": b"", "a.txt": b"x"})
    with pytest.raises(DataError, match=r"split 'test'; known: train"):
        open_dataset(tmp_path).load("test", 8)
    with pytest.raises(DataError, match=r"0 usable ones of 1; the first problem: train-0.tar:a: broken"):
        open_dataset(tmp_path).load("train", 8)
