"""The paper's table at this scale: is straightening the paths first worth its time? One command a seed.

    python -m edgeflow.training.paper_table --data DIR --teacher RUN --pairs DIR -o OUT --seed 0
    python -m edgeflow.training.paper_table --combine OUT0 OUT1

InstaFlow (arXiv 2309.06380) compares, from one teacher, distilling it directly with straightening its flow
first (reflow) and distilling that, at equal cost. This runs the same arms on the same pairs, M being
``--minutes``:

========== ====================================== ======= ==============================================
stage      starts from                            minutes objective
========== ====================================== ======= ==============================================
reflow     the teacher                            M       the 2-rectified flow
distilled  the 2-rectified flow                   M       one step; targets: the 2-rectified flow's own ODE
direct     the teacher                            2·M     one step; targets: the teacher's pictures (pairs)
small      the 2-rectified flow's matching blocks 2/3·M   as ``distilled``, half the parameters or less
========== ====================================== ======= ==============================================

Every stage is ``edgeflow train`` in a process of its own, its minutes the loop's wall time, compilation
apart. A stage that is finished is kept: the same command goes on where it was cut short. Then all rows are
measured at once on the same captions and noise. ``OUT/table.json`` (schema 1) holds rows, stages, settings
and machine.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeflow.cli import main, options
from edgeflow.errors import UsageError
from edgeflow.staging import staged_folder
from edgeflow.training import paper_report

_LOG = logging.getLogger("edgeflow")
_PATH = click.Path(path_type=Path)


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example(
        "python -m edgeflow.training.paper_table --data data --teacher teacher --pairs pairs -o seed0",
        "python -m edgeflow.training.paper_table --combine seed0 seed1",
    ),
)
@click.argument("tables", nargs=-1, type=_PATH, metavar="[OUT...]")
@click.option("--combine", is_flag=True, help="Print the tables of the folders OUT as one, as Markdown.")
@click.option("--data", type=_PATH, metavar="DIR", help="Captioned pictures with the splits train and test.")
@click.option("--teacher", type=_PATH, metavar="RUN", help="The teacher's run or checkpoint.")
@click.option("--pairs", type=_PATH, metavar="DIR", help="Pairs of the teacher.  [default: draw them first]")
@options.out_option(
    "Folder of one seed's runs and table (with --combine: table.md, table.json).", required=False
)
@options.seed_option
@click.option("--preset", default="emoji", show_default=True, help="Preset of every stage: tiny or emoji.")
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    default=1.3,
    show_default=True,
    metavar="M",
    help="Of reflow and of distillation, each; direct distillation gets 2·M; 0: the preset's steps alone.",
)
@click.option(
    "--target-steps",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    metavar="N",
    help="Euler steps of the 2-rectified flow to a target; 0: the teacher's pictures are the targets.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of every stage.")
@click.option("--num-prompts", type=click.IntRange(4), metavar="N", help="How many captions.  [default: all]")
@click.option("--per-prompt", type=click.IntRange(1), default=1, show_default=True, metavar="K")
@click.option("--num-paths", type=click.IntRange(2), default=1024, show_default=True, metavar="N")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@options.force_option
@options.json_option
@options.verbosity
def command(tables: tuple[Path, ...], combine: bool, as_json: bool, **given: Any) -> None:
    """Train and measure one seed of the paper's table, or combine several.

    Direct distillation, reflow, distillation after reflow and a small student, on the same pairs and at
    matched minutes; then one table of all of them beside the teacher. Finished stages are kept: the same
    command goes on.

    Exit codes: 0 done, 1 failed, 2 usage, 4 a package is not installed.
    """
    if combine:
        if not tables:
            raise UsageError("table: --combine: expected the folders of one seed or more, got none")
        _show(paper_report.combine(paper_report.read_tables(tables)), given["out"], given["force"], as_json)
        return
    if tables:
        raise UsageError(f"table: {tables[0]}: expected options alone, got an argument; --combine takes them")
    missing = [f"--{k}" for k in ("data", "teacher", "out") if given[k] is None]
    if missing:
        raise UsageError(f"table: needs {', '.join(missing)}")
    table = _make(given)
    _show(paper_report.combine([table]), None, False, as_json)


def _make(given: dict[str, Any]) -> dict[str, Any]:
    """Train what is not trained yet, measure, and write ``table.json`` and the sheets."""
    from edgeflow.training.evaluate import check_judges
    from edgeflow.training.paper_measure import Sizes, measure_table
    from edgeflow.training.paper_stages import Plan, check_plan, run_stages
    from edgeflow.training.quality_sheets import write_outputs

    names = ("num_prompts", "per_prompt", "num_paths")
    sizes = Sizes(**{name: given.pop(name) for name in names})
    force = given.pop("force")
    plan = Plan(**given)
    check_plan(plan)
    check_judges()
    run_stages(plan, force=force)
    table, measured = measure_table(plan, sizes, _note)
    with staged_folder(plan.out / "quality", force=True) as folder:
        write_outputs(folder, measured)
    text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    (plan.out / "table.json").write_text(text, encoding="utf-8")
    return table


def _note(name: str, total: int) -> Callable[[int], None]:
    """Each step of measuring as a line on stderr: the run may have no terminal."""
    _LOG.info(f"table: {name}")
    return lambda done: None


def _show(table: dict[str, Any], out: Path | None, force: bool, as_json: bool) -> None:
    if out is not None:
        with staged_folder(out, force=force) as folder:
            text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
            (folder / "table.json").write_text(text, encoding="utf-8")
            (folder / "table.md").write_text(paper_report.render(table), encoding="utf-8")
    if as_json:
        options.print_json(table)
    else:
        click.echo(paper_report.render(table), nl=False)


if __name__ == "__main__":
    sys.exit(main(program=command, name="python -m edgeflow.training.paper_table"))
