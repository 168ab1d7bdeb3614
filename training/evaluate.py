"""Quality: a model's pictures against real ones it has not seen, figure by figure.

The prompts are captions of one split of a captioned set: held-out (concept, style) pairs for ``test``. Every
figure that compares two sets also has a floor, the same figure with real pictures in the place of the drawn
ones at the same counts: what is left of a distance when nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeflow import __version__
from edgeflow.errors import DataError, UsageError
from edgeflow.metrics import psnr_db
from edgeflow.quality import Data, QualityReport, Row, Settings, Worst
from edgeflow.training import distances
from edgeflow.training.agreement import Agreement
from edgeflow.training.dataset import Loaded, open_dataset
from edgeflow.training.drawing import Drawer
from edgeflow.training.features import Clip, EfficientNetLite2, FeatureNet, Inception

_COPY_QUANTILE = 0.01
_NUM_WORST = 16


@dataclass(frozen=True)
class Request:
    """What to measure. ``num_prompts`` None takes the whole split."""

    data: Path
    drawers: Sequence[Drawer]
    teacher: Drawer | None = None
    split: str = "test"
    num_prompts: int | None = None
    per_prompt: int = 1  # pictures a caption, each from a seed of its own
    seed: int = 0
    inception: Path | None = None
    clip: Path | None = None
    device: str = "cpu"  # draws, and runs the first feature network; everything after features is on the CPU


@dataclass(frozen=True)
class Measured:
    """The report, and the pictures it is about: uint8 (N, 3, S, S), row i drawn from prompt i.

    With several pictures a caption the captions come round again, each time with the next seeds.
    """

    report: QualityReport
    prompts: list[str]
    seeds: list[int]
    real: Tensor
    drawn: list[Tensor]  # by row of the report
    teacher: Tensor | None


@dataclass(frozen=True)
class _Real:
    """Real pictures: ``own`` are the prompts', ``train`` all of the training split.

    ``own_in_train`` (N,) is where each own picture lies in ``train``, or None where the split is another.
    """

    captions: list[str]
    own: Tensor
    train: Tensor
    train_captions: list[str]
    own_in_train: Tensor | None

    @property
    def reference(self) -> Tensor:
        """Indices of the training pictures that are not the prompts' own."""
        keep = torch.ones(len(self.train), dtype=torch.bool)
        if self.own_in_train is not None:
            keep[self.own_in_train] = False
        return keep.nonzero().flatten()


@dataclass(frozen=True)
class _Space:
    """One feature network's view of the real pictures."""

    net: FeatureNet
    own: Tensor
    train: Tensor


#: Opens a step of the work: its name and how many pictures it is over; gives what is told of each done.
Progress = Callable[[str, int], Callable[[int], None]]


def measure(request: Request, progress: Progress) -> Measured:
    """Draw, then measure every model. Raises EdgeflowError for anything a user can mend."""
    torch.manual_seed(0)  # nothing below draws from it; torchmetrics' subsets fork it
    size = _common_size(request)
    optional: list[FeatureNet] = [Inception(request.inception)] if request.inception else []
    clip = Clip(request.clip) if request.clip else None
    lite = EfficientNetLite2(torch.device(request.device))
    real, notes = _load(request, size)
    rounds = request.per_prompt
    captions, own = real.captions * rounds, real.own.repeat(rounds, 1, 1, 1)
    seeds = [request.seed + i for i in range(len(captions))]
    settings = _settings(request, real, (lite.name, *(n.name for n in optional)))

    judge = _Judge(lite, real, settings, progress)
    spaces = [judge.space, *(_view(net, real, progress) for net in optional)]
    floor = {**judge.floor()}
    for space in spaces:
        floor |= _suffixed(_set_floor(space, real, settings), space, spaces)
    if clip:
        floor["clip_score"] = float(clip.score(real.own, real.captions).mean())

    device = torch.device(request.device)
    everyone = [*request.drawers, *([request.teacher] if request.teacher else [])]
    drawn = [d.draw(captions, seeds, device, progress(f"drawing {d.name}", len(seeds))) for d in everyone]
    taught = drawn.pop() if request.teacher else None
    rows = []
    for drawer, pictures in zip(request.drawers, drawn, strict=True):
        figures, worst = judge.figures(pictures, seeds)
        for space in spaces[1:]:
            figures |= _suffixed(_set_figures(space, real, space.net(pictures), settings), space, spaces)
        if clip:
            figures["clip_score"] = float(clip.score(pictures, captions).mean())
        if taught is not None:
            figures |= teacher_gap(pictures, taught, lite)
        rows.append(_row(drawer, request.teacher, figures, worst, len(pictures)))
    data = Data(request.data.name, request.split, len(real.captions), len(real.reference), size)
    report = QualityReport(data, settings, floor, tuple(rows), _versions(), tuple(notes))
    return Measured(report, captions, seeds, own, drawn, taught)


