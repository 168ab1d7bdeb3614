"""Straightness and transport cost: known paths, the teacher's rescaling, the identity that ties the two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeflow.cli import main
from edgeflow.generate import open_model
from edgeflow.training import flow, straightness
from edgeflow.training.drawing import Drawer
from edgeflow.training.models import dpm_solver
from edgeflow.training.pair_shards import FACTS, Shard, shard_path, write_shard
from edgeflow.training.sampling import seeded_noise


def test_a_right_angle_on_unequal_times() -> None:
    """(0,0) → (1,0) by τ = ¼, then → (1,1): velocities (4,0) and (0,4/3) against the chord (1,1)."""
    corner = [torch.tensor(p).view(1, 2, 1, 1) for p in ([0.0, 0.0], [1.0, 0.0], [1.0, 1.0])]
    path = flow.Path((0.0, 0.25, 1.0), tuple(corner))
    assert path.transport.item() == pytest.approx(2)
    assert path.straightness.item() == pytest.approx(0.25 * (3**2 + 1) + 0.75 * (1 + (1 / 3) ** 2))


def test_straightness_is_the_path_s_energy_less_its_chord_s() -> None:
    """∫‖v‖² − ‖∫v‖²: the same figure by another formula, on a rotation, whose speed is known."""
    noise = torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64) * math.pi / 2

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ turn.T).view_as(x)

    path = flow.euler_path(velocity, noise, 4000)
    radius = noise.square().sum((1, 2, 3))  # a quarter turn: the chord is √2·r, the speed r·π/2
    torch.testing.assert_close(path.transport, 2 * radius, rtol=2e-3, atol=0)
    torch.testing.assert_close(path.straightness, (math.pi**2 / 4 - 2) * radius, rtol=5e-3, atol=0)
    assert torch.equal(path.points[-1], flow.euler(velocity, noise, 4000))


class EpsilonOfOnePoint(nn.Module):
    """The exact ε-network of data that is the one latent ``c``: ε = (x − α·c)/σ."""

    dtype = torch.float32

    def __init__(self, c: float):
        super().__init__()
        self.c, self.alpha_bar = c, dpm_solver().alphas_cumprod

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> SimpleNamespace:
        a = self.alpha_bar[int(t)]
        return SimpleNamespace(sample=(x - a.sqrt() * self.c) / (1 - a).sqrt())


def test_the_teachers_path_to_one_point_is_a_straight_line() -> None:
    """In the flow's coordinates z_τ = τ·c + (1−τ)·x₀ for all τ of the schedule, wherever the solver stops."""
    c, noise = 1.5, torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    parts = SimpleNamespace(unet=EpsilonOfOnePoint(c))
    text = torch.zeros(8, 1, 1)
    path = straightness.teacher_path(parts, text, text[:1], noise, steps=25, guidance=3.0)  # type: ignore[arg-type]
    assert len(path.tau) == 27 and path.tau[0] == 0 and path.tau[-1] == 1
    assert list(path.tau) == sorted(path.tau)
    a = float(dpm_solver().alphas_cumprod[-1])
    assert path.tau[1] == pytest.approx(a**0.5 / (a**0.5 + (1 - a) ** 0.5), rel=1e-4)  # 0.064: no pure noise
    start = (noise - a**0.5 * c) / (1 - a) ** 0.5  # what x₀ must be, were the noise x at the schedule's end
    for tau, z in zip(path.tau[1:], path.points[1:], strict=True):
        torch.testing.assert_close(z, tau * c + (1 - tau) * start, atol=2e-4, rtol=0)
    assert torch.equal(path.points[0], noise)
    torch.testing.assert_close(path.transport, (c - noise).square().sum((1, 2, 3)), rtol=1e-4, atol=1e-3)
    # Two straight pieces: to the schedule's end, and from there; c is far from 0, so they meet at an angle.
    chord, first = c - noise, (path.points[1] - noise) / path.tau[1]
    pieces = path.tau[1] * (chord - first).square() + (1 - path.tau[1]) * (chord - (c - start)).square()
    torch.testing.assert_close(path.straightness, pieces.sum((1, 2, 3)), rtol=1e-3, atol=0)
    assert torch.equal(path.bends.sum(0), path.straightness)
    torch.testing.assert_close(
        path.bends[0], path.tau[1] * (chord - first).square().sum((1, 2, 3)), rtol=1e-4, atol=0
    )


