"""``edgeflow generate``: prompts to pictures."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeflow.cli import options
from edgeflow.cli.changes import any_given, change_options, opened
from edgeflow.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from edgeflow.generate import Generator, Picture

log = logging.getLogger(__name__)
Job = tuple[str, int]  # prompt, seed


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example(
        'edgeflow generate emoji "red apple, noto style" -o apple.png',
        'edgeflow generate bundles/onnx-pipeline-fp32 "owl, noto style" "cat, noto style" --grid -o a.png',
    ),
)
@click.argument("model", metavar="MODEL_OR_BUNDLE")
@click.argument("prompts", nargs=-1, metavar='"PROMPT"...')
@options.out_option("A .png for one picture or a grid; a folder of numbered .png files for several.")
@click.option(
    "--prompts-file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="More prompts, one a line, in UTF-8; - is stdin.",
)
@options.seed_option
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Pictures per prompt, with the seeds N to N+K-1.",
)
@click.option("--grid", is_flag=True, help="One contact sheet with captions in place of single files.")
@click.option(
    "--runtime",
    metavar="NAME",
    help="What runs the model; default: the bundle's own backend, torch for a checkpoint.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps for a many-step checkpoint, which the torch runtime can draw; a one-step model needs none.",
)
@click.option(
    "--guidance",
    type=click.FloatRange(min=0, max=1000),
    metavar="W",
    help="Guidance with --steps; default: the checkpoint's own. 1 or less is none.",
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="Load, run and free one component at a time (onnx, openvino, torch): less memory, more seconds.",
)
@change_options
@options.force_option
@options.json_option
@options.verbosity
def command(
    model: str,
    prompts: tuple[str, ...],
    out: Path,
    prompts_file: Path | None,
    seed: int,
    count: int,
    grid: bool,
    runtime: str | None,
    steps: int | None,
    guidance: float | None,
    low_memory: bool,
    changes: dict[str, Any],
    force: bool,
    as_json: bool,
) -> None:
    """Draw pictures from prompts with a one-step model.

    MODEL_OR_BUNDLE is a built-in model (emoji), a checkpoint folder, a hub id, or an exported bundle. Every
    prompt is drawn from the same seed; the same seed gives the same noise on every runtime. Each PNG
    records its prompt, seed, model, checkpoint hash, runtime and versions. Prints the paths written.

    A many-step checkpoint (2-rectified flow, Stable Diffusion) is refused unless --steps says how many: a
    rectified flow is then integrated by Euler's method, a diffusion model by DPM-Solver++.

    Exit codes: 0 done, 1 failed, 2 usage, 4 a backend is not installed.
    """
    jobs = _jobs([*prompts, *_lines(prompts_file)], seed, count)
    single = grid or len(jobs) == 1
    _check_out(out, single, force)
    from edgeflow.generate import Generator

    with ExitStack() as stack:
        source: Any = stack.enter_context(opened(model, changes)) if any_given(changes) else model
        generator = Generator.open(source, runtime, steps=steps, guidance=guidance, low_memory=low_memory)
        write = _write_single if single else _write_folder
        paths, pictures = write(generator, jobs, out, force, count)
    if as_json:
        options.print_json(_report(generator, pictures, paths))
    else:
        click.echo("\n".join(map(str, paths)))


def _lines(path: Path | None) -> list[str]:
    """The prompts of a file; empty lines separate and are no prompts."""
    if path is None:
        return []
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(
            f"--prompts-file: {path}: expected a readable file, got: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts-file: {path}: expected UTF-8 text, got {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts-file: {path}: expected at least one prompt, got none")
    return prompts


def _jobs(prompts: list[str], seed: int, count: int) -> list[Job]:
    if not prompts:
        raise UsageError('generate: expected a "PROMPT" or --prompts-file, got neither')
    if seed + count > 2**64:
        raise UsageError(f"--count: expected seeds up to 2**64 - 1, got {seed} to {seed + count - 1}")
    return [(prompt, seed + k) for prompt in prompts for k in range(count)]


def _check_out(out: Path, single: bool, force: bool) -> None:
    """What can be known of the output before a model is loaded."""
    is_png = out.suffix.lower() == ".png"
    if single and not is_png:
        raise UsageError(f"output {out}: expected a name ending in .png for one picture or a grid")
    if not single and is_png:
        raise UsageError(f"output {out}: expected a folder for several pictures, or --grid for one .png")
    if not force:
        if out.exists() or out.is_symlink():
            raise OutputExistsError(out)
    elif not single and out.exists():  # --force replaces an earlier result, never somebody's folder
        others = [p.name for p in sorted(out.iterdir()) if p.suffix != ".png"] if out.is_dir() else [out.name]
        if others:
            raise UsageError(f"output {out}: --force replaces a folder of .png files alone, got {others[0]}")


def _draw(generator: Generator, jobs: list[Job]) -> list[Picture]:
    pictures = []
    for prompt, seed in options.progress(jobs, "drawing"):
        pictures.append(generator.draw(prompt, seed))
        dropped = pictures[-1].dropped_tokens
        if dropped and prompt not in {p.prompt for p in pictures[:-1]}:
            log.warning(
                "prompt %r is too long: its last %d tokens were cut, the model reads %d",
                prompt if len(prompt) <= 60 else prompt[:59] + "…",
                dropped,
                generator.spec.max_tokens - 2,
            )
    return pictures


def _write_single(
    generator: Generator, jobs: list[Job], out: Path, force: bool, count: int
) -> tuple[list[Path], list[Picture]]:
    """One picture, or the contact sheet of all: a row per prompt where there are several seeds."""
    from edgeflow.pictures import contact_sheet, save_png
    from edgeflow.staging import staged_output

    with staged_output(out, force=force) as stage:
        pictures = _draw(generator, jobs)
        if len(pictures) == 1:
            save_png(stage, pictures[0].pixels, pictures[0].facts)
        else:
            captions = [
                ("" if count == 1 else f"seed {p.seed}: ") + (p.prompt or "(empty prompt)") for p in pictures
            ]
            columns = count if 1 < count <= 8 and len(jobs) > count else None
            sheet = contact_sheet([p.pixels for p in pictures], captions, columns)
            lists: dict[str, list[Any]] = {
                "prompts": [p.prompt for p in pictures],
                "seeds": [p.seed for p in pictures],
            }
            facts = {key: json.dumps(value, ensure_ascii=False) for key, value in lists.items()}
            save_png(stage, sheet, {**facts, **generator.facts})
    return [out], pictures


def _write_folder(
    generator: Generator, jobs: list[Job], out: Path, force: bool, count: int
) -> tuple[list[Path], list[Picture]]:
    """A numbered PNG per picture, the whole folder at once."""
    from edgeflow.pictures import save_png, slug
    from edgeflow.staging import staged_folder

    # A path without "..", so that the folder's parent and name are what they look like.
    with staged_folder(Path(os.path.abspath(out)), force=force) as stage:  # noqa: PTH100 - links stay links
        pictures = _draw(generator, jobs)
        names = [
            f"{i:03d}-{slug(p.prompt)}{'' if count == 1 else f'-seed{p.seed}'}.png"
            for i, p in enumerate(pictures)
        ]
        for name, picture in zip(names, pictures, strict=True):
            save_png(stage / name, picture.pixels, picture.facts)
    return [out / name for name in names], pictures


def _report(generator: Generator, pictures: list[Picture], paths: list[Path]) -> dict[str, Any]:
    """The result as data: the model's facts, the files, and each picture with its file (or the grid's)."""
    files = paths if len(paths) == len(pictures) else paths * len(pictures)
    return {
        **generator.facts,
        "paths": [str(path) for path in paths],
        "pictures": [
            {
                "path": str(path),
                "prompt": p.prompt,
                "seed": p.seed,
                "size": [p.pixels.shape[1], p.pixels.shape[0]],
                "dropped_tokens": p.dropped_tokens,
                "latency_ms": round(p.latency_ms, 3),
            }
            for path, p in zip(files, pictures, strict=True)
        ],
    }
