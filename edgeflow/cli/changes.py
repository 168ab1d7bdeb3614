"""Options that say how a checkpoint is opened and what is changed in it first, for verbs that take one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from edgeflow.checkpoint import Checkpoint

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)

_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--lora",
        {
            "multiple": True,
            "metavar": "FILE[:SCALE]",
            "help": "Fuse a LoRA (kohya's or diffusers' names) into the weights first; may repeat.",
        },
    ),
    (
        "--graft",
        {
            "metavar": "FINETUNED",
            "help": "Add what FINETUNED changed in --base's UNet; take its text encoder and autoencoder.",
        },
    ),
    ("--base", {"metavar": "SD", "help": "The model that the one of --graft was fine-tuned from."}),
    (
        "--decoder",
        {
            "metavar": "PATH",
            "help": "An autoencoder (AutoencoderTiny, as TAESD) in place of the model's: a folder or hub id.",
        },
    ),
    (
        "--variant",
        {
            "type": click.Choice(["fp16"]),
            "help": "Read *.fp16.safetensors where a part has full precision too.",
        },
    ),
    (
        "--config",
        {
            "metavar": "DIR",
            "help": "Folder or hub id: configs and tokenizer of a MODEL that is one safetensors file.",
        },
    ),
)


def change_options(function: F) -> F:
    """The options, as one keyword argument ``changes``: what ``opened`` takes."""
    names = [flag.removeprefix("--") for flag, _ in _OPTIONS]

    def gathered(**arguments: Any) -> Any:
        changes = {name: arguments.pop(name) for name in names}
        return function(changes=changes, **arguments)

    gathered.__doc__, gathered.__name__ = function.__doc__, function.__name__
    gathered.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    decorated: Any = gathered
    for flag, options in reversed(_OPTIONS):
        decorated = click.option(flag, **options)(decorated)
    return decorated


def any_given(changes: dict[str, Any]) -> bool:
    return any(changes.values())


@contextmanager
def opened(model: str | Path, changes: dict[str, Any]) -> Iterator[Checkpoint]:
    """The checkpoint, changed as asked; what did not match is a warning each, by name.

    Raises what Checkpoint.open and edgeflow.derive.derive raise.
    """
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.derive import Changes, derived
    from edgeflow.lora import Lora

    asked = Changes(
        graft=changes["graft"],
        base=changes["base"],
        loras=tuple(map(Lora.parse, changes["lora"])),
        decoder=changes["decoder"],
    )
    checkpoint = Checkpoint.open(model, variant=changes["variant"], config=changes["config"])
    with derived(checkpoint, asked) as result:
        for line in result.unmatched:
            log.warning("not matched: %s", line)
        yield result.checkpoint