def test_identity_on_a_trained_flow() -> None:
    """E‖X₁−X₀‖² − E‖Z₁−Z₀‖² = S(Z) + V, V = ∫E‖X₁ − X₀ − v(X_τ, τ)‖²dτ, for a network trained in seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 700)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([x.flatten(1), 1 - t[:, None] / 1000], 1)).view_as(x)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        """Noise, and one of two far clusters."""
        side = torch.randint(2, (count, 1)) * 4.0 - 2.0
        latent = torch.cat([side, torch.zeros(count, 1)], 1) + 0.3 * torch.randn(count, 2)
        return torch.randn(count, 2, 1, 1), latent.view(count, 2, 1, 1)

    def error(count: int) -> Tensor:
        noise, latent = draw(count)
        tau = torch.rand(count)
        x = flow.interpolate(noise, latent, tau)
        return (velocity(x, flow.timestep(tau)) - (latent - noise)).square().flatten(1).sum(1).mean()

    for _ in range(700):
        optimizer.zero_grad()
        error(256).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        noise, latent = draw(10000)
        coupled = (latent - noise).square().flatten(1).sum(1).mean().item()
        path = flow.euler_path(velocity, noise, 50)
        bent, moved = path.straightness.mean().item(), path.transport.mean().item()
        unexplained = error(50_000).item()
    assert coupled - moved == pytest.approx(bent + unexplained, rel=0.05)
    assert bent > 0.02 * moved and moved < coupled  # it bends, and its coupling is the cheaper one


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / FACTS).write_text("{}")
    latent = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)).half()
    captions = ["red apple", "cat"] * 3
    write_shard(
        shard_path(folder, 0), 0, Shard(np.arange(40, 46), captions, latent.numpy()), np.ones(6, np.float32)
    )
    return folder


def test_the_sample_is_of_the_pairs_noise_and_captions(pairs: Path) -> None:
    captions, noise, stored = straightness.sample_of(pairs, 3)
    assert captions == ["red apple", "red apple", "cat"]  # pairs 0, 2 and 5, spread over the folder
    assert torch.equal(noise, seeded_noise(torch.tensor([40, 42, 45]), (4, 8, 8)))
    latent = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)).half().float()
    expected = (latent[[0, 2, 5]] - noise).square().flatten(1).sum(1).mean().item()
    assert stored == pytest.approx(expected, rel=1e-5)


def test_command(pairs: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step's cost is that of the network's output itself."""
    argv = [str(tiny_checkpoint), "--pairs", str(pairs), "--num", "6", "--device", "cpu"]
    assert main([*argv, "--json"], straightness.command, "straightness") == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["straightness"] is None and row["num_paths"] == 6
    from edgeflow.training.corpus import caption_states
    from edgeflow.training.models import load_parts

    parts = load_parts(tiny_checkpoint)
    captions, noise, _ = straightness.sample_of(pairs, 6)
    with torch.no_grad():
        text = caption_states(parts, captions, torch.device("cpu"))
        v = parts.unet(noise, torch.full((6,), 1000.0), text).sample
    assert row["transport"] == pytest.approx(v.square().flatten(1).sum(1).mean().item(), rel=1e-5)
    assert row["transport_per_coordinate"] == pytest.approx(row["transport"] / 256)
    assert main(argv, straightness.command, "straightness") == 0
    assert "6 pairs as stored" in capsys.readouterr().out
    assert main(["nowhere", "--pairs", str(pairs)], straightness.command, "straightness") == 2


def test_a_flow_of_several_steps_has_its_euler_paths_straightness(pairs: Path, tiny_checkpoint: Path) -> None:
    captions, noise, _ = straightness.sample_of(pairs, 6)
    drawer = Drawer(open_model(tiny_checkpoint), 4, 0.0)
    whole = straightness.measure(drawer, captions, noise, torch.device("cpu"))
    halves = straightness.measure(drawer, captions, noise, torch.device("cpu"), batch_size=3)
    assert whole.straightness is not None and whole.straightness > 0
    assert halves.straightness == pytest.approx(whole.straightness, rel=1e-5)
    assert halves.transport == pytest.approx(whole.transport, rel=1e-5)
    assert whole.bend == pytest.approx(whole.straightness / whole.transport)
