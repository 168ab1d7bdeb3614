"""Draw many captions with any model: batches in PyTorch for checkpoints, one by one for bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, UsageError
from edgeflow.generate import Generator, load_runtime, open_model
from edgeflow.solvers import scheduler_of
from edgeflow.training import flow
from edgeflow.training.flow_model import caption_states, velocity_field
from edgeflow.training.models import load_parts
from edgeflow.training.pairs import seeded_noise
from edgeflow.training.sampling import decode, sample_teacher

#: Pictures drawn at once: a GPU wants many, a CPU's cache few.
_BATCH_SIZE = {"cuda": 256, "cpu": 16}
#: Told how many pictures more are done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Drawer:
    """One model at one number of steps; the same captions and seeds give the same pictures."""

    model: Bundle | Checkpoint
    steps: int
    guidance: float

    @property
    def name(self) -> str:
        """The checkpoint's name (a training run's: the run's), or the bundle's folder."""
        root = self.model.root
        if isinstance(self.model, Bundle):
            return root.name
        return root.resolve().parent.name if root.name == "checkpoint" else self.model.name

    @property
    def kind(self) -> str:
        return "bundle" if isinstance(self.model, Bundle) else self.model.kind

    @property
    def picture_size(self) -> int:
        return self.model.generation.picture_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.model.generation.latent_shape

    def draw(
        self, captions: Sequence[str], seeds: Sequence[int], device: torch.device, progress: Progress
    ) -> Tensor:
        """uint8 pictures (N, 3, S, S) on the CPU; picture i starts from the noise of ``seeds[i]``."""
        if isinstance(self.model, Bundle) or self.model.quantization is not None:
            return self._draw_singly(captions, seeds, progress)
        if self.model.class_name("vae") != "AutoencoderTiny":
            return self._draw_singly(captions, seeds, progress)
        return torch.cat(list(self._draw_batches(self.model, captions, seeds, device, progress)))

    def _draw_singly(self, captions: Sequence[str], seeds: Sequence[int], progress: Progress) -> Tensor:
        generator = Generator(self.model, load_runtime(self.model))
        pictures = []
        for caption, seed in zip(captions, seeds, strict=True):
            pictures.append(torch.from_numpy(generator.draw(caption, seed).pixels).permute(2, 0, 1))
            progress(1)
        return torch.stack(pictures)

    @torch.no_grad()
    def _draw_batches(
        self,
        checkpoint: Checkpoint,
        captions: Sequence[str],
        seeds: Sequence[int],
        device: torch.device,
        progress: Progress,
    ) -> Iterator[Tensor]:
        batch_size = _BATCH_SIZE[device.type]
        parts = load_parts(checkpoint.root)
        unet, vae = parts.unet.to(device).eval(), parts.vae.to(device).eval()
        text = caption_states(parts, list(captions), device)
        empty = caption_states(parts, [""], device)
        for index in torch.arange(len(captions)).split(batch_size):
            noise = seeded_noise(torch.tensor([seeds[i] for i in index]), self.latent_shape).to(device)
            if checkpoint.kind == "diffusion":
                latents = sample_teacher(
                    unet,
                    text[index],
                    empty,
                    noise,
                    steps=self.steps,
                    guidance=self.guidance,
                    solver=scheduler_of(checkpoint),
                )
            else:
                latents = flow.euler(guided(unet, text[index], empty, self.guidance), noise, self.steps)
            yield decode(vae, latents)
            progress(len(index))


def guided(unet: torch.nn.Module, text: Tensor, empty: Tensor, guidance: float) -> flow.Velocity:
    """The velocity field, with classifier-free guidance where ``guidance`` is above 1 (InstaFlow's rule)."""
    conditional = velocity_field(unet, text)
    if guidance <= 1:
        return conditional
    unconditional = velocity_field(unet, empty.expand_as(text))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + guidance * (conditional(x, t) - without)

    return velocity


#: Euler steps at which a rectified flow's curve is drawn.
NFE_CURVE = (1, 2, 4, 8, 25)


def open_drawers(
    models: Sequence[str | Path], steps: Sequence[int] = (), *, nfe_curve: bool = False
) -> list[Drawer]:
    """One drawer for each model and, for a model of many steps, each number in ``steps`` (or its own number).

    ``nfe_curve`` draws rectified flows at NFE_CURVE besides.
    Raises CheckpointError for an autoencoder alone and for a many-step model whose autoencoder is not the
    kind that training makes, UsageError for steps or a curve asked of no model that has them.
    """
    drawers: list[Drawer] = []
    many = False
    for source in models:
        model = open_model(_checkpoint_of(source))
        if isinstance(model, Bundle):
            drawers.append(Drawer(model, 1, 0.0))
            continue
        model.generation  # noqa: B018  # raises for an autoencoder and for parts that do not fit together
        own = int(model.facts["steps"])
        one_step = model.kind == "one-step"
        if not one_step and model.class_name("vae") != "AutoencoderTiny":
            raise CheckpointError(
                f"quality: {model.root}: expected a one-step model or one with an AutoencoderTiny, "
                f"got kind {model.kind!r} with a {model.class_name('vae')}"
            )
        many = many or not one_step
        counts = {1} if one_step else set(steps) or {own}
        if nfe_curve and model.kind == "rectified-flow":
            counts |= set(NFE_CURVE)
        drawers += [Drawer(model, n, float(model.facts["guidance"])) for n in sorted(counts, reverse=True)]
    if steps and not many:
        raise UsageError(
            "--steps: expected a model of many steps among the models, got one-step models alone"
        )
    if nfe_curve and not any(d.kind == "rectified-flow" for d in drawers):
        raise UsageError("--nfe-curve: expected a model of kind rectified-flow among the models, got none")
    return drawers


def _checkpoint_of(source: str | Path) -> str | Path:
    """A training run's checkpoint, or the source itself."""
    folder = Path(source) / "checkpoint"
    return folder if folder.is_dir() else source
