"""How a stage's configuration comes about: preset < TOML file < ``--set`` < command-line flags.

Unknown keys and values of the wrong type are all collected and raised at once.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgeflow.errors import ConfigError

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What every training loop needs."""

    steps: int
    batch_size: int  # of all processes together
    learning_rate: float
    minutes: float = (
        0.0  # stop after this much training even if steps remain; compiling is not counted; 0: no limit
    )
    warmup_steps: int = 200
    decay_fraction: float = 0.0  # the last part of the run over which the rate falls to zero; 0: constant
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    bf16: bool = False
    compile: bool = False
    cuda_graph: bool = False  # capture the whole step; CUDA only
    seed: int = 0
    log_every: int = 50
    save_minutes: float = 5.0  # between states kept for --resume; 0: only the last
    save_steps: int = 0  # also every so many steps; 0: by minutes alone
    accumulate: int = 1  # micro-batches whose gradients make one step
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    tensorboard: bool = False  # also log for TensorBoard
    sheet_steps: int = 0  # draw a sample sheet every so many steps, and
    sheet_minutes: float = 0.0  # every so many minutes; 0: only at the end

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "log_every": 1, "accumulate": 1}
        wrong = [
            f"loop.{k}: expected {n} or more, got {v}"
            for k, n in least.items()
            if (v := getattr(self, k)) < n
        ]
        if wrong:
            raise ConfigError("config: " + "; ".join(wrong))


def resolve(preset: C, toml: Path | None, overrides: Iterable[str], flags: Mapping[str, Any]) -> C:
    """The preset with a TOML file's, ``key=value`` overrides' and flags' values put over it.

    Keys are dotted (``loop.steps``, ``shape.latent_channels``). Raises ConfigError naming every wrong one.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    if toml is not None:
        try:
            values.update(_flatten(tomllib.loads(toml.read_text(encoding="utf-8"))))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"config: {toml}: expected a TOML file, got: {error}") from error
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            problems.append(f"--set {item!r}: expected key=value")
        else:
            values[key] = _parse(text)
    values.update({k: v for k, v in flags.items() if v is not None})
    known = _flatten(dataclasses.asdict(preset))  # type: ignore[call-overload]
    for key, value in values.items():
        if key not in known:
            problems.append(f"{key} is not known; known: {', '.join(sorted(known))}")
        elif not _fits(value, known[key]):
            problems.append(f"{key}: expected {_kind(known[key])}, got {value!r}")
    if problems:
        raise ConfigError("config: " + "; ".join(problems))
    return _replace(preset, values)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a list like {list(value)}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type(value)]


def _fits(value: Any, current: Any) -> bool:
    if isinstance(current, tuple):
        return isinstance(value, list | tuple) and all(_fits(v, current[0]) for v in value)
    if isinstance(current, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(current, bool)
    if isinstance(current, float):
        return isinstance(value, int | float)
    return isinstance(value, type(current))


def _replace(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        current, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(current):
            changes[field.name] = _replace(current, values, key + ".")
        elif key in values:
            value = values[key]
            changes[field.name] = tuple(value) if isinstance(current, tuple) else type(current)(value)
    return dataclasses.replace(config, **changes)
