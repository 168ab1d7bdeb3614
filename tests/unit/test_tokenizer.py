"""Ids held against transformers.CLIPTokenizer over awkward prompts and random Unicode."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflow.errors import CheckpointError, UsageError
from edgeflow.tokenizer import ClipTokenizer
from edgeflow.training.vocabulary import train_vocabulary

CAPTIONS = [
    "grinning face with big eyes, noto style",
    "grinning cat with smiling eyes, twemoji style",
    "red heart on fire!, fluent style",
    "Piñata with a red house, noto style",
    "the woman's hat, it's 24 years old!!, emojione style",
    "café 日本 жар-птица",
] * 3

PROMPTS = [
    "",
    " ",
    "a cat",
    "A CAT, Noto Style",
    "grinning face " * 60,
    "supercalifragilisticexpialidocious" * 20,
    "café, cafe\u0301, naïve, Ångström, ÅNGSTRÖM, ﬁne",
    "日本の猫 と 한국어 და ქართული",
    "👨‍👩‍👧‍👦 family 👍🏽 thumbs 🏳️‍🌈 flag 🇯🇵",
    "control \x00\x01\x07\x1b[31m\x7f\x80\x85 chars",
    "tabs\t\tand\r\nnew\n\n\nlines   and\u00a0\u2003\u3000spaces ",
    "zero\u200bwidth\ufeffbom\u2060joiner \u202eright to left",
    "text <|endoftext|> after",
    "<|startoftext|>a<|endoftext|>b",
    "<|ENDOFTEXT|> <|EndOfText|> <|endoftext|",
    " <|endoftext|> " * 30,
    "AT&amp;T &lt;b&gt; &#128512; &eacute; &amp;amp;",
    "it's we've I'M they'LL 'tis O'Reilly''s",
    "12345 3.14 ½ ² ٣ Ⅷ x2",
    "!!! ... wow!!! !a! !",
    "İstanbul ẞ ß Σίσυφος ΣΑΣ",
    "e\u0301\u0327\u0323 stacked, \u0301 alone",
    "a</w> </w> Ġ Ā</w>",
    "𝒻𝒶𝓃𝒸𝓎 𐍈 \U0010ffff \ufffe",
]


def random_prompts(count: int, seed: int) -> list[str]:
    """Strings that mix all of Unicode (surrogates apart) with fragments of the prompts above."""
    rng = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x7FF), (0x2000, 0x2BFF), (0x1F300, 0x1FAFF)]
    ranges += [(0, 0xD7FF), (0xE000, 0x10FFFF)]

    def piece() -> str:
        if rng.random() < 0.25:
            prompt = rng.choice(PROMPTS)
            start = rng.randrange(len(prompt) + 1)
            return prompt[start : start + rng.randrange(1, 16)]
        return chr(rng.randint(*rng.choice(ranges)))

    return ["".join(piece() for _ in range(rng.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    assert train_vocabulary(CAPTIONS, 600, path, max_length=24) == 600
    return path


def drop_tokenizer_json(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def keep_only_tokenizer_json(path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (path / name).unlink()


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    value.update(changes)
    path.write_text(json.dumps(value), encoding="utf-8")


def _token(content: str, normalized: bool = True) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    }


def like_stable_diffusion_1(path: Path) -> None:
    """The three files of the published InstaFlow and SD 1.x: special tokens as records, pad as a string."""
    drop_tokenizer_json(path)
    typed = {"__type": "AddedToken"}
    special = {"bos_token": _token("<|startoftext|>"), "eos_token": _token("<|endoftext|>")}
    special["unk_token"] = _token("<|endoftext|>")
    edit(path / "tokenizer_config.json", **{role: {**typed, **token} for role, token in special.items()})
    edit(path / "special_tokens_map.json", **special)


def like_stable_diffusion_2(path: Path) -> None:
    """SD 2.x pads with "!", which then is a special token inside a prompt too."""
    like_stable_diffusion_1(path)
    edit(path / "tokenizer_config.json", pad_token="!")
    edit(path / "special_tokens_map.json", pad_token="!")


def without_special_tokens_map(path: Path) -> None:
    like_stable_diffusion_1(path)
    (path / "special_tokens_map.json").unlink()


def saved_by_transformers_4(path: Path) -> None:
    """A config that lists its added tokens by id, as transformers from 4.34 wrote it."""
    like_stable_diffusion_1(path)
    listed = {"598": {**_token("<|startoftext|>"), "special": True}}
    listed["599"] = {**_token("<|endoftext|>", normalized=False), "special": True}
    edit(path / "tokenizer_config.json", added_tokens_decoder=listed, pad_token="<|endoftext|>")


def with_an_added_token(path: Path) -> None:
    like_stable_diffusion_1(path)
    (path / "added_tokens.json").write_text(json.dumps({"<my cat>": 600}))


def with_an_extra_special_token(path: Path) -> None:
    like_stable_diffusion_1(path)
    edit(path / "tokenizer_config.json", additional_special_tokens=["<my cat>"])


def padded_on_the_left(path: Path) -> None:
    edit(path / "tokenizer_config.json", padding_side="left", truncation_side="left")


LAYOUTS = [
    lambda path: None,
    drop_tokenizer_json,
    keep_only_tokenizer_json,
    like_stable_diffusion_1,
    like_stable_diffusion_2,
    without_special_tokens_map,
    saved_by_transformers_4,
    with_an_added_token,
    with_an_extra_special_token,
    padded_on_the_left,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.strip("<>"))
def test_same_ids_as_transformers(folder: Path, tmp_path: Path, layout: Callable[[Path], None]) -> None:
    clip_tokenizer_class = pytest.importorskip("transformers").CLIPTokenizer
    path = tmp_path / "tokenizer"
    shutil.copytree(folder, path)
    layout(path)
    reference = clip_tokenizer_class.from_pretrained(path)
    ours = ClipTokenizer.from_folder(path)
    assert ours.max_length == reference.model_max_length == 24
    assert ours.vocab_size == len(reference)
    prompts = [*PROMPTS, "a <my cat> <MY CAT>s", *random_prompts(300, seed=7)]
    expected = reference(prompts, padding="max_length", max_length=24, truncation=True).input_ids
    for prompt, ids in zip(prompts, expected, strict=True):
        got = ours.encode(prompt)
        assert got.shape == (1, 24) and got.dtype == np.int64
        assert got[0].tolist() == ids, repr(prompt)
        whole = len(reference(prompt, verbose=False).input_ids)
        assert ours.dropped_tokens(prompt) == max(0, whole - 24), repr(prompt)
        assert ours.truncated(prompt) == (whole > 24)


def test_open_a_folder_that_transformers_saved(folder: Path, tmp_path: Path) -> None:
    clip_tokenizer_class = pytest.importorskip("transformers").CLIPTokenizer
    reference = clip_tokenizer_class.from_pretrained(folder)
    reference.save_pretrained(tmp_path / "saved")
    ours = ClipTokenizer.from_folder(tmp_path / "saved")
    prompts = [*PROMPTS, *random_prompts(100, seed=8)]
    expected = reference(prompts, padding="max_length", max_length=24, truncation=True).input_ids
    assert [ours.encode(prompt)[0].tolist() for prompt in prompts] == expected


def test_padding_token_of_stable_diffusion_2(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer"
    shutil.copytree(folder, path)
    like_stable_diffusion_2(path)
    assert ClipTokenizer.from_folder(path).encode("")[0].tolist() == [598, 599, *[0] * 22]


def test_a_prompt_that_just_fits(folder: Path) -> None:
    ours = ClipTokenizer.from_folder(folder)
    assert ours.dropped_tokens("1" * 22) == 0 and not ours.truncated("1" * 22)
    assert ours.dropped_tokens("1" * 25) == 3 and ours.truncated("1" * 25)


def test_lone_surrogate_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="lone surrogate at character 2"):
        ClipTokenizer.from_folder(folder).encode("a \udc80")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vocab.json", None, "expected a file"),
        ("merges.txt", None, "expected a file"),
        ("tokenizer_config.json", None, "expected a file"),
        ("vocab.json", b"{", "expected JSON"),
        ("vocab.json", b"[]", "expected a JSON object"),
        ("vocab.json", b'{"a": 0, "b": 0}', "each with its own id"),
        ("vocab.json", b"\xff\xfe", "UTF-8"),
        ("merges.txt", b"#version: 0.2\na b c\n", "two tokens"),
        ("tokenizer_config.json", b"{}", "model_max_length"),
        ("tokenizer_config.json", b'{"model_max_length": 24, "padding_side": "up"}', "padding_side"),
        ("special_tokens_map.json", b'{"pad_token": 3}', "expected a token"),
        ("special_tokens_map.json", b'{"extra_special_tokens": "a"}', "expected a list"),
    ],
)
def test_missing_or_malformed_file_is_named(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    path = tmp_path / "tokenizer"
    shutil.copytree(folder, path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        ClipTokenizer.from_folder(path)
    assert name in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("merges.txt", b"#version: 0.2\nxyzzy plugh\n", "do not fit together"),
        ("tokenizer_config.json", b'{"model_max_length": 24, "pad_token": "<pad?>"}', None),
        (
            "tokenizer_config.json",
            b'{"model_max_length": 24, "added_tokens_decoder": {"x": "a"}}',
            "token ids",
        ),
        ("added_tokens.json", b'{"<x>": "y"}', "token ids"),
        ("added_tokens.json", b'{"<x>": 900}', "900"),
    ],
)
def test_files_that_contradict_each_other(
    folder: Path, tmp_path: Path, name: str, content: bytes, says: str | None
) -> None:
    path = tmp_path / "tokenizer"
    shutil.copytree(folder, path)
    (path / "special_tokens_map.json").unlink()
    (path / name).write_bytes(content)
    if says is None:  # an unlisted special token gets the next free id, as in transformers
        assert ClipTokenizer.from_folder(path).pad_id == 600
    else:
        with pytest.raises(CheckpointError, match=says):
            ClipTokenizer.from_folder(path)


def test_nothing_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        ClipTokenizer.from_folder(tmp_path / "nowhere")


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, edgeflow.tokenizer; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
