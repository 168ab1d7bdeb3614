"""edgeflow beside its peers: the same weights, noise and machine, each in processes of its own, in turns.

    python -m edgeflow.peers emoji --launches 3 --runs 5

``make bench-peers`` makes the peers' environments first. The model is exported once into ``--work``: ours as
one graph, the peers' as components. A launch starts each configuration's process in turn (one at a time: two
full-size models need not fit side by side), draws the first picture, ``--warm-up`` more, then those that
count; the next launch begins with another configuration. Every picture is held against the reference that the
bundles carry. A peer that cannot be installed or cannot draw the picture is a row that says why.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeflow.bench_machine import busy, machine
from edgeflow.cli import options
from edgeflow.clients_process import CLIENTS, ENVIRONMENTS, ClientProcess, client_job
from edgeflow.errors import EdgeflowError, RuntimeFailure, UsageError
from edgeflow.measure_process import Configuration, Launch, Process
from edgeflow.measure_statistics import Ratio, ratio_of_launches, summarize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: How near a picture must be to the reference, dB: a client that cuts where we round is 48 dB away at least.
LIMIT_DB = {"fp32": 45.0, "fp16": 35.0}
#: Peers whose own arithmetic says how near their picture is; it is printed and not gated.
UNGATED = ("sdcpp",)
#: Our rows and those of the peers: title, what of the export it opens, the peer or None.
_ROWS = (
    ("edgeflow, ONNX Runtime", "onnx-pipeline", None),
    ("edgeflow, OpenVINO", "openvino-pipeline", None),
    ("optimum-onnx", "onnx-components", "optimum"),
    ("OpenVINO GenAI", "openvino-components", "genai"),
    ("stable-diffusion.cpp", "single", "sdcpp"),
)


@dataclass
class Row:
    """One configuration and what came of it: launches, or ``why`` there are none."""

    title: str
    precision: str
    peer: str | None
    start: Callable[[], Process] | None = None
    why: str = ""
    bundle: Path | None = None  # where the picture that it must draw lies, if not in the rows' common one
    psnr_db: float | None = None
    backend: str = ""
    launches: list[Launch] = field(default_factory=list)

    @property
    def warm_s(self) -> list[float]:
        return [ms / 1000 for launch in self.launches for ms in launch.warm_ms]


@dataclass(frozen=True)
class Asked:
    """The command's own options."""

    model: str
    precisions: tuple[str, ...]
    launches: int
    runs: int
    threads: int
    seconds: float
    warm_up: int = 1
    only: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def rows_of(asked: Asked, work: Path, environments: Path) -> list[Row]:
    """Every configuration, exported where it is not yet; what cannot be had is a row that says why."""
    rows = []
    for precision in asked.precisions:
        for title, what, peer in _ROWS:
            if asked.only and not any(word.lower() in title.lower() for word in asked.only):
                continue
            row = Row(title, precision, peer)
            try:
                row.start = _starter(asked, row, what, work, environments)
            except EdgeflowError as error:
                row.why = str(error)
            rows.append(row)
    for bundle in asked.also:
        row = Row(f"edgeflow, {Path(bundle).name}", _precision(bundle), None)
        row.start, row.bundle = _own(bundle, asked.threads), Path(bundle)
        rows.append(row)
    return rows


def _precision(bundle: str) -> str:
    from edgeflow.generate import open_model
    from edgeflow.measure import precision_of

    return precision_of(open_model(bundle))


def _starter(asked: Asked, row: Row, what: str, work: Path, environments: Path) -> Callable[[], Process]:
    """What starts a row's process. Raises EdgeflowError where it cannot be had."""
    from edgeflow.checkpoint import Checkpoint

    if row.peer is None:
        return _own(str(_exported(asked.model, what, row.precision, work)), asked.threads)
    client = CLIENTS[row.peer]
    python = client.python(environments)
    source = asked.model
    if what == "single":
        model = _negated(Checkpoint.open(asked.model), work)
    else:
        model = _exported(asked.model, what, row.precision, work)
        source = str(model)
    job = client_job(client, model, source, asked.threads, 0, work)
    job["wtype"] = {"fp32": "f32", "fp16": "f16"}[row.precision]
    return lambda: ClientProcess(
        python, job, Configuration(str(model), threads=asked.threads, name=row.title)
    )


def _own(bundle: str, threads: int) -> Callable[[], Process]:
    from edgeflow.generate import open_model

    prompt = open_model(bundle).generation.prompts[0]
    job = {"model": bundle, "runtime": None, "prompt": prompt, "seed": 0, "repeat_psnr_db": 60.0}
    return lambda: Process(job, Configuration(bundle, threads=threads))


