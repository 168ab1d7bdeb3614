"""The adversarial stage's parts: whose gradient goes where, the losses' values, one draw for both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeflow.errors import ConfigError, UsageError
from edgeflow.training.adversarial import AdversarialConfig, AdversarialObjective
from edgeflow.training.augmentation import KINDS, UNIFORMS, Augmentation
from edgeflow.training.config import LoopConfig
from edgeflow.training.corpus import Corpus
from edgeflow.training.discriminator import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    mismatch_loss,
)
from edgeflow.training.pairs import Pairs
from edgeflow.training.parallel import Processes
from edgeflow.training.step import Step

CPU = torch.device("cpu")
LOOP = LoopConfig(steps=5, batch_size=4, learning_rate=1e-3, warmup_steps=1)


def pairs(captions: list[str], count: int = 12) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    noise, latent = torch.randn(2, count, 4, 8, 8, generator=generator)
    return Pairs(noise, latent, torch.arange(count) % len(captions), captions, torch.arange(count))


def objective(checkpoint: Path, **settings: object) -> AdversarialObjective:
    config = AdversarialConfig(LOOP, **{"adversarial_warmup": 0, **settings})  # type: ignore[arg-type]
    return AdversarialObjective(config, checkpoint, pairs(["a cat", "a dog", "a bird"]), None, CPU)


def heads_and_features() -> tuple[Discriminator, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    heads = Discriminator((8, 16), text_width=12, width=16)
    real = [torch.randn(4, 8, 6, 6), torch.randn(4, 16, 3, 3)]
    drawn = [torch.randn_like(x).requires_grad_() for x in real]
    return heads, real, drawn, torch.randn(4, 12)


# --- whose gradient goes where --------------------------------------------------------------------------


def test_each_sides_loss_reaches_its_own_side_alone() -> None:
    heads, real, drawn, text = heads_and_features()
    judged = heads(real, text, drawn, text, mismatched=True)
    generator_loss(judged.drawn).backward(retain_graph=True)
    assert all(p.grad is None for p in heads.parameters())
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in drawn)
    for x in drawn:
        x.grad = None
    (discriminator_loss(judged.real, judged.fake) + mismatch_loss(judged.mismatched)).backward()
    assert all(x.grad is None for x in drawn)
    assert all(p.grad is not None for p in heads.parameters())
    torch.testing.assert_close(judged.fake, judged.drawn)  # the same verdict, but for the gradients


def test_the_unet_moves_as_if_the_discriminator_were_frozen(tiny_checkpoint: Path) -> None:
    """One backward pass of the sum gives each module the gradients of its own losses alone."""
    subject = objective(tiny_checkpoint)
    unet, heads = subject.trained["unet"], subject.trained["discriminator"]

    def gradients(names: tuple[str, ...]) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        heads.load_state_dict(state)
        torch.manual_seed(1)
        losses = subject.loss()
        weights = {"latent": 1.0, "perceptual": 0.2, "adversarial": 0.1, "discriminator": 1.0}
        subject.trained.zero_grad(set_to_none=True)
        (losses["loss"] if names == ("loss",) else sum(weights[n] * losses[n] for n in names)).backward()
        return [p.grad for p in unet.parameters()], [p.grad for p in heads.parameters()]

    state = {k: v.clone() for k, v in heads.state_dict().items()}
    unet_all, heads_all = gradients(("loss",))
    unet_own, heads_none = gradients(("latent", "perceptual", "adversarial"))
    unet_none, heads_own = gradients(("discriminator",))
    torch.testing.assert_close(unet_all, unet_own)
    torch.testing.assert_close(heads_all, heads_own)
    assert all(g is None for g in (*unet_none, *heads_none))
    unet_distance, _ = gradients(("latent", "perceptual"))
    assert any(not torch.allclose(a, b) for a, b in zip(unet_all, unet_distance, strict=True))


# --- values ---------------------------------------------------------------------------------------------


def test_hinge_losses_are_those_worked_out_by_hand() -> None:
    real = [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0]])]
    fake = [torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0]])]
    # heads: mean(0, 0.5) = 0.25 and 2 → 1.125; mean(0, 1) = 0.5 and 2 → 1.25
    assert discriminator_loss(real, fake).item() == pytest.approx(1.125 + 1.25)
    assert generator_loss(fake).item() == pytest.approx(-(-1.5 + 1.0) / 2)
    assert mismatch_loss(fake).item() == pytest.approx(1.25)


def test_the_discriminator_learns_to_tell_and_to_read() -> None:
    """Bright features are real under caption c, dark ones under −c: only a head that reads can tell."""
    torch.manual_seed(0)
    heads, sign = Discriminator((8,), text_width=4, width=16), torch.tensor([1.0, -1.0]).repeat(8)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    text = sign[:, None] * torch.ones(16, 4)
    for _ in range(150):
        bright = sign[:, None, None, None] * torch.ones(16, 8, 2, 2) / 8**0.5
        noise = 0.05 * torch.randn(2, 16, 8, 2, 2)
        judged = heads([bright + noise[0]], text, [-bright + noise[1]], text)
        optimizer.zero_grad()
        discriminator_loss(judged.real, judged.fake).backward()
        optimizer.step()
    assert judged.real[0].min() > 0 > judged.fake[0].max()
    assert heads.steps.item() == 150
    largest = torch.linalg.matrix_norm(heads.heads[0].look.weight.flatten(1), ord=2)
    assert largest.item() == pytest.approx(1.0, abs=0.05)


def test_a_verdict_is_of_one_picture_and_not_of_how_strong_its_features_are() -> None:
    """What is normalised between the layers: a picture's logits are the same in any batch, and a small
    difference of features is not a small difference of logits."""
    heads, real, _, text = heads_and_features()
    weights = [head.weights() for head in heads.heads]
    for head, own, x in zip(heads.heads, weights, real, strict=True):
        whole, alone = head.judge(own, x, text), head.judge(own, x[:1], text[:1])
        torch.testing.assert_close(whole[:1], alone)
        faint = head.judge(own, 0.01 * (x - x.mean((2, 3), keepdim=True)), text)
        assert faint.std() > 0.2 * whole.std()


# --- augmentation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_draw_changes_two_batches_alike_and_passes_gradients(kind: str) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(6, 3, 16, 16, dtype=torch.float64) * 2 - 1
    draw = Augmentation(torch.rand(8, UNIFORMS, dtype=torch.float64), (kind,)).first(6)
    assert torch.equal(draw.apply(pictures), draw.apply(pictures.clone()))
    assert not torch.allclose(draw.apply(pictures), pictures)
    other = Augmentation(torch.rand(6, UNIFORMS, dtype=torch.float64), (kind,))
    assert not torch.allclose(other.apply(pictures), draw.apply(pictures))
    small = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    two = Augmentation(draw.uniform[:2], draw.kinds)
    assert torch.autograd.gradcheck(two.apply, (small,))


def test_translation_moves_whole_pixels_and_repeats_the_border() -> None:
    picture = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 3, 16, 16)
    uniform = torch.zeros(1, UNIFORMS)
    uniform[0, 3:5] = torch.tensor([0.5, 0.999])  # rows stay, columns move by all of 16/8 pixels
    moved = Augmentation(uniform, ("translation",)).apply(picture)
    assert moved[0, 0, 3].tolist() == [*range(2, 16), 15, 15]
    assert torch.equal(Augmentation(uniform, ()).apply(picture), picture)


def test_cutout_is_one_grey_square() -> None:
    uniform = torch.zeros(1, UNIFORMS)
    uniform[0, 5:7] = 0.5  # a hole of 6 of 16 pixels that starts at ⌊0.5 · 22⌋ − 6 = 5
    cut = Augmentation(uniform, ("cutout",)).apply(torch.ones(1, 3, 16, 16))
    wanted = torch.ones(16, 16)
    wanted[5:11, 5:11] = 0
    assert torch.equal(cut[0, 1], wanted)


# --- the stage ------------------------------------------------------------------------------------------


def test_the_loop_steps_both_sides_and_averages_the_unet_alone(tiny_checkpoint: Path) -> None:
    subject = objective(tiny_checkpoint, discriminator_rate=3.0)
    step = Step(subject, LOOP, Processes.current(CPU))
    before = {k: v.clone() for k, v in subject.trained.state_dict().items()}
    step.run(1, 1e-3, 0.9)
    after = subject.trained.state_dict()
    assert list(subject.averaged) == ["unet"]
    moved = {
        name: max((after[k] - before[k]).abs().max().item() for k in before if k.startswith(name))
        for name in ("unet", "discriminator.heads.0.caption.parametrizations.weight.original")
    }
    # AdamW's first step moves the largest entries by the rate itself.
    assert moved["unet"] == pytest.approx(1e-3, rel=0.05)
    assert moved["discriminator.heads.0.caption.parametrizations.weight.original"] == pytest.approx(
        3e-3, rel=0.05
    )
    assert after["discriminator.steps"] == 1
    assert list(step.take_means()) == [
        *("loss", "latent", "perceptual", "adversarial", "discriminator", "logit_real", "logit_fake"),
        *("grad_norm_unet", "grad_norm_discriminator"),
    ]


def test_the_adversarial_weight_rises_over_the_warmup(tiny_checkpoint: Path) -> None:
    subject = objective(tiny_checkpoint, adversarial_warmup=4, adversarial_weight=0.5, mismatch_weight=0.3)
    for number in (1, 2, 3, 4, 5):
        losses = {k: v.item() for k, v in subject.loss().items()}
        wanted = losses["latent"] + 0.2 * losses["perceptual"] + losses["discriminator"]
        wanted += 0.3 * losses["mismatch"] + 0.5 * min(1.0, number / 4) * losses["adversarial"]
        assert losses["loss"] == pytest.approx(wanted, rel=1e-5)


def test_real_pictures_stand_for_their_share_of_the_real_side(tiny_checkpoint: Path) -> None:
    real = Corpus(
        torch.zeros(5, 3, 32, 32, dtype=torch.uint8), ["a cat", "a fish", "a cat", "x", "y"], list("12345")
    )
    config = AdversarialConfig(LOOP, real_fraction=0.5)
    subject = AdversarialObjective(config, tiny_checkpoint, pairs(["a cat", "a dog"]), real, CPU)
    target, captions = subject.pairs.latent[:4], subject._caption(subject.text[[0, 1, 0, 1]])
    wanted, texts, others = subject._real_side(target, captions)
    assert others == 2 and torch.equal(wanted[:4], target) and torch.equal(texts[:4], captions)
    assert subject.real_latent is not None
    assert all(any(torch.equal(x, y) for y in subject.real_latent) for x in wanted[4:])
    assert subject.real_caption is not None
    torch.testing.assert_close(subject.real_caption[0], captions[0])  # one caption, one condition
    assert torch.isfinite(subject.loss()["loss"])


def test_settings_that_do_not_fit_are_one_sentence(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="augment: expected colour or translation or cutout, got 'zoom'"):
        AdversarialConfig(LOOP, augment=("zoom",))
    with pytest.raises(ConfigError, match="real_fraction: expected 0 to 1"):
        AdversarialConfig(LOOP, real_fraction=1.5)
    with pytest.raises(ConfigError, match="discriminator_width: expected a multiple of 8, got 12"):
        AdversarialConfig(LOOP, discriminator_width=12)
    with pytest.raises(UsageError, match="both or neither, got no --data"):
        objective(tiny_checkpoint, real_fraction=0.5)
