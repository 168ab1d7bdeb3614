"""``edgeflow train STAGE``: one stage of the pipeline, from files to files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from edgeflow.cli.options import (
    CONTEXT,
    example,
    force_option,
    json_option,
    out_option,
    print_json,
    verbosity,
)
from edgeflow.errors import needs

_FOLDER = click.Path(path_type=Path)


@click.command(
    context_settings=CONTEXT,
    short_help="Train one stage.",
    epilog=example(
        "edgeflow train teacher --preset emoji --data data --from runs/autoencoder -o runs/teacher"
    ),
)
@click.argument("stage", metavar="STAGE")
@click.option(
    "--preset",
    default="emoji",
    show_default=True,
    help="Preset to start from: tiny, emoji, sd15 or sd15-second.",
)
@click.option(
    "--data",
    type=_FOLDER,
    metavar="DIR",
    help="Captioned pictures (autoencoder, teacher, pairs, adversarial).",
)
@click.option(
    "--from",
    "--teacher",
    "source",
    type=_FOLDER,
    metavar="RUN",
    help="Run, checkpoint folder or hub id that the stage starts from.",
)
@click.option("--pairs", type=_FOLDER, metavar="DIR", help="Folder of pairs (reflow, distill, adversarial).")
@click.option(
    "--flow", type=_FOLDER, metavar="RUN", help="Flow that draws distill's online targets [--from]."
)
@click.option(
    "--prompts", type=_FOLDER, metavar="FILE", help="Captions, one a line, in place of --data (pairs, qat)."
)
@click.option("--recipe", metavar="NAME|FILE", help="Recipe whose integers are trained (qat).")
@out_option("Run folder to write.")
@click.option("--config", "toml", type=_FOLDER, metavar="FILE", help="TOML file over the preset.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. loop.batch_size=64."
)
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Steps in all (pairs: number of pairs).")
@click.option("--minutes", type=click.FloatRange(0), metavar="M", help="Stop after M minutes of this call.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), metavar="N", help="Seed of all randomness [preset: 0]."
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--resume", is_flag=True, help="Continue the run in the output folder.")
@click.option("--dry-run", is_flag=True, help="Print what the run would be, and write nothing.")
@force_option
@json_option
@verbosity
def command(as_json: bool, **options: Any) -> None:
    """Train one stage of the one-step model: STAGE is one of those below.

    \b
    autoencoder  --data                    pictures to small latents and back
    teacher      --data --from AUTOENCODER a small Stable Diffusion
    pairs        --data|--prompts --teacher TEACHER
                                           noise, caption and the teacher's picture
    reflow       --pairs --from TEACHER    a flow with straight paths
    distill      --pairs --from REFLOW     the whole path in one step
    adversarial  --pairs --from DISTILL    sharper: against a discriminator (with --data, on real pictures)
    qat          --recipe --pairs --from DISTILL   the same pictures from a recipe's integers

    Each stage writes its configuration, a metrics log, a sample sheet and a checkpoint into the run folder,
    and continues with --resume, also after it was killed. On several GPUs: torchrun -m edgeflow.cli train …
    Exit codes: 0 done, 1 failed, 2 usage, 4 backend not installed.
    """
    with needs("train"):
        from edgeflow.training.plan import render
        from edgeflow.training.run import Request, plan_stage, run_stage
    flags = {name: options.pop(name) for name in ("steps", "minutes", "seed")}
    request = Request(flags=flags, **options)
    if request.dry_run:
        plan = plan_stage(request)
    else:
        out = run_stage(request)
    if os.environ.get("RANK", "0") != "0":  # of many processes the first one speaks
        return
    if request.dry_run:
        print_json(plan) if as_json else click.echo(render(plan))
    elif as_json:
        print_json({"stage": options["stage"], "run": str(out)})
    else:
        click.echo(str(out))
