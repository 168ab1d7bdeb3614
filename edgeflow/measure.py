"""Speed, loading and memory of models, each configuration in processes of its own. Torch-free.

A process is started for every launch (edgeflow.measure_process), timed from its start to its first picture,
and then draws in turns with the processes of the other configurations (A B A B …), so that a machine that
slows down slows all of them. Every launch measures all configurations once; what is compared are launches.

A picture that is not the expected one is an error, never a row.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflow.bundle import REFERENCE, Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import RuntimeFailure
from edgeflow.generate import open_model
from edgeflow.measure_process import Configuration, Launch, Process

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: How near a picture must be to the same process's first one, in dB; equal bytes always pass.
REPEAT_PSNR_DB = 60.0
#: How near the first picture must be to the reference that a bundle carries, by precision, in dB: the gates
#: of parity's end to end.
REFERENCE_PSNR_DB = {"fp32": 50.0, "fp16": 35.0}
_WARM_UP = 2
#: Between two turns, so that the threads of the one before have stopped spinning for work.
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Plan:
    """How often: ``launches`` processes a configuration, in each ``rounds`` turns of ``runs`` pictures."""

    launches: int = 3
    rounds: int = 4
    runs: int = 3
    parts: int = 0  # runs of the graphs one by one, for models whose runtime has both


@dataclass(frozen=True)
class Measured:
    """All launches of one configuration."""

    configuration: Configuration
    runtime: str
    device: str  # cpu or cuda
    backend: str  # package and version
    threads: int
    bytes: int  # of the whole folder
    graph_bytes: int  # of a bundle's graphs and weights, or of a checkpoint's parts
    precision: str
    check: str  # what the first picture was held against, and how near it was
    launches: tuple[Launch, ...] = field(default=())

    @property
    def label(self) -> str:
        return self.configuration.label

    @property
    def warm_ms(self) -> tuple[float, ...]:
        return tuple(value for launch in self.launches for value in launch.warm_ms)


#: Told of each step of the work.
Say = Callable[[str], None]


def measure(
    configurations: Sequence[Configuration],
    plan: Plan | None = None,
    *,
    say: Say = lambda step: None,
) -> list[Measured]:
    """Measure all configurations, interleaved, in the order given.

    Raises RuntimeFailure for a wrong picture, and whatever loading a model raises.
    """
    plan = plan or Plan()
    subjects = [_Subject.of(c) for c in configurations]
    launches: list[list[Launch]] = [[] for _ in subjects]
    seen: list[dict[str, Any]] = [{} for _ in subjects]
    for number in range(plan.launches):
        order = _turned(range(len(subjects)), number)
        with contextlib.ExitStack() as stack:
            processes: dict[int, Process] = {}
            for i in order:
                say(f"launch {number + 1} of {plan.launches}: {subjects[i].configuration.label}")
                processes[i] = stack.enter_context(Process(subjects[i].job, subjects[i].configuration))
                seen[i] = {**processes[i].ready, "check": subjects[i].check(processes[i].picture())}
            turns = _take_turns(processes, order, plan)
            for i in order:
                parts = (
                    processes[i].order("parts", plan.parts) if plan.parts and subjects[i].has_parts else {}
                )
                launches[i].append(processes[i].end(turns[i], parts))
    return [s.measured(seen[i], launches[i]) for i, s in enumerate(subjects)]


def _turned(items: Sequence[int], number: int) -> list[int]:
    """The items, beginning with another one each time: nobody is always first."""
    start = number % max(1, len(items))
    return [*items[start:], *items[:start]]


def _take_turns(
    processes: Mapping[int, Process], order: Sequence[int], plan: Plan
) -> dict[int, list[dict[str, Any]]]:
    """A round lets each process draw in turn; pictures that warm it up are not kept."""
    for i in order:
        processes[i].order("run", _WARM_UP)
    turns: dict[int, list[dict[str, Any]]] = {i: [] for i in order}
    for number in range(plan.rounds):
        for i in _turned(list(order), number):
            time.sleep(_PAUSE_S)
            turns[i].append(_without_first(processes[i].order("run", 1 + plan.runs)))
    return turns


def _without_first(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn less its first picture, which finds the caches full of another process's data."""
    graphs = {name: values[1:] for name, values in turn["graphs_ms"].items()}
    return {**turn, "latency_ms": turn["latency_ms"][1:], "graphs_ms": graphs}