def _exported(model: str, what: str, precision: str, work: Path) -> Path:
    """The bundle, from an earlier run where it is of the same checkpoint. Raises what exporting raises."""
    from edgeflow.bundle import Bundle
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.export import export_model

    path, (backend, layout) = work / f"{what}-{precision}", what.split("-")
    checkpoint = Checkpoint.open(model)
    if path.is_dir() and Bundle.open(path).generation.checkpoint_hash == checkpoint.hash:
        return path
    click.echo(f"exporting {path.name}", err=True)
    return export_model(
        checkpoint,
        backends=[backend],
        precisions=[precision],
        layouts=[layout],
        out=work,
        num_prompts=1,
        force=True,
    )[0]


def _negated(checkpoint: Any, work: Path) -> Path:
    """The checkpoint with its UNet's last layer negated, in diffusers' layout under the plain file names.

    stable-diffusion.cpp's flow runs from picture to noise, so its velocity is ours with the other sign.
    """
    from safetensors.torch import load_file, save_file

    folder = work / f"negated-{checkpoint.hash[:12]}"
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for part, stem in names.items():
        target = folder / part / f"{stem}.safetensors"
        if target.exists():
            continue
        files = checkpoint.weight_files(part)
        if len(files) != 1:
            raise RuntimeFailure(f"stable-diffusion.cpp: {part}: opens one file, not {len(files)} shards")
        target.parent.mkdir(parents=True, exist_ok=True)
        if part != "unet":
            target.symlink_to(files[0].resolve())
            continue
        tensors = load_file(files[0])
        for name in ("conv_out.weight", "conv_out.bias"):
            tensors[name] = -tensors[name]
        save_file(tensors, target)
    return folder


# --- measuring ------------------------------------------------------------------------------------------


def measure_rows(
    rows: Sequence[Row], asked: Asked, expected: NDArray[np.uint8], say: Callable[[str], None]
) -> None:
    """Fill in the rows' launches, a process at a time, until the seconds are spent."""
    end = time.monotonic() + asked.seconds
    for number in range(asked.launches):
        start = number % max(1, len(rows))
        for row in (*rows[start:], *rows[:start]):
            if row.why or row.start is None:
                continue
            if time.monotonic() > end:
                row.why = row.why if row.launches else "not measured: the time was over"
                continue
            say(f"launch {number + 1} of {asked.launches}: {row.title} {row.precision}")
            try:
                own = expected if row.bundle is None else picture_of(row.bundle)
                row.launches.append(_launch(row, asked, own))
                say(f"  {_said(row, row.launches[-1])}")
            except EdgeflowError as error:
                row.why, row.launches = str(error), []


def _said(row: Row, launch: Launch) -> str:
    """A launch in words: what is measured is not lost where a later one is cut off."""
    warm = ", ".join(f"{ms / 1000:.3f}" for ms in launch.warm_ms) or "none"
    first = launch.first_picture_ms / 1000
    return f"first picture {first:.2f} s, then {warm}; {launch.peak_rss_mib:.0f} MiB, {row.psnr_db:.1f} dB"


def _launch(row: Row, asked: Asked, expected: NDArray[np.uint8]) -> Launch:
    from edgeflow.metrics import psnr_db

    assert row.start is not None
    with row.start() as process:
        picture = process.picture()
        if picture.shape != expected.shape:
            raise RuntimeFailure(f"{row.title}: drew {picture.shape}, expected {expected.shape}")
        row.psnr_db, row.backend = psnr_db(expected, picture, 255.0), process.ready["backend"]
        if row.peer not in UNGATED and row.psnr_db < LIMIT_DB[row.precision.split()[-1]]:
            raise RuntimeFailure(
                f"{row.title}: drew another picture, {row.psnr_db:.1f} dB from the reference"
            )
        process.order("run", asked.warm_up)
        return process.end([process.order("run", asked.runs)], {})


def reference_picture(rows: Sequence[Row], asked: Asked, work: Path) -> NDArray[np.uint8]:
    """The fp32 picture of the first prompt and seed 0 that every exported bundle carries."""
    for precision in asked.precisions:
        for _, what, _ in _ROWS:
            path = work / f"{what}-{precision}"
            if (path / "reference.npz").is_file():
                return picture_of(path)
    raise UsageError("peers: expected at least one row that is exported")


def picture_of(bundle: Path) -> NDArray[np.uint8]:
    """The fp32 picture that a bundle carries: of its own weights, quantized or not, and its own decoder."""
    from edgeflow.bundle import Bundle
    from edgeflow.generate import to_pixels

    return to_pixels(Bundle.open(bundle).reference()["prompt0/pipeline/image"])


# --- the table ------------------------------------------------------------------------------------------


