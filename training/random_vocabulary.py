"""A byte-level vocabulary of any size up to CLIP's 49,408 entries and in its form, without its words.

The merges are spelled out systematically: pairs of letters, then triples, then quadruples, each inside and at
the end of a word; every one of them can be reached by some text. Not learnt, so nothing needs downloading.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

from edgeflow.tokenizer import END, END_OF_WORD, START
from edgeflow.training.vocabulary import FIXED_ENTRIES, clip_vocabulary


def letter_merges(count: int) -> list[tuple[str, str]]:
    """The first ``count`` merges: ab, ab</w>, abc, abc</w>, abcd</w>. Raises ValueError when they run out."""
    letters = string.ascii_lowercase
    pairs = [a + b for a, b in itertools.product(letters, letters)]
    merges = [
        *((p[0], p[1]) for p in pairs),
        *((p[0], p[1] + END_OF_WORD) for p in pairs),
        *((p, c) for p in pairs for c in letters),
        *((p, c + END_OF_WORD) for p in pairs for c in letters),
        *((p, q + END_OF_WORD) for p in pairs for q in pairs),
    ]
    if not 0 <= count <= len(merges):
        raise ValueError(f"count: expected 0 to {len(merges)}, got {count}")
    return merges[:count]


def write_tokenizer(folder: Path, size: int, pad: str = END, max_length: int = 77) -> None:
    """The tokenizer folder as Stable Diffusion's repositories have it: four files, no tokenizer.json."""
    merges = letter_merges(size - FIXED_ENTRIES)
    vocab = clip_vocabulary(merges)
    if len(vocab) != size:
        raise ValueError(f"size: expected {size} entries, got {len(vocab)}")

    def token(content: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"content": content, **flags}

    roles = {"bos_token": token(START), "eos_token": token(END), "unk_token": token(END)}
    typed = {role: {"__type": "AddedToken", **value} for role, value in roles.items()}
    config = {
        **typed,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": pad,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    for name, text in {
        "merges.txt": "\n".join(lines),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps({**roles, "pad_token": pad}, indent=2),
    }.items():
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")
