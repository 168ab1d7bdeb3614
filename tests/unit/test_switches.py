"""The switches of reflow and distill: each changes its own thing, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeflow.errors import ConfigError
from edgeflow.training import flow
from edgeflow.training.config import LoopConfig
from edgeflow.training.distill import DistillConfig, DistillObjective
from edgeflow.training.losses import latent_distance, pseudo_huber
from edgeflow.training.pairs import Pairs
from edgeflow.training.reflow import ReflowConfig, ReflowObjective

CPU = torch.device("cpu")
LOOP = LoopConfig(steps=5, batch_size=4, learning_rate=1e-3)


def pairs() -> Pairs:
    noise, latent = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Pairs(noise, latent, torch.arange(6) % 2, ["a cat", "a dog"], torch.arange(6))


def test_times_are_of_the_density_that_is_named() -> None:
    torch.manual_seed(0)
    uniform, ushaped = (flow.times_of(kind, *torch.rand(2, 20000)) for kind in ("uniform", "u-shaped"))
    cells = torch.linspace(0, 1, 6)
    torch.testing.assert_close(
        torch.histogram(uniform, cells).hist / 20000, torch.full((5,), 0.2), atol=0.01, rtol=0
    )
    shares = torch.histogram(ushaped, cells).hist / 20000
    # ∫ of (e^{4t} + e^{4(1−t)})·2/(e⁴ − 1) over the cell, by hand for the first and the middle one
    e = torch.exp(torch.tensor([0.0, 0.8, 1.6, 2.4, 3.2, 4.0]))
    mass = (e[1:] - e[:-1]) / (e[-1] - 1)
    torch.testing.assert_close(shares, (mass + mass.flip(0)) / 2, atol=0.01, rtol=0)


def test_norms_are_those_that_are_named() -> None:
    a, b = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(latent_distance("l2", a, b), torch.nn.functional.mse_loss(a, b))
    assert torch.equal(latent_distance("huber", a, b), pseudo_huber(a, b))


def test_the_objectives_obey_their_switches(tiny_checkpoint: Path) -> None:
    def first(loss: str, times: str = "u-shaped") -> dict[str, float]:
        torch.manual_seed(3)
        subject = ReflowObjective(ReflowConfig(LOOP, loss=loss, times=times), tiny_checkpoint, pairs(), CPU)
        torch.manual_seed(3)
        return {k: v.item() for k, v in subject.loss().items()}

    huber, l2, uniform = first("huber"), first("l2"), first("l2", "uniform")
    assert l2["loss"] == pytest.approx(l2["mse"]) and huber["mse"] == pytest.approx(l2["mse"])
    assert huber["loss"] < l2["loss"] and uniform["mse"] != l2["mse"]
    config = DistillConfig(LOOP, loss="l2")
    subject = DistillObjective(config, tiny_checkpoint, pairs(), CPU)
    torch.manual_seed(3)
    latent = subject.loss()["latent"].item()
    torch.manual_seed(3)
    index = torch.randint(6, (4,))
    text = subject.text[subject.pairs.caption[index]]
    noise, wanted = subject.pairs.noise[index], subject.pairs.latent[index]
    with torch.no_grad():
        drawn = flow.euler(lambda x, t: subject.trained["unet"](x, t, text).sample, noise, 1)
    assert latent == pytest.approx((drawn - wanted).square().mean().item(), rel=1e-4)


def test_a_word_that_is_no_choice_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="times: expected u-shaped or uniform, got 'v-shaped'"):
        ReflowConfig(LOOP, times="v-shaped")
    with pytest.raises(ConfigError, match="loss: expected huber or l2, got 'l1'"):
        DistillConfig(LOOP, loss="l1")
