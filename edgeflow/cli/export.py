"""``edgeflow export``: a checkpoint to bundles for ONNX, OpenVINO and Core ML."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeflow import terminal
from edgeflow.cli import options
from edgeflow.cli.changes import change_options, opened

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle
    from edgeflow.export_plan import ExportPlan
    from edgeflow.parity_report import ParityReport


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example("edgeflow export emoji --to onnx --to openvino --precision fp16 -o bundles"),
)
@click.argument("model", metavar="MODEL")
@click.option(
    "--to",
    "backends",
    multiple=True,
    required=True,
    metavar="BACKEND",
    help="Backend to export to: onnx, openvino, coreml or cuda (which needs an NVIDIA GPU); may repeat.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("fp32",),
    show_default="fp32",
    metavar="NAME",
    help="fp32 or fp16, for cuda also bf16; may repeat.",
)
@click.option(
    "--graph",
    "layouts",
    multiple=True,
    default=("pipeline",),
    show_default="pipeline",
    metavar="LAYOUT",
    help="pipeline, the whole generator as one graph, or components, the three graphs by the names that the "
    "backend's other clients look for; may repeat.",
)
@click.option(
    "--picture",
    default="float32",
    show_default=True,
    metavar="DTYPE",
    help="What the pipeline graph draws: float32 in [0, 1] or uint8.",
)
@click.option(
    "--strict-precision",
    "strict",
    is_flag=True,
    help="An operation that would overflow float16 is an error; else it stays float32 in fp16 bundles.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many of the model's prompts the bundle's reference holds; on them every value is checked to "
    "be finite.  [default: 4, or 1 for a model of a GiB or more]",
)
@click.option(
    "--attention",
    default="fused",
    show_default=True,
    metavar="NAME",
    help="For coreml: fused, one operation where the target has it (iOS18), or split-einsum, the layout of "
    "Apple's Neural Engine.",
)
@click.option(
    "--target",
    metavar="SYSTEM",
    help="For coreml: the earliest system that runs it, iOS15 to iOS18 or macOS12 to macOS15.  "
    "[default: the earliest that has what the program needs]",
)
@click.option(
    "--chunks",
    type=int,
    metavar="N",
    help="For coreml's components: the UNet in 1 or 2 packages.  [default: 2 for iOS from a GB on, else 1]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, with what it will take, and write nothing.")
@click.option("--parity/--no-parity", default=True, help="Measure the bundles against PyTorch afterwards.")
@change_options
@options.out_option("Folder for the bundles, each at <backend>-<graph>-<precision>.")
@options.force_option
@options.json_option
@options.verbosity
def command(
    model: str,
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    layouts: tuple[str, ...],
    picture: str,
    strict: bool,
    num_prompts: int | None,
    attention: str,
    target: str | None,
    chunks: int | None,
    dry_run: bool,
    parity: bool,
    changes: dict[str, Any],
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Export MODEL, one bundle for each backend, graph layout and precision, and measure their parity.

    MODEL is a built-in model (emoji), a checkpoint folder, one safetensors file or a hub id, and must draw in
    one step. All bundles
    appear at the end, or none does. Equal inputs give equal bytes.

    A model of a GiB or more in fp32 is exported and measured in processes of its own, one graph at a time.
    A plan that the disk, or for such a model the memory, cannot hold is refused before work starts (exit
    code 1), with --dry-run too.

    Exit codes: 0 done, 1 failed, 2 usage, 3 a parity gate failed (the bundles are written all the same),
    4 a backend is not installed.
    """
    from edgeflow.apple import AppleSettings
    from edgeflow.bundle import Bundle
    from edgeflow.export import export_model, plan, plan_of

    apple = AppleSettings(attention, target, chunks)
    jobs = plan(backends, precisions, layouts, picture, apple)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(opened(model, changes))
        planned = plan_of(checkpoint, jobs, out, num_prompts, parity=parity)
        if dry_run:
            return _print_plan(planned, as_json)
        planned.check()
        say = options.spinner(stack)
        paths = export_model(
            checkpoint,
            backends=backends,
            precisions=precisions,
            layouts=layouts,
            picture=picture,
            out=out,
            force=force,
            strict=strict,
            num_prompts=num_prompts,
            apple=apple,
            progress=say,
        )
        bundles, report = [Bundle.open(path) for path in paths], None  # verified once, for both
        if parity:
            from edgeflow.parity import measure

            report = measure(bundles, against=checkpoint, progress=say)
    _print(bundles, report, as_json)
    if report is not None:
        report.check()


def _print_plan(planned: ExportPlan, as_json: bool) -> None:
    if as_json:
        options.print_json(planned.as_dict())
    else:
        click.echo(planned.render())
    planned.check()


def _print(opened: list[Bundle], report: ParityReport | None, as_json: bool) -> None:
    """The bundles and their sizes, then the parity report."""
    bundles = [_facts(bundle) for bundle in opened]
    if as_json:
        options.print_json({"bundles": bundles, "parity": report.as_dict() if report else None})
        return
    from rich.table import Table

    table = Table(box=None)
    for column in ("bundle", "backend", "graph", "precision"):
        table.add_column(column, no_wrap=True)
    table.add_column("graphs MiB", justify="right")
    table.add_column("in all MiB", justify="right")
    table.add_column("ops kept fp32", justify="right")
    for facts in bundles:
        texts = [str(facts[key]) for key in ("path", "backend", "graph", "precision")]
        texts += [f"{facts['graphs_mib']:.2f}", f"{facts['size_mib']:.2f}"]
        table.add_row(*texts, str(sum(map(len, facts["fp32_ops"].values()))) if _is_half(facts) else "")
    kept = [
        f"{facts['path']}: {graph}: float32, as float16 would overflow: {', '.join(ops)}"
        for facts in bundles
        for graph, ops in facts["fp32_ops"].items()
    ]
    terminal.show([table, *kept])
    if report is not None:
        from edgeflow.parity_report import print_report

        click.echo()
        print_report(report)


def _is_half(facts: dict[str, Any]) -> bool:
    return facts["precision"] == "fp16"


def _facts(bundle: Bundle) -> dict[str, Any]:
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    return {
        "path": str(bundle.root),
        "backend": bundle.manifest.backend,
        "graph": bundle.manifest.layout,
        "precision": bundle.manifest.precision,
        "graphs_mib": bundle.graph_bytes() / 2**20,
        "size_mib": size / 2**20,
        "fp32_ops": {graph: list(ops) for graph, ops in bundle.manifest.fp32_ops.items()},
    }