def against(row: Row, best: Row) -> Ratio | None:
    """How many times as long as our best; None where launches are too few for an interval."""
    import math
    import statistics

    logs = [
        math.log(statistics.median(a.warm_ms) / statistics.median(b.warm_ms))
        for a, b in zip(row.launches, best.launches, strict=False)
    ]
    return ratio_of_launches(logs) if len(logs) > 1 else None


def best_of_ours(rows: Sequence[Row], precision: str) -> Row | None:
    """Our fastest row of a precision."""
    ours = [row for row in rows if row.peer is None and row.warm_s and row.precision == precision]
    return min(ours, key=lambda row: summarize(row.warm_s).median, default=None)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table in Markdown."""
    yield "| | precision | s a picture | range | × ours | 95 % | first picture s | peak MiB | picture dB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        head = f"| {row.title} | {row.precision} "
        if not row.launches:
            yield f"{head}| {row.why} | | | | | | |"
            continue
        first = summarize([launch.first_picture_ms / 1000 for launch in row.launches]).median
        peak = max(launch.peak_rss_mib for launch in row.launches)
        if not row.warm_s:
            yield f"{head}| | | | | {first:.2f} | {peak:.0f} | {row.psnr_db:.1f} |"
            continue
        warm, best = summarize(row.warm_s), best_of_ours(rows, row.precision)
        times, interval = "", ""
        if best is not None:
            times = f"{warm.median / summarize(best.warm_s).median:.2f}"
            found = None if row is best else against(row, best)
            interval = "" if found is None else f"{found.low:.2f} to {found.high:.2f}"
        yield (
            f"{head}| {warm.median:.3f} | {warm.low:.3f} … {warm.high:.3f} | {times} | {interval} "
            f"| {first:.2f} | {peak:.0f} | {row.psnr_db:.1f} |"
        )


def as_dict(rows: Sequence[Row], asked: Asked, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, as JSON values; times in ms, memory in MiB."""
    found = [
        {
            "title": row.title,
            "precision": row.precision,
            "backend": row.backend,
            "why": row.why or None,
            "psnr_db": str(row.psnr_db) if row.psnr_db == float("inf") else row.psnr_db,
            "launches": [asdict(launch) for launch in row.launches],
        }
        for row in rows
    ]
    return {"schema": 1, "kind": "peers", "machine": facts, "settings": asdict(asked), "rows": found}


@click.command(context_settings=options.CONTEXT)
@click.argument("model")
@click.option("--precision", "precisions", multiple=True, default=("fp32", "fp16"), show_default=True)
@click.option("--launches", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--runs",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Of a launch; 0: the first picture alone.",
)
@click.option(
    "--warm-up", type=click.IntRange(0), default=1, show_default=True, help="After the first picture."
)
@click.option("--threads", type=click.IntRange(1), default=None, help="[default: the physical cores]")
@click.option("--only", multiple=True, metavar="WORD", help="Rows whose title has the word.")
@click.option("--also", multiple=True, metavar="BUNDLE", help="Another bundle of ours.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the exported bundles here.")
@click.option("--environments", type=click.Path(path_type=Path), default=ENVIRONMENTS, show_default=True)
@click.option("--seconds", type=float, default=600.0, show_default=True, help="No launch after so long.")
@click.option("--export-only", is_flag=True, help="Export what is missing, and measure nothing.")
@options.json_option
def command(
    model: str, threads: int | None, work: Path | None, environments: Path, as_json: bool, export_only: bool,
    **rest: Any,
) -> None:  # fmt: skip
    """Time and memory of edgeflow and its peers on MODEL, a one-step checkpoint."""
    from edgeflow.runtimes.checks import num_threads

    asked = Asked(model=model, threads=threads or num_threads(), **rest)
    facts = machine()
    with tempfile.TemporaryDirectory() as folder:
        place = work or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        rows = rows_of(asked, place.absolute(), environments)
        if export_only:
            return
        warning = busy(machine())
        measure_rows(
            rows, asked, reference_picture(rows, asked, place), lambda step: click.echo(step, err=True)
        )
    if as_json:
        click.echo(json.dumps(as_dict(rows, asked, facts), indent=2))
        return
    click.echo(
        f"{facts['processor']}, {facts['cpus']} CPUs, {asked.threads} threads, {facts['memory_gib']} GiB\n"
    )
    for line in lines(rows):
        click.echo(line)
    for backend in dict.fromkeys(row.backend for row in rows if row.backend):
        click.echo(f"- {backend}")
    if warning:
        click.echo(warning, err=True)


def main() -> None:
    """Run the command; what a user can mend is one sentence on stderr."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        command(standalone_mode=False)
    except EdgeflowError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
