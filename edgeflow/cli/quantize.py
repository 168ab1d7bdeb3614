"""``edgeflow quantize``: a checkpoint whose weights are integers, by a recipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeflow import terminal
from edgeflow.cli import options
from edgeflow.errors import OutputExistsError, UsageError
from edgeflow.staging import staged_folder

if TYPE_CHECKING:
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.quantization.apply import QuantizationReport
    from edgeflow.quantization.goal import Goal
    from edgeflow.quantization.search import Found
    from edgeflow.quantization.sensitivity import Features, Sensitivity


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example(
        "edgeflow quantize emoji --recipe w4g32 --rounding gptq -o emoji-w4g32",
        "edgeflow quantize emoji --budget-mib 8 -o emoji-8mib",
    ),
)
@click.argument("model", metavar="MODEL")
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="A shipped recipe (w8, w4g32) or the path of a recipe file.",
)
@click.option(
    "--budget-mib", type=click.FloatRange(0), metavar="N", help="Find the recipe of least error in N MiB."
)
@click.option(
    "--average-bits", type=click.FloatRange(0), metavar="B", help="Find it at B bits a weight, scales apart."
)
@click.option(
    "--max-drop",
    metavar="METRIC=VALUE",
    help="Find the smallest recipe whose pictures stay this near the float ones: psnr=DB, worst_psnr=DB, "
    "feature=DISTANCE.",
)
@click.option(
    "--error",
    type=click.Choice(["picture", "feature"]),
    help="What a layer's error is of: pixels, or features of a network (EfficientNet-Lite0).  "
    "[default: the goal's own, else picture]",
)
@options.count_option(
    "--num-prompts",
    "How many of the model's prompts, or of --calibration's, each layer is measured on.  [default: 4]",
)
@click.option(
    "--search",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write the recipe, the curve and the layers' sensitivity into.",
)
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The sensitivity.json of an earlier search, instead of measuring again.",
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
@options.count_option("--pictures", "How many calibration pictures to draw.", default=64)
@options.out_option("Folder of the quantized checkpoint.")
@options.force_option
@options.json_option
@options.verbosity
def command(
    model: str,
    recipe: str | None,
    rounding: str | None,
    calibration: str | None,
    pictures: int,
    out: Path,
    force: bool,
    as_json: bool,
    **search: Any,
) -> None:
    """Round MODEL's weights to the integers and scales that RECIPE asks for, and write them as a checkpoint.

    MODEL is a built-in model (emoji), a checkpoint folder or a hub id, and must draw in one step. The result
    opens like any checkpoint: generate draws from it, and export writes its very integers to every backend.

    With --budget-mib, --average-bits or --max-drop the recipe is found: each layer is quantized by itself and
    its error measured at the picture, then bits are allocated by integer programming. The budget counts the
    graphs' weights as an fp16 bundle holds them: integers, scales, zero points, and what stays float.

    Exit codes: 0 done, 1 failed, 2 usage (also a recipe that does not fit the model), 4 PyTorch is not
    installed.
    """
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.quantization.recipe import read_recipe

    goal, folder = _goal(recipe, search), search["folder"]
    rules = None if recipe is None else read_recipe(recipe)
    for path in (out, folder) if goal else ():
        if path is not None and path.exists() and not force:  # known before minutes are spent
            raise OutputExistsError(path)
    checkpoint = Checkpoint.open(model)
    from edgeflow.quantization.apply import calibrated_recipe, quantize_checkpoint

    found: Found | None = None
    with ExitStack() as stack:
        say = options.spinner(stack)
        if rules is None:
            assert goal is not None
            found = _search(checkpoint, goal, out.name, {**search, "calibration": calibration}, say)
            rules = found.recipe
            if folder is not None:
                with staged_folder(folder, force=force) as stage:
                    found.write(stage)
        method = rounding or rules.rounding
        prompts = None if found is not None and method == "nearest" else calibration
        rules, drawn = calibrated_recipe(checkpoint, rules, method, prompts, pictures)
        report = quantize_checkpoint(checkpoint, rules, out, calibration=drawn, force=force, progress=say)
    quantized = Checkpoint.open(out)
    if as_json:
        facts = {"path": str(out), "hash": quantized.hash, "bytes": _bytes(quantized)}
        if found is not None:
            facts["curve"] = [asdict(point) for point in found.curve]
        options.print_json({**facts, "source_bytes": _bytes(checkpoint), **report.as_dict()})
        return
    _print(report, out, _bytes(checkpoint), _bytes(quantized))
    if found is not None:
        _print_curve(found)


def _goal(recipe: str | None, search: dict[str, Any]) -> Goal | None:
    """What is to be searched for, or None for a recipe. Raises UsageError unless it is one thing."""
    from edgeflow.quantization.goal import Goal, parse_drop

    names = {key: f"--{key.replace('_', '-')}" for key in ("budget_mib", "average_bits", "max_drop")}
    asked = [flag for key, flag in names.items() if search[key] is not None]
    if len(asked) + (recipe is not None) != 1:
        known = ", ".join(("--recipe", *names.values()))
        raise UsageError(f"quantize: expected one of {known}, got {', '.join(asked) or 'none'}")
    only = {"--search": "folder", "--sensitivity": "sensitivity"}
    only |= {"--num-prompts": "num_prompts", "--error": "error"}
    if not asked:
        if wrong := [flag for flag, key in only.items() if search[key] is not None]:
            raise UsageError(
                f"quantize: {wrong[0]}: expected one of {', '.join(names.values())} to go with it"
            )
        return None
    drop = None if search["max_drop"] is None else parse_drop(search["max_drop"])
    if drop is not None and search["error"] == "picture" and drop[0] == "feature":
        raise UsageError("quantize: --error picture: expected feature, as --max-drop asks for")
    return Goal(search["budget_mib"], search["average_bits"], drop)


def _search(
    checkpoint: Checkpoint, goal: Goal, name: str, options: dict[str, Any], say: Callable[[str], None]
) -> Found:
    from edgeflow.quantization.prompts import calibration_prompts
    from edgeflow.quantization.search import search
    from edgeflow.quantization.sensitivity import Sensitivity

    file, given = options["sensitivity"], options["num_prompts"]
    measured = None if file is None else Sensitivity.read(file)
    prompts = None
    if options["calibration"] is not None:
        prompts, _ = calibration_prompts(checkpoint, options["calibration"])
    known = checkpoint.generation.prompts if prompts is None else prompts
    count = given or (len(measured.prompts) if measured else min(4, len(known)))
    features = _features() if _wants_features(goal, options["error"], measured) else None
    return search(
        checkpoint,
        goal,
        name,
        num_prompts=count,
        given=prompts,
        features=features,
        measured=measured,
        progress=say,
    )


def _wants_features(goal: Goal, error: str | None, measured: Sensitivity | None) -> bool:
    """Whether layers are judged by features: as asked, as the goal is, or as they were measured."""
    if error is None and goal.drop is None:
        return measured is not None and measured.error == "feature"
    return error == "feature" or (goal.drop is not None and goal.drop[0] == "feature")


def _features() -> Features:
    """The network of the training losses; another one judges quality. Raises BackendMissing."""
    from edgeflow.training.losses import LiteFeatures

    with contextlib.redirect_stdout(sys.stderr):  # the package says there that it has loaded
        return LiteFeatures()


def _print_curve(found: Found) -> None:
    """Size against quality, the chosen point marked."""
    from rich.table import Table

    features = found.sensitivity.error == "feature"
    title = "PSNR of the picture against the float model, dB" + ("; distance of features" * features)
    table = Table(box=None, title=title, title_justify="left")
    titles = ["", "MiB", "bits", "predicted", "measured", "fresh noise", "worst prompt"]
    if features:
        del titles[3]
        titles += ["predicted distance", "measured", "fresh noise"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for p in found.curve:
        psnr = (p.predicted_psnr_db, p.psnr_db, p.fresh_psnr_db, p.fresh_worst_psnr_db)
        row = [f"{value:.1f}" for value in psnr if value is not None]
        row += [f"{x:.4f}" for x in (p.predicted_feature, p.feature, p.fresh_feature) if x is not None]
        table.add_row("→" if p.chosen else "", f"{p.size_mib:.2f}", f"{p.average_bits:.2f}", *row)
    terminal.show([table])


def _bytes(checkpoint: object) -> int:
    from edgeflow.inspect import describe_checkpoint

    return describe_checkpoint(checkpoint)["bytes"]  # type: ignore[arg-type]


def _print(report: QuantizationReport, out: Path, before: int, after: int) -> None:
    """A line for each component and scheme, then what the recipe could not do, then the sizes."""
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
        kib = (sum(x.bytes_before for x in layers) / 1024, sum(x.bytes_after for x in layers) / 1024)
        table.add_row(*key, str(len(layers)), *(f"{n:.1f}" for n in kib), sqnr, worst.layer)
    sizes = f"{before / 2**20:.2f} MiB before, {after / 2**20:.2f} MiB after"
    terminal.show([table, *report.notes, f"{out}: {sizes}, recipe {report.recipe}"])
