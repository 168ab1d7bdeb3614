"""``edgeflow quantize``: a checkpoint whose weights are integers, by a recipe."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeflow.cli import options

if TYPE_CHECKING:
    from edgeflow.quantization.apply import QuantizationReport


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example("edgeflow quantize emoji --recipe w4g32 --rounding gptq -o emoji-w4g32"),
)
@click.argument("model", metavar="MODEL")
@click.option(
    "--recipe",
    required=True,
    metavar="NAME|FILE",
    help="A shipped recipe (w8, w4g32) or the path of a recipe file.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "gptq"]),
    help="How integers are chosen: each weight by itself, or so that layers keep their outputs on "
    "calibration prompts.  [default: the recipe's]",
)
@click.option(
    "--calibration",
    metavar="NAME|FILE",
    help="Prompts to calibrate on: a shipped list or a text file, one a line.  "
    "[default: the list of the model's name]",
)
@click.option(
    "--pictures",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="How many calibration pictures to draw.",
)
@options.out_option("Folder of the quantized checkpoint.")
@options.force_option
@options.json_option
@options.verbosity
def command(
    model: str,
    recipe: str,
    rounding: str | None,
    calibration: str | None,
    pictures: int,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Round MODEL's weights to the integers and scales that RECIPE asks for, and write them as a checkpoint.

    MODEL is a built-in model (emoji), a checkpoint folder or a hub id, and must draw in one step. The result
    opens like any checkpoint: generate draws from it, and export writes its very integers to every backend.

    Exit codes: 0 done, 1 failed, 2 usage (also a recipe that does not fit the model), 4 PyTorch is not
    installed.
    """
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.quantization.recipe import read_recipe

    rules = read_recipe(recipe)
    checkpoint = Checkpoint.open(model)
    from edgeflow.quantization.apply import calibrated_recipe, quantize_checkpoint

    rules, drawn = calibrated_recipe(checkpoint, rules, rounding or rules.rounding, calibration, pictures)
    with ExitStack() as stack:
        say = options.spinner(stack)
        report = quantize_checkpoint(checkpoint, rules, out, calibration=drawn, force=force, progress=say)
    quantized = Checkpoint.open(out)
    if as_json:
        facts = {"path": str(out), "hash": quantized.hash, "bytes": _bytes(quantized)}
        options.print_json({**facts, "source_bytes": _bytes(checkpoint), **report.as_dict()})
        return
    _print(report, out, _bytes(checkpoint), _bytes(quantized))


def _bytes(checkpoint: object) -> int:
    from edgeflow.inspect import describe_checkpoint

    return describe_checkpoint(checkpoint)["bytes"]  # type: ignore[arg-type]


def _print(report: QuantizationReport, out: Path, before: int, after: int) -> None:
    """A line for each component and scheme, then what the recipe could not do, then the sizes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("component", "scheme"):
        table.add_column(column, no_wrap=True)
    for column in ("layers", "before KiB", "after KiB", "worst weight SQNR", "of layer"):
        table.add_column(column, justify="right", no_wrap=True)
    for key in dict.fromkeys((layer.component, layer.scheme) for layer in report.layers):
        layers = [layer for layer in report.layers if (layer.component, layer.scheme) == key]
        worst = min(layers, key=lambda x: float("inf") if x.weight_sqnr_db is None else x.weight_sqnr_db)
        sqnr = "–" if worst.weight_sqnr_db is None else f"{worst.weight_sqnr_db:.1f} dB"
        sizes = (sum(x.bytes_before for x in layers), sum(x.bytes_after for x in layers))
        table.add_row(*key, str(len(layers)), *(f"{n / 1024:.1f}" for n in sizes), sqnr, worst.layer)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 240  # a pipe's reader gets whole lines
    console.print(table)
    for note in report.notes:
        console.print(note)
    console.print(
        f"{out}: {before / 2**20:.2f} MiB before, {after / 2**20:.2f} MiB after, recipe {report.recipe}"
    )
