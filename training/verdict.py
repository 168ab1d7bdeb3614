"""Measuring a verdict: bundles in their own runtimes, quantized checkpoints in torch, against one model.

Every model draws the same prompts from the same noise. Differences to the model and their intervals come from
edgeflow.training.paired; what they mean is in edgeflow/verdict.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeflow import __version__
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import DataError, UsageError
from edgeflow.generate import backend_version, default_runtime
from edgeflow.measure import distinct_names, precision_of, sizes_of
from edgeflow.metrics import psnr_db
from edgeflow.parity_reference import find_checkpoint
from edgeflow.quality import Data
from edgeflow.training import paired
from edgeflow.training.agreement import Agreement
from edgeflow.training.dataset import open_dataset
from edgeflow.training.distances import cosine_distance
from edgeflow.training.drawing import Drawer, open_drawers
from edgeflow.training.features import EfficientNetLite2
from edgeflow.verdict import (
    FIGURES,
    Change,
    Close,
    Layer,
    VerdictReport,
    VerdictRow,
    VerdictSettings,
    WorstPicture,
)
from edgeflow.verdict_layers import graphs_of, layers_of

_MIN_PROMPTS = 8
_NUM_WORST = 16

#: Opens a step of the work: its name and how many pictures it is over; gives what is told of each done.
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Request:
    """What to judge. ``num_prompts`` None takes the whole split."""

    models: Sequence[str]
    against: str
    data: Path
    split: str = "test"
    num_prompts: int | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Judged:
    """The report, and the pictures it is about: uint8 (N, 3, S, S), picture i of ``prompts[i]``."""

    report: VerdictReport
    prompts: list[str]
    seeds: list[int]
    real: NDArray[np.uint8]
    model: NDArray[np.uint8]
    drawn: tuple[NDArray[np.uint8], ...]  # by row of the report


@dataclass(frozen=True)
class _View:
    """One model's pictures, as the judging network sees them; a value or a row a prompt."""

    pictures: Tensor
    features: Tensor
    hits: Tensor
    to_real: Tensor
    kid: NDArray[np.float64]  # by resample, the first being every prompt once
    fd: NDArray[np.float64]


def judge(request: Request, progress: Progress) -> Judged:
    """Draw with every model, then compare. Raises EdgeflowError for anything a user can mend."""
    settings = VerdictSettings(seed=request.seed, features=EfficientNetLite2.name)
    drawers = open_drawers([request.against, *request.models])
    _expect_comparable(drawers)
    names = distinct_names([request.against, *request.models], [d.name for d in drawers])
    prompts, real, eyes, notes = _prepare(request, drawers[0].picture_size, settings, progress)
    seeds = [request.seed + i for i in range(len(prompts))]
    device = torch.device(request.device)
    views = [
        eyes.view(d.draw(prompts, seeds, device, progress(f"drawing {name}", len(seeds))))
        for d, name in zip(drawers, names, strict=True)
    ]
    base, *others = (_described(d, name, drawers) for d, name in zip(drawers, names, strict=True))
    base = replace(base, figures=_figures(views[0]))
    rows = tuple(
        replace(row, **_compared(view, views[0], eyes, prompts, seeds))
        for row, view in zip(others, views[1:], strict=True)
    )
    data = Data(request.data.name, request.split, len(prompts), 0, drawers[0].picture_size)
    report = VerdictReport(data, settings, base, rows, _versions(drawers), tuple(notes))
    drawn = tuple(view.pictures.numpy() for view in views[1:])
    return Judged(report, prompts, seeds, real.numpy(), views[0].pictures.numpy(), drawn)


def _expect_comparable(drawers: Sequence[Drawer]) -> None:
    shapes = {(d.picture_size, d.latent_shape) for d in drawers}
    if len(shapes) > 1:
        sizes = ", ".join(f"{d.name} {d.picture_size}" for d in drawers)
        raise UsageError(f"quality: --against: expected models of one picture and latent size, got: {sizes}")


class _Eyes:
    """The network that judges, the real pictures as it sees them, and the resamples of the prompts."""

    def __init__(
        self,
        net: EfficientNetLite2,
        real: Tensor,
        agreement: Agreement,
        prompts: list[str],
        s: VerdictSettings,
    ):
        self.net, self._agreement, self._settings = net, agreement, s
        self.real, together = net.layers(real)
        self._texts = agreement.captions(prompts)
        whole = torch.ones(1, len(real), dtype=torch.float64)
        self.weights = paired.resamples(len(real), s.resamples, s.seed)
        self._all = torch.cat([whole, self.weights])
        self._some = self._all[: 1 + s.frechet_resamples]
        self._kid, self._fd = paired.KernelDistance(self.real), paired.Frechet(self.real)
        self.real_hits = self._hits(together)

    def view(self, pictures: Tensor) -> _View:
        features, together = self.net.layers(pictures)
        return _View(
            pictures=pictures,
            features=features,
            hits=self._hits(together),
            to_real=cosine_distance(self.real, features),
            kid=self._kid(features, self._all),
            fd=self._fd(features, self._some),
        )

    def _hits(self, together: Tensor) -> Tensor:
        pictures = self._agreement.pictures(together)
        return paired.hit_chances(pictures, self._texts, self._settings.candidates)


