"""CLIP's tokenizer, free of torch and transformers, with exactly the ids of ``transformers.CLIPTokenizer``.

Byte-level BPE (Radford et al. 2021, arXiv 2103.00020, section 2.4). The folder is a Stable Diffusion
``tokenizer/``: vocab.json, merges.txt, tokenizer_config.json and, where present, special_tokens_map.json
and added_tokens.json; or tokenizer.json in place of the first two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from edgeflow.errors import CheckpointError, UsageError

START = "<|startoftext|>"
END = "<|endoftext|>"
END_OF_WORD = "</w>"

#: What counts as one word before BPE: the special tokens, English contractions, a run of letters, a single
#: digit, a run of anything else that is not space (OpenAI CLIP, simple_tokenizer.py).
WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

#: The roles a config gives to tokens, in the order in which transformers registers them: where two roles name
#: the same token, the last one's matching flags hold (SD 1.x: pad's, a plain string, over eos's).
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_KEYS = ("extra_special_tokens", "additional_special_tokens")
_ROLE_DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}

#: A config that sets no ``model_max_length`` is saved as 1e30; a real length is far below this.
_MAX_LENGTH_LIMIT = 65536


def clip_normalizer() -> normalizers.Normalizer:
    """NFC, every run of white space to one space, lower case."""
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def clip_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Words by WORD_PATTERN, then each word's UTF-8 bytes as printable characters."""
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]], unk_token: str = END) -> Tokenizer:
    """The bare pipeline: text to BPE ids, without special tokens. Raises ValueError if the two disagree."""
    try:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            fuse_unk=False,
            unk_token=unk_token,
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(str(error)) from error
    backend = Tokenizer(model)
    backend.normalizer = clip_normalizer()
    backend.pre_tokenizer = clip_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


@dataclass(frozen=True)
class ClipTokenizer:
    """Prompts to ids of a fixed length. Build it with ``from_folder``."""

    backend: Tokenizer = field(repr=False)
    max_length: int  # tokens, with start and end
    pad_id: int
    start_id: int
    end_id: int
    padding_side: str = "right"
    truncation_side: str = "right"

    @classmethod
    def from_folder(cls, path: Path) -> ClipTokenizer:
        """Open a tokenizer folder. Raises CheckpointError naming the file that is missing or malformed."""
        path = Path(path)
        config = _read_json(path / "tokenizer_config.json")
        max_length = _max_length(config, path)
        vocab, merges, file_added = _read_model(path)
        roles, added = _special_tokens(path, config, file_added)
        try:
            backend = clip_backend(vocab, merges, roles["unk_token"].content)
        except ValueError as error:
            raise CheckpointError(
                f"tokenizer: {path}: vocabulary and merges do not fit together: {error}"
            ) from error
        backend.add_tokens([token for _, token in added])
        for index, token in added:
            got = backend.token_to_id(token.content)
            if index not in (None, got):
                raise CheckpointError(
                    f"tokenizer: {path}: added token {token.content!r}: "
                    f"expected the next free id {got}, got {index}"
                )
        ids = {role: _role_id(backend, token, role, path) for role, token in roles.items()}
        return cls(
            backend,
            max_length,
            pad_id=ids["pad_token"],
            start_id=ids["bos_token"],
            end_id=ids["eos_token"],
            padding_side=_side(config, "padding_side", path),
            truncation_side=_side(config, "truncation_side", path),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: the rows a text encoder's embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """The prompt's ids, shape (1, max_length), int64: start, words, end, padding; too long is cut.

        Equals ``CLIPTokenizer(prompt, padding="max_length", truncation=True).input_ids``.
        Raises UsageError for text that is not valid Unicode (a lone surrogate).
        """
        words = self._words(prompt)
        room = self.max_length - 2
        if len(words) > room:
            words = words[:room] if self.truncation_side == "right" else words[len(words) - room :]
        ids = [self.start_id, *words, self.end_id]
        padding = [self.pad_id] * (self.max_length - len(ids))
        ids = ids + padding if self.padding_side == "right" else padding + ids
        return np.array([ids], dtype=np.int64)

    def dropped_tokens(self, prompt: str) -> int:
        """How many of the prompt's tokens ``encode`` cuts off; 0 for a prompt that fits."""
        return max(0, len(self._words(prompt)) - (self.max_length - 2))

    def truncated(self, prompt: str) -> bool:
        """Whether ``encode`` cuts the prompt."""
        return self.dropped_tokens(prompt) > 0

    def _words(self, prompt: str) -> list[int]:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"prompt: {prompt!r}: expected valid Unicode text, "
                f"got a lone surrogate at character {error.start}"
            ) from error
        return self.backend.encode(prompt, add_special_tokens=False).ids


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"tokenizer: {path}: expected a file, got none") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"tokenizer: {path}: expected readable UTF-8 text, got {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"tokenizer: {path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"tokenizer: {path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_model(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[dict[str, Any]]]:
    """Vocabulary, merges, and the added tokens that a tokenizer.json carries."""
    whole = path / "tokenizer.json"
    has_legacy = (path / "vocab.json").exists() or (path / "merges.txt").exists()
    if has_legacy or not whole.exists():
        merges = _parse_merges(path / "merges.txt")
        return _checked_vocab(_read_json(path / "vocab.json"), path / "vocab.json"), merges, []
    content = _read_json(whole)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"tokenizer: {whole}: expected a BPE model, got {model!r:.80}")
    merges = [_checked_pair(merge, whole) for merge in model.get("merges", [])]
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise CheckpointError(f"tokenizer: {whole}: added_tokens: expected a list of objects")
    return _checked_vocab(model.get("vocab"), whole), merges, added


