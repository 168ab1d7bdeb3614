"""``edgeflow parity``: how close each bundle is to PyTorch."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from edgeflow.cli import options


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example("edgeflow parity bundles/onnx-pipeline-fp16 --against emoji --gate lowering=45"),
)
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="MODEL",
    help="The checkpoint to compare with: a built-in name, a folder or a hub id. By default the one that the "
    "bundle names; where it is absent, the bundle's own reference outputs.",
)
@click.option(
    "--unquantized",
    metavar="MODEL",
    help="The float checkpoint that a quantized one was made from, for the quantization gap. By default the "
    "one that the quantized checkpoint names.",
)
@click.option("--runtime", metavar="NAME", help="The runtime to measure; by default the bundle's own.")
@options.count_option(
    "--num-prompts",
    "How many of the model's prompts to measure, prompt i with seed i.  [default: 4, or all if fewer]",
)
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another limit for a gate: rewrite, lowering, end-to-end (dB, at least), rewrite-max-abs (at most).",
)
@options.json_option
@options.verbosity
def command(
    bundles: tuple[Path, ...],
    against: str | None,
    unquantized: str | None,
    runtime: str | None,
    num_prompts: int | None,
    gates: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure how close each BUNDLE is to PyTorch, on real prompts, in one table.

    Each gap is measured and gated by itself: rewrite (the original modules and the export-ready ones),
    lowering (the export-ready modules and each graph in its runtime), quantization (the float checkpoint
    and the quantized one; only a recipe's own gates limit it), end to end (PyTorch's picture and the
    runtime's). SQNR and PSNR are in dB, higher is closer; the worst prompt is what is gated.

    Exit codes: 0 every gate holds, 1 failed, 2 usage, 3 a gate failed (the table is printed all the same),
    4 a backend is not installed.
    """
    from edgeflow.parity import run_and_print
    from edgeflow.parity_report import parse_gates

    limits = parse_gates(gates)
    with ExitStack() as stack:
        run_and_print(
            list(bundles),
            against=against,
            runtime=runtime,
            num_prompts=num_prompts,
            gates=limits,
            unquantized=unquantized,
            as_json=as_json,
            progress=options.spinner(stack),
        )
