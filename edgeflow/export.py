"""Checkpoint → bundles: one program per component, lowered by every backend asked for.

Everything that can be checked is checked before any work starts. All bundles appear together at the end; an
export that fails or is interrupted leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflow import __version__, overflow, registry, worker
from edgeflow import export_tasks as tasks
from edgeflow.apple import AppleSettings, settle
from edgeflow.bundle import REFERENCE, TOKENIZER, Manifest, write_bundle_files, write_reference
from edgeflow.checkpoint import Checkpoint
from edgeflow.clients import write_client_configs
from edgeflow.errors import UnknownNameError, UsageError
from edgeflow.overflow import Range, Wide
from edgeflow.spec import COMPONENTS, PIPELINE, GraphSpec
from edgeflow.staging import staged_folder

if TYPE_CHECKING:
    import numpy as np

    from edgeflow.export_plan import ExportPlan
    from edgeflow.registry import Exporter

PRECISIONS = ("fp32", "fp16")
#: What some backend has besides.
OTHER_PRECISIONS = ("bf16",)
LAYOUTS: Mapping[str, tuple[str, ...]] = {PIPELINE: (PIPELINE,), "components": COMPONENTS}
PICTURES = ("float32", "uint8")
#: How many of the model's prompts the reference of a bundle holds; prompt i is drawn from seed i.
NUM_REFERENCES = 4
_APPLE = AppleSettings()
#: What made the program, whatever the backend.
_TOOLS = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class _Job:
    """One bundle to write."""

    exporter: Exporter
    precision: str
    layout: str
    apple: AppleSettings = _APPLE

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The backend's own, as the manifest records them. Raises UsageError as edgeflow.apple does."""
        if self.exporter.backend != "coreml":
            return {}
        return settle(checkpoint, self.apple, self.layout, self.precision)

    @property
    def name(self) -> str:
        return f"{self.exporter.backend}-{self.layout}-{self.precision}"


def export_model(
    checkpoint: Checkpoint,
    *,
    backends: Sequence[str],
    precisions: Sequence[str] = ("fp32",),
    layouts: Sequence[str] = (PIPELINE,),
    picture: str = "float32",
    out: Path,
    force: bool = False,
    strict: bool = False,
    num_prompts: int | None = None,
    isolate: bool | None = None,
    apple: AppleSettings = _APPLE,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Path]:
    """Write one bundle per backend, layout and precision at ``out/<backend>-<layout>-<precision>``.

    ``picture`` is the pipeline's output, float32 in [0, 1] or uint8. Every value of the exported graphs is
    checked to be finite on the model's first ``num_prompts`` prompts (by default NUM_REFERENCES, 1 for a
    large model); operations that would overflow float16 stay float32 in fp16 bundles, or with ``strict`` are
    an error. ``isolate`` gives the reference and every graph a process of its own, by default where the model
    is large (edgeflow.export_tasks). ``apple`` is Core ML's alone. ``progress`` is told each step in words.
    Equal inputs give equal bytes, isolated or not. Raises UsageError, BackendMissing, OutputExistsError or
    ExportError (a model that does not draw in one step) before any work starts; ExportError naming the
    backend and component when one cannot be lowered.
    """
    jobs = plan(backends, precisions, layouts, picture, apple)
    check_exportable(checkpoint)
    _check_palettes(checkpoint, jobs)
    settings = [job.settings(checkpoint) for job in jobs]
    isolate = tasks.is_large(checkpoint) if isolate is None else isolate
    run = _isolated if isolate else _here
    with _no_trace(out), ExitStack() as stack:
        stages = [stack.enter_context(staged_folder(out / job.name, force=force)) for job in jobs]
        progress("reference pictures")
        source = tasks.Source(checkpoint, picture, attention=apple.attention)
        graphs = tuple(dict.fromkeys(name for job in jobs for name in LAYOUTS[job.layout]))
        count = num_prompts or (1 if isolate else NUM_REFERENCES)
        arrays, ranges = run("export: reference", tasks.reference, source, graphs, count)
        if strict:
            _check_strict(jobs, ranges)
        specs: dict[str, list[GraphSpec]] = {job.name: [] for job in jobs}
        for name in graphs:
            with _lowering(source, name, isolate) as lower:
                for job, stage, chosen in zip(jobs, stages, settings, strict=True):
                    if name in LAYOUTS[job.layout]:
                        progress(f"{job.name}: {name}")
                        specs[job.name].append(lower(job, stage, ranges[name], chosen))
        for job, stage, chosen in zip(jobs, stages, settings, strict=True):
            _add_tokenizer(job, stage, checkpoint)
            if hasattr(job.exporter, "finish"):
                what = f"export: {job.exporter.backend}: tokenizer"
                run(what, tasks.finish, job.exporter.backend, stage, job.layout)
            _finish_bundle(job, stage, checkpoint, specs[job.name], ranges, arrays, chosen)
        progress("done")
    return [out / job.name for job in jobs]


