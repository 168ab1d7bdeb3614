"""The learned vocabulary, held against transformers.CLIPTokenizer, which reads the folder it writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from edgeflow.errors import DataError, OutputExistsError
from edgeflow.training.vocabulary import FIXED_ENTRIES, byte_alphabet, learn_merges, train_vocabulary

CAPTIONS = [
    "grinning face with big eyes, noto style",
    "grinning cat with smiling eyes, twemoji style",
    "red heart, fluent style",
    "Piñata with a red house, noto style",
    "woman's hat 24, emojione style",
] * 4


@pytest.fixture
def clip_tokenizer_class():
    return pytest.importorskip("transformers").CLIPTokenizer


def test_layout_is_clips_own(tmp_path: Path) -> None:
    size = train_vocabulary(CAPTIONS, 560, tmp_path / "tokenizer", max_length=32)
    vocab = json.loads((tmp_path / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "tokenizer/merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    tokens = sorted(vocab, key=vocab.__getitem__)
    assert size == len(vocab) == 560
    assert list(vocab.values()) == list(range(560))
    # CLIP's published vocab.json: "!" is 0, "!</w>" is 256, "a" is 64, the byte 0x00 ("Ā") is 188.
    assert (tokens[0], tokens[64], tokens[188], tokens[256]) == ("!", "a", "Ā", "!</w>")
    assert tokens[512:558] == ["".join(merge.split(" ")) for merge in merges]
    assert tokens[558:] == ["<|startoftext|>", "<|endoftext|>"]


def test_alphabet_is_every_byte_as_transformers_has_it() -> None:
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    assert byte_alphabet() == list(convert.bytes_to_unicode().values())


def test_transformers_opens_it(tmp_path: Path, clip_tokenizer_class) -> None:
    train_vocabulary(CAPTIONS, 700, tmp_path / "tokenizer", max_length=24)
    tokenizer = clip_tokenizer_class.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.model_max_length == 24
    ids = tokenizer("Grinning CAT, noto style", padding="max_length", truncation=True).input_ids
    words = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    assert words[:3] == ["<|startoftext|>", "grinning</w>", "cat</w>"]
    assert len(ids) == 24
    assert (
        tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    )  # CLIP pools at the highest id
    assert tokenizer.bos_token_id == len(tokenizer) - 2


def test_every_byte_can_be_written(tmp_path: Path, clip_tokenizer_class) -> None:
    train_vocabulary(CAPTIONS, FIXED_ENTRIES, tmp_path / "tokenizer", max_length=16)
    tokenizer = clip_tokenizer_class.from_pretrained(tmp_path / "tokenizer")
    every_lead_and_tail = "".join(chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0x800), 0x20AC, 0x1F600))
    ids = tokenizer(every_lead_and_tail, add_special_tokens=False).input_ids
    assert len(ids) > 1000
    assert max(ids) < 512  # bytes only: no end-of-text standing in for an unknown


def test_same_captions_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    shuffled = list(CAPTIONS)
    random.Random(1).shuffle(shuffled)
    train_vocabulary(CAPTIONS, 640, tmp_path / "a", max_length=32)
    train_vocabulary(shuffled, 640, tmp_path / "b", max_length=32)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_merges_are_the_most_frequent_pairs() -> None:
    # By hand, of "aab" three times and "ab" twice: a+b</w> occurs 5 times, then a+ab</w> 3 times, no more.
    assert learn_merges(["aab aab aab", "ab ab"], 10) == [("a", "b</w>"), ("a", "ab</w>")]


def test_few_captions_give_fewer_entries(tmp_path: Path) -> None:
    assert train_vocabulary(["aab aab ab"], 2000, tmp_path / "t", max_length=8) == FIXED_ENTRIES + 2


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 514"):
        train_vocabulary(CAPTIONS, 513, tmp_path / "t", max_length=8)
    with pytest.raises(ValueError, match="max_length"):
        train_vocabulary(CAPTIONS, 600, tmp_path / "t", max_length=2)
    with pytest.raises(DataError, match="captions"):
        train_vocabulary(["", "  "], 600, tmp_path / "t", max_length=8)
    assert not list(tmp_path.iterdir())
    (tmp_path / "t").mkdir()
    (tmp_path / "t/keep").write_text("mine")
    with pytest.raises(OutputExistsError):
        train_vocabulary(CAPTIONS, 600, tmp_path / "t", max_length=8)
    assert (tmp_path / "t/keep").read_text() == "mine"