def _prepare(
    request: Request, size: int, settings: VerdictSettings, progress: Progress
) -> tuple[list[str], Tensor, _Eyes, list[str]]:
    """Prompts, their real pictures, what judges, and notes on pictures that cannot be used."""
    dataset = open_dataset(request.data)
    train = dataset.load("train", size)
    chosen = train if request.split == "train" else dataset.load(request.split, size)
    index = np.arange(len(chosen))
    if request.num_prompts is not None and request.num_prompts < len(chosen):
        index = np.sort(
            np.random.default_rng(request.seed).choice(len(chosen), request.num_prompts, replace=False)
        )
    if len(index) < _MIN_PROMPTS:
        raise DataError(
            f"quality: {request.data}: expected at least {_MIN_PROMPTS} prompts, got {len(index)}"
        )
    problems = {"train": train.problems, request.split: chosen.problems}
    notes = [
        f"{len(found)} pictures of split {name!r} cannot be used, the first: {found[0]}"
        for name, found in problems.items()
        if found
    ]
    prompts = [chosen.captions[i] for i in index]
    kept = np.setdiff1d(np.arange(len(train)), index) if request.split == "train" else np.arange(len(train))
    net = EfficientNetLite2(torch.device(request.device))
    done = progress("training pictures", len(kept))
    seen = []
    for batch in torch.from_numpy(train.images[kept]).split(64):
        seen.append(net.layers(batch)[1])
        done(len(batch))
    captions = [train.captions[i] for i in kept]
    agreement = Agreement(torch.cat(seen), captions, seed=settings.seed, steps=settings.agreement_steps)
    real = torch.from_numpy(chosen.images[index])
    return prompts, real, _Eyes(net, real, agreement, prompts, settings), notes


def _figures(view: _View) -> dict[str, float]:
    return {
        "kid": float(view.kid[0]),
        "fd": float(view.fd[0]),
        "r_at_1": float(view.hits.mean()),
        "real_distance": float(view.to_real.mean()),
    }


def _compared(
    view: _View, base: _View, eyes: _Eyes, prompts: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """A row's figures, changes, closeness and worst pictures."""
    intervals = {
        "kid": paired.around(float(view.kid[0] - base.kid[0]), view.kid[1:] - base.kid[1:]),
        "fd": paired.around(float(view.fd[0] - base.fd[0]), view.fd[1:] - base.fd[1:]),
        "r_at_1": paired.mean_change(view.hits, base.hits, eyes.weights),
        "real_distance": paired.mean_change(view.to_real, base.to_real, eyes.weights),
    }
    changes = {
        name: Change.of(i.value, i.low, i.high, more_is_better=bool(FIGURES[name].more_is_better))
        for name, i in intervals.items()
    }
    pairs = zip(base.pictures.numpy(), view.pictures.numpy(), strict=True)
    psnr = np.array([psnr_db(a, b, 255.0) for a, b in pairs])
    distance = cosine_distance(base.features, view.features)
    return {
        "figures": _figures(view),
        "changes": changes,
        "closeness": _closeness(view, base, psnr, distance, eyes),
        "worst": tuple(
            WorstPicture(prompts[i], seeds[i], float(psnr[i]), float(distance[i]))
            for i in np.argsort(psnr, kind="stable")[:_NUM_WORST].tolist()
        ),
    }


def _closeness(
    view: _View, base: _View, psnr: NDArray[np.float64], distance: Tensor, eyes: _Eyes
) -> dict[str, Close]:
    fd_ratio = paired.around(float(view.fd[0] / base.fd[0]), view.fd[1:] / base.fd[1:])
    found = {
        "psnr_worst_db": paired.Interval(float(psnr.min()), float(psnr.min()), float(psnr.min())),
        "psnr_median_db": paired.percentile(_middle, psnr, eyes.weights),
        "distance": paired.mean_change(distance, torch.zeros_like(distance), eyes.weights),
        "fd_ratio": fd_ratio,
    }
    return {name: Close(i.value, i.low, i.high) for name, i in found.items()}


def _middle(values: NDArray[np.float64]) -> float:
    """The lower of the two middle values where their number is even: a value that was measured."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _described(drawer: Drawer, name: str, everyone: Sequence[Drawer]) -> VerdictRow:
    """What a model is, before anything is measured."""
    model: Bundle | Checkpoint = drawer.model
    runtime = default_runtime(model)
    whole, graphs = sizes_of(model)
    bundle = isinstance(model, Bundle)
    recipe: Mapping[str, Any] | None = (
        model.manifest.recipe if isinstance(model, Bundle) else (model.quantization or {}).get("recipe")
    )
    return VerdictRow(
        name=name,
        checkpoint=model.generation.checkpoint_hash,
        kind="bundle" if bundle else drawer.kind,
        runtime=runtime,
        backend=backend_version(runtime),
        precision=precision_of(model),
        recipe=recipe,
        bytes=whole,
        graph_bytes=graphs,
        figures={},
        graphs=graphs_of(model),
        layers=_layers(model, [d.model for d in everyone if isinstance(d.model, Checkpoint)]),
    )


def _layers(model: Bundle | Checkpoint, known: Sequence[Checkpoint]) -> tuple[Layer, ...]:
    """The quantized layers, a bundle's from the checkpoint that it was exported from where that is here.

    ``known`` are the checkpoints at hand; the float one among them gives each weight's SQNR.
    """
    by_hash = {checkpoint.hash: checkpoint for checkpoint in known}
    if isinstance(model, Bundle):
        if model.manifest.recipe is None:
            return ()
        found = by_hash.get(model.generation.checkpoint_hash) or find_checkpoint(model, None)[0]
        if found is None:
            return ()
        model = found
    source = (model.quantization or {}).get("source", {}).get("hash")
    return layers_of(model, by_hash.get(source))


def _versions(drawers: Sequence[Drawer]) -> dict[str, str]:
    packages = {"torch", "numpy", *({"onnx": "onnxruntime"}.get(r, r) for r in map(_runtime, drawers))}
    return {"edgeflow": __version__, **{name: version(name) for name in sorted(packages)}}


def _runtime(drawer: Drawer) -> str:
    return default_runtime(drawer.model)