def check_exportable(checkpoint: Checkpoint) -> None:
    """What edgeflow.components.check_exportable checks; a large model's parent process needs no torch."""
    from edgeflow import components as comp

    comp.check_exportable(checkpoint)


def _here(what: str, function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _isolated(what: str, function: Callable[..., Any], *args: Any) -> Any:
    return worker.call(what, f"{function.__module__}:{function.__name__}", *args)


@contextmanager
def _lowering(source: tasks.Source, graph: str, isolate: bool) -> Iterator[Callable[..., GraphSpec]]:
    """What lowers a graph for each job in turn: here, or in one process that ends with the block."""

    def asked(job: _Job, stage: Path, ranges: list[Range], settings: Mapping[str, Any]) -> tuple[Any, ...]:
        wide = overflow.wide_nodes(ranges) if job.precision == "fp16" else Wide()
        own = {name: value for name, value in settings.items() if name != "attention"}  # the program has it
        return graph, job.exporter.backend, stage, job.precision, job.layout, wide, own

    if not isolate:
        yield lambda *job: source.lower(*asked(*job))
        return
    with worker.worker(f"export: {graph}") as child:
        module = f"{tasks.__name__}:Source"
        child.call(module, source.checkpoint, source.picture, (graph,), source.attention, hold=True)

        def lower(job: _Job, stage: Path, ranges: list[Range], settings: Mapping[str, Any]) -> GraphSpec:
            child.what = f"export: {job.exporter.backend}: {graph}"
            spec: GraphSpec = child.call(".lower", *asked(job, stage, ranges, settings))
            return spec

        yield lower


def _fp32_ops(job: _Job, ranges: Mapping[str, list[Range]]) -> dict[str, tuple[str, ...]]:
    """Graph → what stays float32 in it; nothing for a bundle that is float32 throughout."""
    if job.precision != "fp16":
        return {}
    squares = getattr(job.exporter, "squares_norms", False)
    listed = {
        name: overflow.described(ranges[name], overflow.wide_nodes(ranges[name]), squares)
        for name in LAYOUTS[job.layout]
    }
    return {name: ops for name, ops in listed.items() if ops}


def _check_strict(jobs: Sequence[_Job], ranges: Mapping[str, list[Range]]) -> None:
    for job in jobs:
        overflow.check_strict(_fp32_ops(job, ranges))


def plan(
    backends: Sequence[str],
    precisions: Sequence[str],
    layouts: Sequence[str],
    picture: str,
    apple: AppleSettings = _APPLE,
) -> list[_Job]:
    """The bundles to write, in order, each once. Raises UsageError or BackendMissing."""
    for what, names, known in (
        ("precision", precisions, PRECISIONS + OTHER_PRECISIONS),
        ("graph layout", layouts, tuple(LAYOUTS)),
        ("picture", (picture,), PICTURES),
    ):
        for name in names:
            if name not in known:
                raise UnknownNameError(what, name, known)
    if not (backends and precisions and layouts):
        raise UsageError("export: expected at least one backend, precision and graph layout, got none")
    if picture != "float32" and PIPELINE not in layouts:
        raise UsageError(
            f"export: picture {picture!r}: expected the graph layout {PIPELINE!r}, which draws it"
        )
    if picture == "uint8" and "coreml" in backends:
        raise UsageError("export: picture 'uint8': Core ML has no uint8 tensors; expected float32 for coreml")
    apple.check(backends, layouts)
    exporters = [registry.exporter(name) for name in dict.fromkeys(backends)]
    for exporter in exporters:
        for precision in precisions:
            if precision not in exporter.precisions:
                raise UsageError(
                    f"export: backend {exporter.backend}: precision {precision!r} is not available; "
                    f"known: {', '.join(exporter.precisions)}"
                )
        for layout in layouts:
            getattr(exporter, "check", lambda layout: None)(layout)
    return [
        _Job(exporter, precision, layout, apple)
        for exporter in exporters
        for layout in dict.fromkeys(layouts)
        for precision in dict.fromkeys(precisions)
    ]


def plan_of(
    checkpoint: Checkpoint, jobs: Sequence[_Job], out: Path, num_prompts: int | None, *, parity: bool
) -> ExportPlan:
    """What the export of these bundles will do and take. Raises ExportError as ``export_model`` does."""
    from edgeflow.export_plan import plan_export

    check_exportable(checkpoint)
    _check_palettes(checkpoint, jobs)
    count = num_prompts or (1 if tasks.is_large(checkpoint) else NUM_REFERENCES)
    for job in jobs:
        job.settings(checkpoint)
    asked = [(job.exporter.backend, job.precision, LAYOUTS[job.layout]) for job in jobs]
    return plan_export(checkpoint, asked, out, num_prompts=count, parity=parity)


def _check_palettes(checkpoint: Checkpoint, jobs: Sequence[_Job]) -> None:
    """Raise UsageError for a backend that has no look-up tables, for a checkpoint of them. Reads headers."""
    backends = [job.exporter.backend for job in jobs if not getattr(job.exporter, "palettes", False)]
    if not backends or checkpoint.quantization is None:
        return
    for part in ("text_encoder", "unet", "vae"):
        for name, layer in checkpoint.quantized_layers(part).items():
            if layer.palette:
                raise UsageError(
                    f"export: {checkpoint.name}: {part}: {name}: a w{layer.bits} palette, which Core ML "
                    f"alone can hold; expected --to coreml, got {backends[0]}"
                )


def _finish_bundle(
    job: _Job,
    stage: Path,
    checkpoint: Checkpoint,
    graphs: Sequence[GraphSpec],
    ranges: Mapping[str, list[Range]],
    reference: dict[str, np.ndarray],
    settings: dict[str, Any],
) -> None:
    """All that a bundle holds besides its graphs."""
    if job.layout == "components":
        write_client_configs(checkpoint, stage, job.exporter.backend)
    write_reference(stage / REFERENCE, reference)
    spec = dataclasses.asdict(checkpoint.generation)
    del spec["tokenizer_dir"]
    manifest = Manifest(
        backend=job.exporter.backend,
        precision=job.precision,
        layout=job.layout,
        model={**spec, "origin": checkpoint.facts["origin"]},
        recipe=checkpoint.quantization["recipe"] if checkpoint.quantization else None,
        graphs=tuple(graphs),
        files={},
        versions=_versions(getattr(job.exporter, "tools", ())) | getattr(job.exporter, "facts", dict)(),
        fp32_ops=_fp32_ops(job, ranges),
        settings=settings,
    )
    write_bundle_files(stage, manifest)


def _add_tokenizer(job: _Job, stage: Path, checkpoint: Checkpoint) -> None:
    """The tokenizer, as the checkpoint has it."""
    for file in checkpoint.files("tokenizer"):
        _copy(file, stage / TOKENIZER / file.name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _versions(tools: Sequence[str]) -> dict[str, str]:
    """edgeflow's version and those of the tools that made the bundle, by distribution name."""
    versions = {"edgeflow": __version__}
    for name in (*_TOOLS, *tools):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@contextmanager
def _no_trace(out: Path) -> Iterator[None]:
    """Remove the folders that were made for ``out`` when the block fails, as far as they are empty."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