def _parse_merges(path: Path) -> list[tuple[str, str]]:
    lines = _read_text(path).split("\n")  # not splitlines(): it would cut at U+0085, a legal token character
    lines = [line.removesuffix("\r") for line in lines]
    return [_checked_pair(line, path) for line in lines if line and not line.startswith("#version")]


def _checked_pair(merge: Any, path: Path) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"tokenizer: {path}: expected merges of two tokens, got {merge!r}")
    return parts[0], parts[1]


def _checked_vocab(vocab: Any, path: Path) -> dict[str, int]:
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) != len(ids):
        raise CheckpointError(f"tokenizer: {path}: expected a vocabulary of tokens, each with its own id")
    return vocab


def _max_length(config: Mapping[str, Any], path: Path) -> int:
    length = config.get("model_max_length")
    if type(length) is not int or not 3 <= length <= _MAX_LENGTH_LIMIT:
        raise CheckpointError(
            f"tokenizer: {path / 'tokenizer_config.json'}: model_max_length: "
            f"expected a number of tokens from 3 to {_MAX_LENGTH_LIMIT}, got {length!r}"
        )
    return length


def _side(config: Mapping[str, Any], key: str, path: Path) -> str:
    side = config.get(key) or "right"
    if side not in ("left", "right"):
        raise CheckpointError(
            f"tokenizer: {path / 'tokenizer_config.json'}: {key}: expected a side, got {side!r}; "
            "known: left, right"
        )
    return side


def _special_tokens(
    path: Path, config: Mapping[str, Any], file_added: list[dict[str, Any]]
) -> tuple[dict[str, AddedToken], list[tuple[int | None, AddedToken]]]:
    """Which token plays which role, and the tokens to match in a prompt before BPE, with their ids if given.

    As transformers 5 reads them: with ``added_tokens_decoder`` in the config that is the whole truth; else
    special_tokens_map.json overrides the config, then added_tokens.json and tokenizer.json's list join in.
    """
    values: dict[str, Any] = dict(_ROLE_DEFAULTS)
    where = path / "tokenizer_config.json"
    sources: list[Mapping[str, Any]] = [config]
    legacy = "added_tokens_decoder" not in config
    if legacy and (path / "special_tokens_map.json").exists():
        where = path / "special_tokens_map.json"
        sources.append(_read_json(where))
    for source in sources:
        values.update({role: source[role] for role in _ROLES if source.get(role) is not None})
    roles = {role: _added_token(value, where) for role, value in values.items()}
    if legacy:
        names = {token.content for token in roles.values()}
        listed = _legacy_added(path, names, file_added)
    else:
        listed = _listed_added(config["added_tokens_decoder"], path / "tokenizer_config.json")
    by_content = {token.content: token for token in listed.values()}
    roles = {role: by_content.get(token.content, token) for role, token in roles.items()}
    added: list[tuple[int | None, AddedToken]] = [(index, listed[index]) for index in sorted(listed)]
    for role in _ROLES:
        if role in roles and roles[role].content not in by_content:
            added.append((None, AddedToken(**_flags(roles[role]), special=True)))
    known = {token.content for _, token in added}
    added += [(None, token) for token in _extra_tokens(sources, where) if token.content not in known]
    return roles, added


def _extra_tokens(sources: list[Mapping[str, Any]], path: Path) -> list[AddedToken]:
    values = [source.get(key) or [] for source in sources for key in _EXTRA_KEYS]
    if not all(isinstance(value, list) for value in values):
        raise CheckpointError(f"tokenizer: {path}: extra special tokens: expected a list, got {values!r:.80}")
    return [_added_token(token, path) for value in values for token in value]


def _legacy_added(path: Path, names: set[str], file_added: list[dict[str, Any]]) -> dict[int, AddedToken]:
    listed = {}
    legacy = path / "added_tokens.json"
    if legacy.exists():
        for content, index in _read_json(legacy).items():
            special = content in names
            listed[_token_id(index, legacy)] = AddedToken(content, normalized=not special, special=special)
    for token in file_added:
        listed[_token_id(token.get("id"), path / "tokenizer.json")] = _added_token(
            token, path / "tokenizer.json"
        )
    return listed


def _listed_added(listed: Any, path: Path) -> dict[int, AddedToken]:
    if not isinstance(listed, dict):
        raise CheckpointError(
            f"tokenizer: {path}: added_tokens_decoder: expected tokens by id, got {listed!r:.80}"
        )
    return {_token_id(index, path): _added_token(token, path) for index, token in listed.items()}


def _token_id(index: Any, path: Path) -> int:
    if str(index).isascii() and str(index).isdigit():
        return int(index)
    raise CheckpointError(f"tokenizer: {path}: expected token ids, got {index!r}")


def _flags(token: AddedToken) -> dict[str, Any]:
    return {
        "content": token.content,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
    }


def _added_token(value: Any, path: Path) -> AddedToken:
    if isinstance(value, str) and value:
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(value["content"], **{k: bool(value[k]) for k in flags if k in value})
    raise CheckpointError(f"tokenizer: {path}: expected a token, got {value!r}")


def _role_id(backend: Tokenizer, token: AddedToken, role: str, path: Path) -> int:
    index = backend.token_to_id(token.content)
    if index is None:
        raise CheckpointError(
            f"tokenizer: {path}: {role}: expected a token of the vocabulary, got {token.content!r}"
        )
    return index
