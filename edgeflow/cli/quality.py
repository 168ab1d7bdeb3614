"""``edgeflow quality``: how good a model's pictures are, held against real ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click

from edgeflow.cli import options
from edgeflow.errors import BackendMissing, UsageError

_PATH = click.Path(path_type=Path)


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
@click.option(
    "--num-prompts",
    type=click.IntRange(4),
    metavar="N",
    help="How many captions, drawn by the seed.  [default: all]",
)
@click.option(
    "--per-prompt",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="K",
    help="Pictures a caption, each from a seed of its own.",
)
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
    help="Where to draw; judging is on the CPU.",
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
def command(
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
    against: str | None,
    gates: tuple[str, ...],
    speed: bool,
    html: Path | None,
    sensitivity: tuple[Path, ...],
    out: Path | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
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
    from edgeflow.errors import OutputExistsError
    from edgeflow.quality import print_report

    if against is not None:
        _refuse_with_against(
            teacher=teacher, steps=steps, nfe_curve=nfe_curve, inception=inception, clip=clip
        )
        from edgeflow.cli.verdict import Asked, run_verdict

        asked = Asked(
            models=models, against=against, data=data, split=split, num_prompts=num_prompts, seed=seed,
            device=device, gates=gates, speed=speed, html=html, sensitivity=sensitivity, out=out,
            force=force, as_json=as_json,
        )  # fmt: skip
        run_verdict(asked, _progress)
        return
    _refuse_without_against(gate=gates, speed=speed, html=html, sensitivity=sensitivity)
    if out is not None and (out.exists() or out.is_symlink()) and not force:
        raise OutputExistsError(out)  # before an hour's drawing, not after it
    try:
        from edgeflow.training.drawing import open_drawers
        from edgeflow.training.evaluate import Request, measure
        from edgeflow.training.quality_sheets import write_outputs
        from edgeflow.training.run import pick_device
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edgeflow"):
            raise
        raise BackendMissing(error.name or "torch", "train") from error
    drawers = open_drawers(models, steps, nfe_curve=nfe_curve)
    request = Request(
        data=data,
        drawers=drawers,
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
        measured = measure(request, _progress(stack))
    if out is not None:
        from edgeflow.staging import staged_folder

        with staged_folder(out, force=force) as folder:
            write_outputs(folder, measured)
    print_report(measured.report, as_json=as_json)


def _refuse_with_against(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise UsageError(
                f"--{name.replace('_', '-')}: not with --against, which compares one-step models"
            )


def _refuse_without_against(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')}: expected --against MODEL with it")


def _progress(stack: ExitStack) -> Callable[[str, int], Callable[[int], None]]:
    """A bar a step of the work on stderr, where there is a terminal to show it."""
    if not options.show_progress():
        return lambda name, total: lambda done: None
    from rich.console import Console
    from rich.progress import Progress

    bars = stack.enter_context(Progress(console=Console(stderr=True), transient=True))

    def begin(name: str, total: int) -> Callable[[int], None]:
        task = bars.add_task(name, total=total)
        return lambda done: bars.advance(task, done)

    return begin
