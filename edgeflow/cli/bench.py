"""``edgeflow bench``: how long a picture takes, how long the first one, and what it costs to hold a model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from edgeflow.cli import options
from edgeflow.errors import OutputExistsError, UsageError

_PATH = click.Path(path_type=Path)


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example(
        "edgeflow bench bundles/onnx-pipeline-fp16 --cold 5",
        "edgeflow bench bundles/* --compare --json > bench.json",
        "edgeflow bench bundles/* --compare --quality verdict/verdict.json --report bench.html",
    ),
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL_OR_BUNDLE...")
@click.option("--compare", is_flag=True, help="Say how many times as long each takes as the first.")
@click.option("--runtime", metavar="NAME", help="What runs the models; default: each model's own.")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: the physical cores]"
)
@click.option(
    "--launches",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Processes started for each model.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="N",
    help="Warm pictures in each process.",
)
@click.option(
    "--cold",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Also time edgeflow generate from the start of the process to the saved PNG, N times.",
)
@click.option("--no-work", is_flag=True, help="Count no arithmetic and measure no matrix rate.")
@click.option(
    "--quality",
    type=_PATH,
    metavar="FILE",
    help="With --report: a verdict.json or quality.json with these models' figures.",
)
@click.option("--report", type=_PATH, metavar="FILE", help="One HTML file: time against quality and size.")
@options.seed_option
@options.force_option
@options.json_option
@options.verbosity
def command(
    models: tuple[str, ...],
    compare: bool,
    runtime: str | None,
    threads: int | None,
    launches: int,
    runs: int,
    cold: int,
    no_work: bool,
    quality: Path | None,
    report: Path | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Measure speed, loading and memory of models, each in processes of its own.

    A process is timed from its start to its first picture, stage by stage, then draws warm pictures in turns
    with the other models' processes, so that all suffer alike from a machine that slows down. Every picture
    is checked: a wrong one is an error, never a row. --compare names a winner only where the spread over
    processes allows it.

    Exit codes: 0 done, 1 failed, 2 usage, 4 a backend is not installed.
    """
    if compare and (len(models) < 2 or launches < 2):
        raise UsageError("--compare: expected two models or more, and --launches of at least 2")
    if quality is not None and report is None:
        raise UsageError("--quality: expected --report FILE with it")
    if report is not None and (report.exists() or report.is_symlink()) and not force:
        raise OutputExistsError(report)
    from edgeflow.bench import BenchRequest, bench
    from edgeflow.bench_table import print_bench
    from edgeflow.measure import Plan, configurations

    figures = None
    if quality is not None:
        from edgeflow.bench_page import read_quality

        figures = read_quality(quality)
    turns = min(5, runs)
    plan = Plan(launches=launches, rounds=turns, runs=-(-runs // turns), parts=min(runs, 5))
    wanted = configurations(models, runtime=runtime, threads=threads, seed=seed)
    with ExitStack() as stack:
        request = BenchRequest(wanted, plan, cold=cold, flops=not no_work, compare=compare)
        found = bench(request, options.spinner(stack))
    if report is not None:
        from edgeflow.bench_page import bench_page
        from edgeflow.staging import staged_output

        with staged_output(report, force=force) as stage:
            stage.write_text(bench_page(found, figures), encoding="utf-8")
    print_bench(found, as_json=as_json)
