"""Distribution matching: its gradient on Gaussians that can be worked out, and whose gradient goes where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from edgeflow.errors import ConfigError, UsageError
from edgeflow.training.config import LoopConfig
from edgeflow.training.dmd import DmdConfig, DmdObjective, denoised, matching_gradient
from edgeflow.training.models import dpm_solver
from edgeflow.training.pairs import Pairs
from edgeflow.training.parallel import Processes
from edgeflow.training.step import Step
from tests.conftest import build_tiny_checkpoint

CPU = torch.device("cpu")
LOOP = LoopConfig(steps=5, batch_size=4, learning_rate=1e-3, warmup_steps=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A many-step model with the autoencoder and text encoder of ``tiny_checkpoint``: the same seed."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("teacher") / "tiny", kind="diffusion")


def objective(checkpoint: Path, teacher: Path, **settings: object) -> DmdObjective:
    generator = torch.Generator().manual_seed(0)
    noise, latent = torch.randn(2, 12, 4, 8, 8, generator=generator)
    captions = ["a cat", "a dog", "a bird"]
    pairs = Pairs(noise, latent, torch.arange(12) % 3, captions, torch.arange(12))
    return DmdObjective(DmdConfig(LOOP, **settings), checkpoint, teacher, pairs, CPU)  # type: ignore[arg-type]


# --- the gradient ---------------------------------------------------------------------------------------


def test_denoised_is_what_diffusers_scheduler_makes_of_a_prediction() -> None:
    x, predicted = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    for kind in ("epsilon", "v_prediction"):
        solver = DPMSolverMultistepScheduler.from_config(dpm_solver().config, prediction_type=kind)
        solver.set_timesteps(10)
        for index, t in enumerate(solver.timesteps.tolist()):
            solver._step_index = index
            wanted = solver.convert_model_output(predicted, sample=x)
            alpha_bar = solver.alphas_cumprod[t].double().view(1, 1, 1, 1)
            got = denoised(predicted, x, alpha_bar, velocity=kind == "v_prediction")
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha_bar", [0.05, 0.5, 0.95])
def test_between_two_gaussians_the_gradient_leads_from_one_mean_to_the_other(alpha_bar: float) -> None:
    """Pictures N(a, 1) drawn, N(b, 1) wanted, both denoisers exact: fake − real = (1 − ᾱ)(a − b), whatever
    the picture; and its weight is one over the mean of |x − E[x | noisy]| under the teacher."""
    torch.manual_seed(0)
    a, b, bar = 0.7, -0.4, torch.full((6, 1, 1, 1), alpha_bar, dtype=torch.float64)
    drawn = a + torch.randn(6, 4, 8, 8, dtype=torch.float64)
    noisy = bar.sqrt() * drawn + (1 - bar).sqrt() * torch.randn_like(drawn)

    def of(mean: float) -> Tensor:
        """The exact ε of N(mean, 1) diffused: √(1−ᾱ) times the distance to the noisy mean, of variance 1."""
        return (1 - bar).sqrt() * (noisy - bar.sqrt() * mean)

    real, fake = (denoised(of(mean), noisy, bar, velocity=False) for mean in (b, a))
    gradient = matching_gradient(drawn, real, fake)
    weight = 1 / (drawn - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, (weight * (1 - bar) * (a - b)).expand_as(drawn))


def test_following_the_gradient_brings_a_drawn_gaussian_onto_the_wanted_one() -> None:
    """The whole rule on what can be solved: a generator x = m + s·z with exact denoisers of N(m, s²) and of
    N(2, 0.5²) ends at 2 and 0.5."""
    torch.manual_seed(0)
    mean, spread = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam([mean, spread], lr=0.02)
    alpha_bars = dpm_solver().alphas_cumprod

    def clean(noisy: Tensor, bar: Tensor, m: Tensor, s: Tensor) -> Tensor:
        """E[x | noisy] for x of N(m, s²)."""
        return m + s.square() * bar.sqrt() / (bar * s.square() + 1 - bar) * (noisy - bar.sqrt() * m)

    for _ in range(1500):
        drawn = mean + spread * torch.randn(256, 1, 1, 1)
        x = drawn.detach()
        bar = alpha_bars[torch.randint(20, 980, (256,))].view(-1, 1, 1, 1)
        noisy = bar.sqrt() * x + (1 - bar).sqrt() * torch.randn_like(x)
        real = clean(noisy, bar, torch.tensor([2.0]), torch.tensor([0.5]))
        fake = clean(noisy, bar, mean.detach(), spread.detach())
        # without the per-sample weight, which a sample of one element would make a sign
        optimizer.zero_grad()
        (0.5 * (drawn - (x - (fake - real))).square().mean()).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(2.0, abs=0.1)
    assert abs(spread.item()) == pytest.approx(0.5, abs=0.1)


# --- the stage ------------------------------------------------------------------------------------------


def test_a_fake_network_that_is_the_teacher_gives_no_gradient(tiny_checkpoint: Path, teacher: Path) -> None:
    """At its first step, without guidance: the two denoisers are one, and the student stays where it is."""
    subject = objective(tiny_checkpoint, teacher, guidance=1.0, latent_weight=0.0)
    losses = subject.loss()
    assert losses["matching"].item() == 0.0
    losses["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in subject.trained["unet"].parameters())
    guided = objective(tiny_checkpoint, teacher, guidance=3.0, latent_weight=0.0)
    assert guided.loss()["matching"].item() > 0


def test_each_sides_loss_reaches_its_own_side_alone(tiny_checkpoint: Path, teacher: Path) -> None:
    subject = objective(tiny_checkpoint, teacher)
    unet, fake = (list(subject.trained[n].parameters()) for n in ("unet", "fake"))
    losses = subject.loss()
    losses["fake"].backward(retain_graph=True)
    assert all(p.grad is None for p in unet) and any(p.grad is not None for p in fake)
    subject.trained.zero_grad(set_to_none=True)
    (losses["matching"] + losses["latent"]).backward()
    assert all(p.grad is None for p in fake) and any(p.grad is not None for p in unet)
    assert not any(p.requires_grad for p in subject.score.parameters())


def test_guidance_is_the_rule_that_the_teacher_is_drawn_with(tiny_checkpoint: Path, teacher: Path) -> None:
    subject = objective(tiny_checkpoint, teacher, guidance=3.0)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 700.0]), subject.text[:2]
    given, without = (subject.score(x, t, s).sample for s in (text, subject.empty.expand_as(text)))
    torch.testing.assert_close(
        subject._guided(x, t, text), without + 3 * (given - without), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("fraction", "is_zero"), [(0.0, True), (1.0, False)])
def test_only_the_pairs_own_noise_is_held_to_their_latents(
    tiny_checkpoint: Path, teacher: Path, fraction: float, is_zero: bool
) -> None:
    subject = objective(tiny_checkpoint, teacher, paired_fraction=fraction)
    assert (subject.loss()["latent"].item() == 0.0) is is_zero


def test_the_loop_steps_both_sides_and_averages_the_student_alone(
    tiny_checkpoint: Path, teacher: Path
) -> None:
    subject = objective(tiny_checkpoint, teacher, fake_rate=3.0)
    step = Step(subject, LOOP, Processes.current(CPU))
    before = {k: v.clone() for k, v in subject.trained.state_dict().items()}
    step.run(1, 1e-3, 0.9)
    after = subject.trained.state_dict()
    assert list(subject.averaged) == ["unet"]
    for name, rate in (("unet", 1e-3), ("fake", 3e-3)):  # AdamW's first step moves by the rate itself
        moved = max((after[k] - before[k]).abs().max().item() for k in before if k.startswith(name))
        assert moved == pytest.approx(rate, rel=0.05)
    names = ["loss", "matching", "fake", "latent", "grad_norm_unet", "grad_norm_fake"]
    assert list(step.take_means()) == names


def test_a_teacher_of_other_latents_or_text_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = build_tiny_checkpoint(tmp_path / "other", seed=1, kind="diffusion")
    with pytest.raises(UsageError, match=r"train dmd: --score .*: expected the vae of --from, got another"):
        objective(tiny_checkpoint, other)
    with pytest.raises(ConfigError, match="paired_fraction: expected 0 to 1, got 2"):
        DmdConfig(LOOP, paired_fraction=2.0)
