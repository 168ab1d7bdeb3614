"""What a checkpoint says of itself in ``edgeflow.json``, or its pipeline's class for it. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeflow.errors import CheckpointError

SCHEMA = 1
FACTS = "edgeflow.json"
PARTS = ("text_encoder", "unet", "vae", "tokenizer")
#: What a checkpoint can be: it draws in one step; its ODE is integrated in a few; it is a many-step teacher;
#: it is an autoencoder alone. Each with the facts it has unless the folder says otherwise.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "one-step": {"steps": 1, "guidance": 0.0},
    "rectified-flow": {"steps": 25, "guidance": 1.5},  # what its authors advise for 2-rectified flow
    "diffusion": {"steps": 25, "guidance": 7.5},
    "autoencoder": {"steps": 1, "guidance": 0.0},
}
KINDS = tuple(_DEFAULTS)
#: Pipelines whose class alone says what a folder without edgeflow.json is.
_PIPELINES = {
    "RectifiedFlowPipeline": "one-step",
    "InstaFlowPipeline": "one-step",
    "StableDiffusionPipeline": "diffusion",
}
_PROMPTS = ("a photograph of an astronaut riding a horse", "a red bicycle leaning on a brick wall")


def read_facts(root: Path, name: str, index: dict[str, Any]) -> dict[str, Any]:
    """edgeflow.json with defaults filled in; ``index`` is the folder's model_index.json.

    Raises CheckpointError for a pipeline that is not known, and one naming every wrong key of the file.
    """
    path = root / FACTS
    given = read_json(path) if path.is_file() else _published(root, name, index)
    if given.get("schema") != SCHEMA:
        raise CheckpointError(f"checkpoint: {path}: expected schema {SCHEMA}, got {given.get('schema')!r}")
    kind = given.get("kind")
    if kind not in KINDS:
        raise CheckpointError(f"checkpoint: {path}: kind {kind!r} is not known; known: {', '.join(KINDS)}")
    facts = {
        "licence": _card_licence(root),
        "origin": str(index.get("_name_or_path") or name),
        "prompts": list(_PROMPTS),
        **_DEFAULTS[kind],
        **given,
        "parts": ["vae"] if kind == "autoencoder" else list(PARTS),
    }
    wrong = _wrong(facts)
    if "quantization" in facts:
        wrong += _wrong_quantization(facts["quantization"])
    if wrong:
        raise CheckpointError(f"checkpoint: {path}: {'; '.join(wrong)}")
    return facts


def _published(root: Path, name: str, index: dict[str, Any]) -> dict[str, Any]:
    """The facts of a folder that only diffusers has written."""
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES:
        raise CheckpointError(
            f"checkpoint: {root}: pipeline {pipeline!r} is not known; known: {', '.join(sorted(_PIPELINES))}"
        )
    kind = _PIPELINES[pipeline]
    called = f"{name} {index.get('_name_or_path', '')}".lower()
    if kind == "one-step" and "2_rectified_flow" in called:  # published under InstaFlow's own class
        kind = "rectified-flow"
    return {"schema": SCHEMA, "kind": kind}


def _wrong(facts: dict[str, Any]) -> list[str]:
    """What is wrong with the facts, one phrase each."""

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip())

    def is_steps(value: Any) -> bool:
        return type(value) is int and (value == 1 if one_step else value >= 1)

    def is_guidance(
        value: Any,
    ) -> bool:  # a one-step model draws without: 0 and 1 mean the same, more is lost
        return type(value) in (int, float) and 0 <= value <= (1 if one_step else 1000)

    one_step = facts["kind"] == "one-step"
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "steps": ("1" if one_step else "a positive integer", is_steps),
        "guidance": ("0 to 1" if one_step else "0 to 1000", is_guidance),
        "licence": ("a text", is_text),
        "origin": ("a text", is_text),
        "prompts": ("a list of texts", lambda v: isinstance(v, list) and bool(v) and all(map(is_text, v))),
    }
    return [f"{k}: expected {what}, got {facts[k]!r}" for k, (what, ok) in checks.items() if not ok(facts[k])]


def _wrong_quantization(given: Any) -> list[str]:
    """What is wrong with the recipe a checkpoint was quantized by, or with where it came from."""
    from edgeflow.errors import ConfigError
    from edgeflow.quantization.recipe import parse_recipe

    source = given.get("source") if isinstance(given, dict) else None
    if not isinstance(source, dict) or not all(isinstance(source.get(key), str) for key in ("name", "hash")):
        return [f"quantization: expected a recipe and a source of name and hash, got {given!r:.80}"]
    try:
        parse_recipe(given.get("recipe"), "quantization")
    except ConfigError as error:
        return [str(error)]
    return []


def _card_licence(root: Path) -> str:
    """``license:`` of the model card's front matter, or "unknown"."""
    try:
        lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return "unknown"
    if not lines or lines[0].strip() != "---":
        return "unknown"
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if line.strip() == "---":
            break
        if key.strip() == "license" and value.strip():
            return value.strip().strip("'\"")
    return "unknown"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint: {path.parent}: expected the file {path.name}, found none"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: {path}: expected a readable file, got: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {path}: expected JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint: {path}: expected a JSON object, got a {type(value).__name__}")
    return value
