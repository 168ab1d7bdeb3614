"""``edgeflow data SET``: make a captioned picture set to train on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from edgeflow import terminal
from edgeflow.cli.options import (
    CONTEXT,
    bar,
    count_option,
    example,
    force_option,
    json_option,
    out_option,
    print_json,
    seed_option,
    verbosity,
)
from edgeflow.errors import OutputExistsError


@click.group(
    "data",
    context_settings=CONTEXT,
    short_help="Make a captioned picture set to train on.",
    epilog=example("edgeflow data emoji -o data/emoji"),
)
def command() -> None:
    """Make a captioned picture set to train on, and the captions to draw from it."""


@command.command(
    "emoji",
    short_help="Open emoji artwork with its names as captions.",
    epilog=example("edgeflow data emoji -o data/emoji"),
)
@out_option("Folder to write: webdataset shards, README.md, dataset.json.")
@count_option("--size", "Side of the pictures.", least=8, most=1024, default=128, of="PIXELS")
@count_option("--limit", "Only so many concepts (for a quick try).")
@force_option
@json_option
@verbosity
def emoji(out: Path, size: int, limit: int | None, force: bool, as_json: bool) -> None:
    """Open emoji artwork as a text-to-image set: about 8,000 pictures in six styles.

    The artwork is fetched by the npm client (Node.js) at pinned versions and checked against pinned hashes,
    rendered on white, captioned with its name and style, and split so that the test pictures are concepts
    seen in training only in other styles. The same command gives the same bytes.

    Exit codes: 0 done, 1 failed, 2 usage, 4 backend not installed.
    """
    from edgeflow.training.emoji import build_emoji

    with ExitStack() as stack:
        made = build_emoji(out, size=size, limit=limit, force=force, progress=bar(stack))
    if as_json:
        print_json({"path": str(made.path), **made.summary})
    else:
        _print_table(made.summary)
        click.echo(str(made.path))


@command.command(
    "captions",
    short_help="A set's captions, one a line, to draw pairs from.",
    epilog=example("edgeflow data captions data/emoji --composed -o captions.txt"),
)
@click.argument("data", type=click.Path(path_type=Path), metavar="DATA")
@out_option("Text file to write: a caption a line.")
@click.option(
    "--composed",
    is_flag=True,
    help="Also every known concept in every known style that has no picture in any split.",
)
@count_option("--composed-times", "Each of these on K lines: K times the pairs.", default=1, of="K")
@count_option(
    "--recombined",
    "Also N captions of the beginning of one concept and the end of another.",
    least=0,
    default=0,
)
@seed_option
@force_option
@json_option
@verbosity
def captions(
    data: Path,
    out: Path,
    composed: bool,
    composed_times: int,
    recombined: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Write the training captions of the set DATA into a text file, mixed, one a line.

    The captions of split test are never among them, so what is trained on this file's captions can be judged
    by those.

    Exit codes: 0 done, 1 failed, 2 usage, 4 backend not installed.
    """
    from edgeflow.training.captions import collect_captions, write_caption_lines

    if out.exists() and not force:
        raise OutputExistsError(out)  # before the set is read
    found = collect_captions(data, composed=composed, recombined=recombined, seed=seed)
    write_caption_lines(out, found.mixed(composed_times), force=force)
    counts = {name: len(getattr(found, name)) for name in ("train", "composed", "recombined")}
    if as_json:
        print_json({"path": str(out), **counts, "held_out": found.held_out})
    else:
        click.echo(", ".join(f"{number:,} {name}" for name, number in counts.items()), err=True)
        click.echo(str(out))


def _print_table(summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("style", "licence", *(_right(name) for name in ("train", "test", "left out")))
    for source in summary["sources"]:
        left_out = sum(source["dropped"].values())
        numbers = (source["train"], source["test"], left_out)
        table.add_row(source["style"], source["licence"], *(f"{number:,}" for number in numbers))
    images = summary["num_images"]
    table.add_section()
    table.add_row(
        f"{summary['num_concepts']:,} concepts", "", f"{images['train']:,}", f"{images['test']:,}", ""
    )
    terminal.show([table])


def _right(header: str) -> Any:
    from rich.table import Column

    return Column(header, justify="right")
