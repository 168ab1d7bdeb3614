"""Learn a small CLIP vocabulary from the captions themselves: byte-level BPE in CLIP's own layout.

Every id that a text encoder never sees is a row of weights shipped for nothing; a few hundred captions'
words need a thousand or two entries, not CLIP's 49,408. Sennrich et al. 2016 (arXiv 1508.07909) over bytes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers

from edgeflow.errors import DataError, OutputExistsError
from edgeflow.tokenizer import END, END_OF_WORD, START, clip_backend, clip_normalizer, clip_pre_tokenizer

#: Entries that every vocabulary holds: each byte, each byte at a word's end, start and end of text.
FIXED_ENTRIES = 2 * 256 + 2

#: A pair of tokens seen once says nothing of other captions.
_MIN_PAIR_COUNT = 2


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes, in CLIP's order (GPT-2's byte table).

    Printable Latin-1 bytes stand for themselves and come first; the rest follow as U+0100 and on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(rest)]


def learn_merges(captions: Iterable[str], num_merges: int) -> list[tuple[str, str]]:
    """The first ``num_merges`` BPE merges of the captions, most frequent pair first; fewer if they run out.

    The same captions give the same merges, in whatever order they come.
    """
    alphabet = byte_alphabet()
    # The trainer numbers word-final characters as its hash map yields them and breaks ties by number;
    # naming them up front as special tokens fixes their numbers.
    word_final = [character + END_OF_WORD for character in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=FIXED_ENTRIES + num_merges,
        min_frequency=_MIN_PAIR_COUNT,
        special_tokens=word_final,
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = clip_normalizer()
    tokenizer.pre_tokenizer = clip_pre_tokenizer()
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges][:num_merges]


def clip_vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Token to id in CLIP's order: bytes, word-final bytes, merges, start, end (the highest id)."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(character + END_OF_WORD for character in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += [START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def train_vocabulary(captions: Iterable[str], size: int, folder: Path, max_length: int) -> int:
    """Learn a vocabulary and write it as a tokenizer folder that ``transformers.CLIPTokenizer`` opens.

    ``size`` is the most entries it may have (at least 514); captions with too few repeated pairs give fewer.
    ``max_length`` is the tokens of a prompt, start and end included. Returns the number of entries: the rows
    of the text encoder's embedding; the end-of-text id, which CLIP pools at, is the last of them.

    Writes vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json and tokenizer.json; the
    same captions give the same bytes. Raises ValueError for a size or length that is too small, DataError
    for captions without a word, OutputExistsError if the folder is there and not empty.
    """
    if size < FIXED_ENTRIES:
        raise ValueError(
            f"size: expected at least {FIXED_ENTRIES} (every byte twice, start, end), got {size}"
        )
    if max_length < 3:
        raise ValueError(f"max_length: expected at least 3 (start, a token, end), got {max_length}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(folder)
    kept = [caption for caption in captions if caption.strip()]
    if not kept:
        raise DataError("captions: expected at least one with a word in it, got none")
    merges = learn_merges(kept, size - FIXED_ENTRIES)
    vocab = clip_vocabulary(merges)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_folder(temporary, vocab, merges, max_length)
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(vocab)


def _write_folder(
    folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int
) -> None:
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "vocab.json", vocab, indent=None)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    backend = clip_backend(vocab, merges)
    backend.add_special_tokens([START, END])
    backend.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