def _settings(request: Request, real: _Real, features: tuple[str, ...]) -> Settings:
    """A KID subset is at most half of the smaller set, so that subsets differ and have a deviation."""
    usual = Settings()
    half = max(2, len(real.captions) // 2)
    return replace(
        usual,
        seed=request.seed,
        per_prompt=request.per_prompt,
        kid_subset_size=min(usual.kid_subset_size, half),
        features=features,
    )


def _common_size(request: Request) -> int:
    everyone = [*request.drawers, *([request.teacher] if request.teacher else [])]
    shapes = {(d.picture_size, d.latent_shape) for d in everyone}
    if len({size for size, _ in shapes}) > 1:
        sizes = ", ".join(f"{d.name} {d.picture_size}" for d in everyone)
        raise UsageError(f"quality: expected models of one picture size, got: {sizes}")
    if request.teacher and len(shapes) > 1:
        raise UsageError(
            "quality: --teacher: expected the models' latent shape, so that the noise is the same"
        )
    return request.drawers[0].picture_size


def _load(request: Request, size: int) -> tuple[_Real, list[str]]:
    dataset = open_dataset(request.data)
    train = dataset.load("train", size)
    chosen = train if request.split == "train" else dataset.load(request.split, size)
    notes = [
        f"{len(part.problems)} pictures of split {name!r} cannot be used, the first: {part.problems[0]}"
        for name, part in {"train": train, request.split: chosen}.items()
        if part.problems
    ]
    index = _choose(chosen, request.num_prompts, request.seed)
    own_in_train = torch.from_numpy(index) if request.split == "train" else None
    real = _Real(
        captions=[chosen.captions[i] for i in index],
        own=torch.from_numpy(chosen.images[index]),
        train=torch.from_numpy(train.images),
        train_captions=train.captions,
        own_in_train=own_in_train,
    )
    needed = Settings().neighbours + 1
    pictures = len(real.captions) * request.per_prompt
    if len(real.captions) < needed or len(real.reference) < pictures + needed * (request.per_prompt > 1):
        raise DataError(
            f"quality: {request.data}: expected at least {needed} prompts and as many other training "
            f"pictures as are drawn, got {len(real.captions)} and {len(real.reference)} for {pictures}"
        )
    return real, notes


def _choose(split: Loaded, num_prompts: int | None, seed: int) -> np.ndarray:
    """Indices in rising order: all, or ``num_prompts`` drawn without replacement."""
    if num_prompts is None or num_prompts >= len(split):
        return np.arange(len(split))
    return np.sort(np.random.default_rng(seed).choice(len(split), num_prompts, replace=False))


class _Judge:
    """What is measured in the first network alone: agreement with the caption, copies."""

    def __init__(self, net: EfficientNetLite2, real: _Real, settings: Settings, progress: Progress):
        self._net, self._real, self._settings = net, real, settings
        self._own = _in_batches(
            lambda b: torch.cat(net.layers(b), 1), real.own, progress("real pictures", len(real.own))
        )
        train = _in_batches(
            lambda b: torch.cat(net.layers(b), 1), real.train, progress("training pictures", len(real.train))
        )
        width = net.width
        self.space = _Space(net, self._own[:, :width], train[:, :width])
        reference = real.reference
        self._agreement = Agreement(
            train[reference, width:],
            [real.train_captions[i] for i in reference],
            seed=settings.seed,
            steps=settings.agreement_steps,
        )
        self._texts = self._agreement.captions(real.captions)
        self._width = width
        self._nearest = distances.nearest_distance(self.space.own, self.space.train, real.own_in_train)

    def floor(self) -> dict[str, float]:
        return {
            "r_at_1": self._r_at_1(self._own),
            "nearest_train": float(self._nearest.median()),
            "copies": self._copies(self._nearest),
        }

    def figures(self, pictures: Tensor, seeds: Sequence[int]) -> tuple[dict[str, float], tuple[Worst, ...]]:
        both = torch.cat(self._net.layers(pictures), 1)
        nearest = distances.nearest_distance(both[:, : self._width], self.space.train)
        count = len(self._texts)
        texts = self._texts.repeat(len(both) // count, 1)
        agreement = (self._agreement.pictures(both[:, self._width :]) * texts).sum(1)
        worst = tuple(
            Worst(self._real.captions[i % count], seeds[i], round(float(agreement[i]), 4))
            for i in agreement.argsort()[:_NUM_WORST].tolist()
        )
        figures = {
            "r_at_1": self._r_at_1(both),
            "nearest_train": float(nearest.median()),
            "copies": self._copies(nearest),
        }
        fake = both[:, : self._width]
        return figures | _set_figures(self.space, self._real, fake, self._settings), worst

    def _r_at_1(self, both: Tensor) -> float:
        """The mean over rounds of one picture a caption: a caption stands once among the candidates."""
        rounds = self._agreement.pictures(both[:, self._width :]).split(len(self._texts))
        s = self._settings
        found = [
            distances.retrieval_r_at_1(p, self._texts, candidates=s.candidates, seed=s.seed) for p in rounds
        ]
        return float(np.mean(found))

    def _copies(self, nearest: Tensor) -> float:
        """Share nearer to a training picture than 99 % of the prompts' real pictures are."""
        return float((nearest < self._nearest.quantile(_COPY_QUANTILE)).double().mean())


def _view(net: FeatureNet, real: _Real, progress: Progress) -> _Space:
    own = _in_batches(net, real.own, progress(f"real pictures, {net.name}", len(real.own)))
    train = _in_batches(net, real.train, progress(f"training pictures, {net.name}", len(real.train)))
    return _Space(net, own, train)


def _in_batches(net: Callable[[Tensor], Tensor], pictures: Tensor, done: Callable[[int], None]) -> Tensor:
    out = []
    for batch in pictures.split(64):
        out.append(net(batch))
        done(len(batch))
    return torch.cat(out)


def _set_figures(space: _Space, real: _Real, fake: Tensor, settings: Settings) -> dict[str, float]:
    """Distances of a set of features to the prompts' own real pictures and to the training pictures."""
    return _against_own(space, fake, settings) | _against_train(space.train[real.reference], fake, settings)


def _against_own(space: _Space, fake: Tensor, s: Settings) -> dict[str, float]:
    own = distances.kid(space.own, fake, subsets=s.kid_subsets, subset_size=s.kid_subset_size, seed=s.seed)
    manifold = distances.precision_recall(space.own, fake, s.neighbours)
    return {
        "kid": own.mean,
        "kid_std": own.std,
        "frechet": distances.frechet_distance(space.own, fake),
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def _against_train(train: Tensor, fake: Tensor, s: Settings) -> dict[str, float]:
    value = distances.kid(train, fake, subsets=s.kid_subsets, subset_size=s.kid_subset_size, seed=s.seed)
    return {
        "kid_train": value.mean,
        "kid_train_std": value.std,
        "frechet_train": distances.frechet_distance(train, fake),
    }


def _set_floor(space: _Space, real: _Real, settings: Settings) -> dict[str, float]:
    """The same figures for real pictures, as many of them as are drawn.

    Against the prompts' own pictures: random training ones. Against the training pictures: the prompts' own,
    and where several are drawn a caption, of which there are not as many real ones, random training
    pictures against the rest of them.
    """
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    count = len(space.own) * settings.per_prompt
    draws = []
    for i in range(settings.floor_draws):
        order = torch.randperm(len(real.reference), generator=generator)
        fake, rest = space.train[real.reference[order[:count]]], space.train[real.reference[order[count:]]]
        s = replace(settings, seed=settings.seed + i)
        draws.append(_against_own(space, fake, s))
        if settings.per_prompt > 1:
            draws[-1] |= _against_train(rest, fake, s)
    mean = {name: float(np.mean([d[name] for d in draws])) for name in draws[0]}
    if settings.per_prompt > 1:
        return mean
    return mean | _against_train(space.train[real.reference], space.own, settings)


def _suffixed(figures: Mapping[str, float], space: _Space, spaces: Sequence[_Space]) -> dict[str, float]:
    """Figures of a network other than the first carry its name."""
    return {k if space is spaces[0] else f"{k}@{space.net.name}": v for k, v in figures.items()}


def teacher_gap(pictures: Tensor, taught: Tensor, net: FeatureNet) -> dict[str, float]:
    """How far pictures are from a teacher's of the same noise and caption, both uint8 (N, 3, S, S).

    The median PSNR over pictures, in dB (+inf for equal ones), and the mean cosine distance of features.
    """
    pairs = zip(taught.numpy(), pictures.numpy(), strict=True)
    psnr = [psnr_db(a, b, 255.0) for a, b in pairs]
    distance = distances.cosine_distance(net(taught), net(pictures))
    return {"teacher_psnr_db": float(np.median(psnr)), "teacher_distance": float(distance.mean())}


def _row(
    drawer: Drawer, teacher: Drawer | None, figures: dict[str, float], worst: tuple[Worst, ...], count: int
) -> Row:
    return Row(
        model=drawer.name,
        checkpoint=drawer.model.generation.checkpoint_hash,
        kind=drawer.kind,
        steps=drawer.steps,
        guidance=drawer.guidance,
        num_images=count,
        figures=figures,
        teacher=f"{teacher.name}, {teacher.steps} steps" if teacher else None,
        worst=worst,
    )


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "torchmetrics", "numpy")
    return {"edgeflow": __version__, **{name: _version(name) for name in packages}}


def _version(name: str) -> str:
    """From the package's metadata or, where it was carried along without them, from itself."""
    try:
        return version(name)
    except PackageNotFoundError:
        return str(import_module(name).__version__)


def check_judges() -> None:
    """Whether all that measures is installed, before hours are spent on what it is to measure.

    Raises BackendMissing.
    """
    EfficientNetLite2()
    features = torch.arange(8.0).view(4, 2)
    distances.kid(features, features, subsets=1, subset_size=2, seed=0)
    _versions()
