"""Fixtures shared by all tests: a narrow checkpoint of the shipped form, with random weights."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edgeflow.quantization.recipe import Recipe

# A shell ignores SIGINT in what it puts into the background, and so would every process tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CAPTIONS = (
    "grinning face with big eyes, noto style",
    "red apple, twemoji style",
    "sailboat, fluent flat style",
    "cat with tears of joy, emojione style",
)


def build_tiny_checkpoint(folder: Path, seed: int = 0, kind: str = "one-step") -> Path:
    """Write a random checkpoint of 32-pixel pictures and 8×8×4 latents; the same seed, the same bytes."""
    import torch

    from edgeflow.training import models
    from edgeflow.training.vocabulary import train_vocabulary

    shape = models.ModelShape(
        picture_size=32,
        latent_channels=4,
        autoencoder_width=16,
        encoder_blocks=(1, 1, 1),
        decoder_blocks=(1, 1, 1),
        unet_channels=(32, 64),
        unet_layers=1,
        unet_heads=(2, 4),
        unet_attention=(True, False),
        text_width=32,
        text_layers=2,
        text_heads=2,
        vocabulary=600,
        max_tokens=16,
    )
    folder.mkdir(parents=True)
    vocabulary = folder.parent / f"{folder.name}-vocabulary"
    train_vocabulary(CAPTIONS, shape.vocabulary, vocabulary, shape.max_tokens)
    num_tokens = len((vocabulary / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]) + 512 + 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = models.Parts(
            vae=models.build_autoencoder(shape).eval(),
            unet=models.build_unet(shape).eval(),
            text_encoder=models.build_text_encoder(shape, num_tokens).eval(),
            tokenizer_dir=vocabulary,
        )
    facts = {
        "kind": kind,
        "steps": 1 if kind == "one-step" else 25,
        "guidance": 0.0,
        "licence": "Apache-2.0",
        "origin": "edgeflow tests, random weights",
        "picture_size": shape.picture_size,
        "prompts": list(CAPTIONS),
    }
    models.save_parts(parts, folder, facts)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow one-step checkpoint folder. Read-only: copy it before changing anything."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def int4_recipe() -> Recipe:
    """Every layer in int4 whose channels divide into groups, rounded to nearest."""
    from edgeflow.quantization.recipe import parse_recipe

    rules = [
        {"component": part, "pattern": "*", "scheme": "w4g32", "fallback": "w8"}
        for part in ("text_encoder", "unet", "decoder")
    ]
    return parse_recipe({"schema": 1, "name": "int4", "rules": rules}, "int4")
