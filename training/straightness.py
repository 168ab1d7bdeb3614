"""How straight are a model's paths, and how far do they carry? Straightness S and transport cost E‖z₁ − z₀‖².

    python -m edgeflow.training.straightness runs/teacher runs/reflow --pairs runs/pairs

**Flows and one-step models.** The path is the Euler path z_τ of the velocity network from noise z₀.

**The teacher**, which predicts ε on a diffusion's schedule x = α·x₁ + σ·ε, is measured on its own sampler:
DPM-Solver++'s latents with guidance, rescaled into the flow's coordinates by

    z_τ = x/(α + σ),  τ = α/(α + σ),

which turns α·x₁ + σ·x₀ into τ·x₁ + (1−τ)·x₀ whatever the schedule, and the probability-flow ODE of the one
into that of the other. Stable Diffusion's schedule ends at τ = 0.064, where the sampler puts the noise in the
place of x; the path begins at (0, noise), so that its ends are the pair (x₀, x₁) itself and S covers all of
[0, 1]. The first segment's velocity is then within 4 % of −x₀, the field at τ = 0 for latents of mean 0; how
much of S it has is given besides (about 0.064·E‖x₁‖², which is the schedule's doing, not the network's).

Both are measured on the same noise and captions, and both S by the velocities that the sampler took
(``flow.Path``). S is also given as a share of the transport cost, which is scale-free, and the cost per
coordinate. For exact velocities E‖X₁−X₀‖² − E‖Z₁−Z₀‖² = S(Z) + V ≥ 0 (Liu et al., arXiv 2209.03003, equation
15): straightening a coupling cannot make it longer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from edgeflow.cli import main, options
from edgeflow.training import flow
from edgeflow.training.corpus import caption_states
from edgeflow.training.drawing import Drawer, guided, open_drawers
from edgeflow.training.models import Parts, load_parts
from edgeflow.training.pairs import Pairs
from edgeflow.training.run import pick_device
from edgeflow.training.sampling import sample_teacher


@dataclass(frozen=True)
class Geometry:
    """Means over ``num_paths`` paths of ``steps`` segments; squared latent units."""

    num_paths: int
    steps: int
    transport: float  # E‖z₁ − z₀‖², summed over coordinates
    transport_per_coordinate: float
    straightness: float | None  # S; None for a single step, whose one segment is straight by itself
    first_segment: float | None  # how much of S the path's first segment has

    @property
    def bend(self) -> float | None:
        """S as a share of the transport cost."""
        return None if self.straightness is None else self.straightness / self.transport

    def as_dict(self) -> dict[str, float | int | None]:
        return {**asdict(self), "straightness_share": self.bend}


@torch.no_grad()
def teacher_path(
    parts: Parts, text: Tensor, empty: Tensor, noise: Tensor, *, steps: int, guidance: float
) -> flow.Path:
    """DPM-Solver++'s path in the flow's coordinates (see the module), from (0, noise)."""
    tau, points = [0.0], [noise]

    def watch(ratio: float, x: Tensor) -> None:
        """``ratio`` is σ/α; α = 1/√(1 + ratio²), so x/(α + σ) = x·√(1 + ratio²)/(1 + ratio)."""
        tau.append(1 / (1 + ratio))
        points.append(x * ((1 + ratio**2) ** 0.5 / (1 + ratio)))

    sample_teacher(parts.unet, text, empty, noise, steps=steps, guidance=guidance, watch=watch)
    return flow.Path(tuple(tau), tuple(points))


@torch.no_grad()
def measure(
    drawer: Drawer,
    captions: Sequence[str],
    noise: Tensor,
    device: torch.device,
    *,
    parts: Parts | None = None,
    batch_size: int = 256,
) -> Geometry:
    """S and transport cost of a checkpoint's paths from ``noise`` (N, C, h, w) under ``captions``."""
    parts = parts or load_parts(drawer.model.root)
    parts.unet.to(device).eval()
    text = caption_states(parts, list(captions), device)
    empty = caption_states(parts, [""], device)
    bends, moved = [], []
    for index in torch.arange(len(noise)).split(batch_size):
        x = noise[index].to(device)
        if drawer.kind == "diffusion":
            path = teacher_path(parts, text[index], empty, x, steps=drawer.steps, guidance=drawer.guidance)
        else:
            velocity = guided(parts.unet, text[index], empty, drawer.guidance)
            path = flow.euler_path(velocity, x, drawer.steps)
        bends.append(path.bends.double().cpu())
        moved.append(path.transport.double().cpu())
    transport = float(torch.cat(moved).mean())
    by_segment = torch.cat(bends, 1).mean(1)
    many = drawer.steps > 1
    return Geometry(
        num_paths=len(noise),
        steps=drawer.steps,
        transport=transport,
        transport_per_coordinate=transport / noise[0].numel(),
        straightness=float(by_segment.sum()) if many else None,
        first_segment=float(by_segment[0]) if many else None,
    )


def sample_of(pairs: Path, count: int) -> tuple[list[str], Tensor, float]:
    """Captions and noise (N, C, h, w) of ``count`` pairs spread over a folder, and the transport cost of
    those pairs as they are stored: E‖x₁ − x₀‖². Raises DataError."""
    loaded = Pairs.load(pairs, torch.device("cpu"))
    index = torch.linspace(0, len(loaded.noise) - 1, min(count, len(loaded.noise))).round().long()
    noise, latent = loaded.noise[index], loaded.latent[index]
    captions = [loaded.captions[i] for i in loaded.caption[index].tolist()]
    return captions, noise, float((latent - noise).double().square().flatten(1).sum(1).mean())


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example(
        "python -m edgeflow.training.straightness runs/teacher runs/reflow --pairs runs/pairs"
    ),
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Pairs whose noise and captions are the paths' beginnings.",
)
@click.option("--num", type=click.IntRange(2), default=1024, show_default=True, help="How many of them.")
@click.option(
    "--steps", type=click.IntRange(1), multiple=True, metavar="N", help="Draw in N steps; may repeat."
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@options.json_option
@options.verbosity
def command(
    models: tuple[str, ...], pairs: Path, num: int, steps: tuple[int, ...], device: str, as_json: bool
) -> None:
    """Straightness S and transport cost of each MODEL's paths, from the noise and captions of pairs.

    Exit codes: 0 done, 1 failed, 2 usage.
    """
    drawers = open_drawers(models, steps)
    captions, noise, stored = sample_of(pairs, num)
    found = [(d, measure(d, captions, noise, pick_device(device))) for d in drawers]
    if as_json:
        rows = [{"model": d.name, "kind": d.kind, **g.as_dict()} for d, g in found]
        options.print_json({"pairs": {"num": len(noise), "transport": stored}, "rows": rows})
        return
    click.echo(
        f"{len(noise)} pairs as stored: E‖x₁ − x₀‖² = {stored:.1f}, {stored / noise[0].numel():.4f} each"
    )
    for drawer, g in found:
        bent = "" if g.straightness is None else f", S = {g.straightness:.2f} ({g.bend:.4f} of it)"
        click.echo(
            f"{drawer.name}, {drawer.steps} steps: E‖z₁ − z₀‖² = {g.transport:.1f}, "
            f"{g.transport_per_coordinate:.4f} each{bent}"
        )


if __name__ == "__main__":
    sys.exit(main(program=command, name="python -m edgeflow.training.straightness"))
