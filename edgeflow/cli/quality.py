"""``edgeflow quality``: how good a model's pictures are, held against real ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from edgeflow.cli import options
from edgeflow.errors import OutputExistsError, UsageError, needs
from edgeflow.quality import print_report
from edgeflow.staging import staged_folder

_PATH = click.Path(path_type=Path)
#: Options of plain measuring alone and of the verdict alone, as they are unless they are given.
_PLAIN: dict[str, Any] = {
    "teacher": None,
    "steps": (),
    "nfe_curve": False,
    "per_prompt": 1,
    "inception": None,
    "clip": None,
}
_VERDICT: dict[str, Any] = {"gates": (), "speed": False, "html": None, "sensitivity": ()}


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example(
        "edgeflow quality emoji --data data/emoji",
        "edgeflow quality runs/reflow emoji --data data/emoji --teacher runs/teacher --nfe-curve -o quality",
        "edgeflow quality bundles/* --against emoji --data data/emoji --gate kid=noise --html verdict.html",
    ),
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--data",
    type=_PATH,
    required=True,
    metavar="DIR",
    help="Captioned pictures with the splits train and test.",
)
@click.option(
    "--teacher", metavar="MODEL", help="Also measure the gap to this model's pictures of the same noise."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Draw models of many steps in N; may repeat.  [default: each model's own]",
)
@click.option("--nfe-curve", is_flag=True, help="Also draw rectified flows in 1, 2, 4, 8 and 25 Euler steps.")
@click.option(
    "--split",
    type=click.Choice(["test", "train"]),
    default="test",
    show_default=True,
    help="Whose captions are the prompts.",
)
@options.count_option("--num-prompts", "How many captions, drawn by the seed.  [default: all]", least=4)
@options.count_option("--per-prompt", "Pictures a caption, each from a seed of its own.", default=1, of="K")
@click.option(
    "--inception",
    type=_PATH,
    metavar="FILE",
    help="Inception v3 weights (torch-fidelity's): also the standard FID and KID.",
)
@click.option("--clip", type=_PATH, metavar="FOLDER", help="A CLIP model's folder: also the CLIP score.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "cuda", "auto"]),
    help="Where to draw, and to run the network that judges (on a GPU in float64).",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="The verdict: what each MODEL lost against this one, on the same noise.",
)
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="NAME=VALUE,...",
    help="With --against: a limit, or NAME=noise for not measurably worse; exit code 3 where one fails.",
)
@click.option(
    "--speed",
    is_flag=True,
    help="With --against: also time each model in processes of its own, in turns, and weigh its memory.",
)
@click.option(
    "--html",
    type=_PATH,
    metavar="FILE",
    help="With --against: the verdict as one HTML file, with pictures and plots.",
)
@click.option(
    "--sensitivity",
    type=_PATH,
    multiple=True,
    metavar="FILE",
    help="With --html: a recipe or report with layers' sensitivities to show; may repeat.",
)
@options.out_option("Folder to write: quality.json and the sheets.", required=False)
@options.seed_option
@options.force_option
@options.json_option
@options.verbosity
def command(against: str | None, **given: Any) -> None:
    """Measure how good each MODEL's pictures are: a checkpoint, a training run or a bundle.

    One picture is drawn for each caption of the split: the (concept, style) pairs that no training saw.
    KID (unbiased) and the Fréchet distance hold them against real pictures, precision and recall say how
    many are like real ones and how many real ones are reached, R@1 how often a picture finds its own caption
    among 100, Nearest and Copies whether training pictures are repeated. Each stands under its floor: the
    same figure for real pictures at the same counts.

    With --against, each MODEL is compared with that one on the same prompts and noise, a bundle in its own
    runtime: differences of KID, FD and R@1 with paired bootstrap intervals, so that "inside the noise" is a
    measurement, PSNR and feature distance of the pictures, and gates.

    Exit codes: 0 done, 1 failed, 2 usage, 3 a gate failed, 4 a package is not installed.
    """
    if against is None:
        _refuse(given, _VERDICT, "expected --against MODEL with it")
        _measure(**{name: value for name, value in given.items() if name not in _VERDICT})
        return
    _refuse(given, _PLAIN, "not with --against, which compares one-step models")
    from edgeflow.cli.verdict import Asked, run_verdict

    kept = {name: value for name, value in given.items() if name not in _PLAIN}
    run_verdict(Asked(against=against, **kept), options.bars)


def _refuse(given: Mapping[str, Any], names: Mapping[str, Any], reason: str) -> None:
    """Raises UsageError for the first option of ``names`` that is not what it is unless it is given."""
    for name, unless_given in names.items():
        if given[name] != unless_given:
            raise UsageError(f"--{'gate' if name == 'gates' else name.replace('_', '-')}: {reason}")


def _measure(
    *,
    models: tuple[str, ...],
    data: Path,
    teacher: str | None,
    steps: tuple[int, ...],
    nfe_curve: bool,
    split: str,
    num_prompts: int | None,
    per_prompt: int,
    inception: Path | None,
    clip: Path | None,
    device: str,
    out: Path | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Draw, judge, write and print."""
    if out is not None and (out.exists() or out.is_symlink()) and not force:
        raise OutputExistsError(out)  # before an hour's drawing, not after it
    with needs("train"):
        from edgeflow.training.drawing import open_drawers
        from edgeflow.training.evaluate import Request, measure
        from edgeflow.training.quality_sheets import write_outputs
        from edgeflow.training.run import pick_device
    request = Request(
        data=data,
        drawers=open_drawers(models, steps, nfe_curve=nfe_curve),
        teacher=open_drawers([teacher])[0] if teacher else None,
        split=split,
        num_prompts=num_prompts,
        per_prompt=per_prompt,
        seed=seed,
        inception=inception,
        clip=clip,
        device=str(pick_device(device)),
    )
    with ExitStack() as stack:
        measured = measure(request, options.bars(stack))
    if out is not None:
        with staged_folder(out, force=force) as folder:
            write_outputs(folder, measured)
    print_report(measured.report, as_json=as_json)
