"""How much faster training is on more processes.

    python -m edgeflow.training.scaling teacher --data DIR --from RUN --processes 1,2

Each count of processes is a torchrun of its own over the same stage. *Strong* scaling keeps the global batch,
so each process takes less; *weak* scaling keeps each process's batch, so the global batch grows. Efficiency
is pictures/s over (processes × pictures/s of one process). The JSON goes to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from edgeflow.errors import EdgeflowError, TrainingError
from edgeflow.training.config import resolve
from edgeflow.training.presets import PRESETS


def measure(stage: list[str], processes: int, batch_size: int, steps: int, overrides: list[str]) -> float:
    """Pictures/s over the last half of ``steps`` steps; ``stage`` is what follows ``edgeflow train``.

    Raises TrainingError when the run fails; what it said is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = [f"loop.batch_size={batch_size}", f"loop.log_every={max(1, steps // 10)}", *overrides]
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *("-m", "edgeflow.cli", "train", *stage, "-o", str(out)),
            *("--steps", str(steps), "--minutes", "0"),
            *(word for setting in settings for word in ("--set", setting)),
        ]
        threads = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun's own default, but for one process
        if code := subprocess.run(command, stdout=sys.stderr, env=threads).returncode:
            raise TrainingError(
                f"scaling: {processes} processes: expected a finished run, got exit code {code}"
            )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[len(lines) // 2 - 1], lines[-1]
    return (last["step"] - first["step"]) * batch_size / (last["seconds"] - first["seconds"])


def scaling(
    stage: list[str], counts: list[int], batch_size: int, steps: int, modes: list[str], overrides: list[str]
) -> list[dict[str, Any]]:
    """One row per mode and count of processes; the first count is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[int, int], float] = {}
    for mode in modes:
        for count in counts:
            batch = batch_size if mode == "strong" else batch_size * count
            if (count, batch) not in measured:
                measured[count, batch] = measure(stage, count, batch, steps, overrides)
            rows.append(
                {
                    "mode": mode,
                    "processes": count,
                    "batch_size": batch,
                    "images_per_s": measured[count, batch],
                }
            )
        base = rows[-len(counts)]["images_per_s"] / counts[0]
        for row in rows[-len(counts) :]:
            row["efficiency"] = round(row["images_per_s"] / (row["processes"] * base), 4)
            row["images_per_s"] = round(row["images_per_s"], 1)
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("stage")
@click.option("--preset", default="emoji", show_default=True)
@click.option("--data", metavar="DIR")
@click.option("--from", "source", metavar="RUN")
@click.option("--pairs", metavar="DIR")
@click.option("--device", default="auto", show_default=True)
@click.option("--processes", default="1,2", show_default=True, help="Counts, the first one the baseline.")
@click.option("--steps", default=600, show_default=True, help="Of each run; the last half is timed.")
@click.option("--mode", type=click.Choice(["strong", "weak", "both"]), default="both", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in edgeflow train.")
def main(stage: str, preset: str, processes: str, steps: int, mode: str, **options: Any) -> None:
    """Train STAGE on each count of processes and print pictures/s and efficiency as JSON."""
    overrides = list(options.pop("overrides"))
    words = [stage, "--preset", preset, "--device", options["device"]]
    for flag, value in (
        ("--data", options["data"]),
        ("--from", options["source"]),
        ("--pairs", options["pairs"]),
    ):
        words += [flag, value] if value else []
    try:
        config = resolve(PRESETS[preset][stage], None, overrides, {})
        counts = [int(n) for n in processes.split(",")]
        modes = ["strong", "weak"] if mode == "both" else [mode]
        kept = [o for o in overrides if not o.startswith("loop.batch_size=")]
        rows = scaling(words, counts, config.loop.batch_size, steps, modes, kept)
    except (KeyError, ValueError) as error:
        raise click.UsageError(
            f"expected a known preset and stage, and counts like 1,2; got {error}"
        ) from error
    except EdgeflowError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({"stage": stage, "preset": preset, "steps": steps, "runs": rows}, indent=2))


if __name__ == "__main__":
    main()