@dataclass(frozen=True)
class _Subject:
    """A configuration with what is known of its model before any process starts."""

    configuration: Configuration
    job: dict[str, Any]
    bytes: int
    graph_bytes: int
    precision: str
    has_parts: bool
    expected: NDArray[np.uint8] | None
    limit_db: float
    against: str

    @classmethod
    def of(cls, configuration: Configuration) -> _Subject:
        model = open_model(configuration.model)
        expected, prompt = configuration.expected, configuration.prompt
        against, limit = "the expected picture", REPEAT_PSNR_DB
        carried = isinstance(model, Bundle) and REFERENCE in model.manifest.files
        if expected is None and prompt is None and configuration.seed == 0 and carried:
            assert isinstance(model, Bundle)
            expected, against = _reference(model), "reference.npz"
            limit = REFERENCE_PSNR_DB.get(model.manifest.precision, 35.0)
        elif expected is None:
            against = "its own pictures"
        job = {
            "model": configuration.model,
            "runtime": configuration.runtime,
            "prompt": model.generation.prompts[0] if prompt is None else prompt,
            "seed": configuration.seed,
            "repeat_psnr_db": REPEAT_PSNR_DB,
        }
        parts = isinstance(model, Checkpoint)
        return cls(configuration, job, *sizes_of(model), precision_of(model), parts, expected, limit, against)

    def check(self, picture: NDArray[np.uint8]) -> str:
        """What the first picture was held against. Raises RuntimeFailure where it is another picture."""
        from edgeflow.metrics import psnr_db

        if self.expected is None:
            if int(picture.max()) == int(picture.min()):
                raise RuntimeFailure(
                    f"measure: {self.configuration.model}: the picture is of one colour alone"
                )
            return self.against
        psnr = psnr_db(self.expected, picture, 255.0)
        if psnr < self.limit_db:
            raise RuntimeFailure(
                f"measure: {self.configuration.model}: picture: expected {self.against} within "
                f"{self.limit_db:g} dB, got one {psnr:.1f} dB away; a fast wrong picture is not a measurement"
            )
        return f"{self.against}, " + ("equal" if math.isinf(psnr) else f"{psnr:.1f} dB")

    def measured(self, seen: Mapping[str, Any], launches: Sequence[Launch]) -> Measured:
        return Measured(
            configuration=self.configuration,
            runtime=seen["runtime"],
            device=seen["device"],
            backend=seen["backend"],
            threads=seen["threads"],
            bytes=self.bytes,
            graph_bytes=self.graph_bytes,
            precision=self.precision,
            check=seen["check"],
            launches=tuple(launches),
        )


def sizes_of(model: Bundle | Checkpoint) -> tuple[int, int]:
    """Bytes of the whole folder, and of the graphs or the model's parts."""
    if isinstance(model, Bundle):
        return sum(entry.bytes for entry in model.manifest.files.values()), model.graph_bytes()
    parts = {part: sum(f.stat().st_size for f in model.files(part)) for part in model.parts}
    return sum(parts.values()), sum(size for part, size in parts.items() if part != "tokenizer")


def precision_of(model: Bundle | Checkpoint) -> str:
    """``fp32``, ``fp16`` or ``w8 fp16``: the recipe's name before what stays float."""
    if isinstance(model, Bundle):
        recipe, float_precision = model.manifest.recipe, model.manifest.precision
    else:
        recipe, float_precision = (model.quantization or {}).get("recipe"), "fp32"
    return f"{recipe['name']} {float_precision}" if recipe else float_precision


def _reference(bundle: Bundle) -> NDArray[np.uint8]:
    """The picture that the bundle's reference holds for its first prompt and seed 0."""
    from edgeflow.generate import to_pixels

    return to_pixels(bundle.reference()["prompt0/pipeline/image"])


def configurations(
    models: Sequence[str], *, runtime: str | None = None, threads: int | None = None, seed: int = 0
) -> list[Configuration]:
    """One configuration a model, by its folder's name, or by as much of its path as tells it apart."""
    names = distinct_names(models)
    return [
        Configuration(model, runtime, threads, name, seed=seed)
        for model, name in zip(models, names, strict=True)
    ]


def distinct_names(sources: Sequence[str], names: Sequence[str] | None = None) -> list[str]:
    """Names of models (by default their folders'); where some are alike, with the folders above them."""
    paths = [Path(source).absolute().parts if Path(source).exists() else (source,) for source in sources]
    given = list(names) if names is not None else [parts[-1] for parts in paths]
    made = list(given)
    for i, name in enumerate(given):
        alike = [k for k, other in enumerate(given) if other == name and paths[k] != paths[i]]
        depth = 1
        while depth < len(paths[i]) and any(paths[k][-depth:] == paths[i][-depth:] for k in alike):
            depth += 1
        if alike:
            made[i] = "/".join(paths[i][-depth:])
    return made
