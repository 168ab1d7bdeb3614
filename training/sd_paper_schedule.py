"""What measured speeds mean for the paper's schedule, and how they are told. A row is one measurement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
#: The paper's stages for InstaFlow-0.9B (arXiv 2309.06380, section 5 and appendix): images seen, the row that
#: measures their speed, and the A100-days it reports.
SCHEDULE = (
    ("pairs", 3_200_000, "pairs", 16.0),
    ("reflow, batch 64", 64 * 70_000, "reflow", 11.2),
    ("reflow, batch 1024", 1024 * 25_000, "reflow", 64.0),
    ("distill, L2", 1024 * 21_500, "distill", 54.4),
    ("distill, perceptual", 1024 * 18_000, "distill + perceptual", 53.6),
)


def ratios(rows: dict[str, Row]) -> Iterator[tuple[str, float]]:
    """images/s of edgeflow's step over the plain loop's, where both were measured at one batch size."""
    for name, row in rows.items():
        base = rows.get("plain " + name.removesuffix(", CUDA graph"))
        if (
            base
            and "images_per_s" in base
            and "images_per_s" in row
            and row["batch_size"] == base["batch_size"]
        ):
            yield name, round(row["images_per_s"] / base["images_per_s"], 3)


def schedule(rows: dict[str, Row]) -> dict[str, Any]:
    """GPU-days of the paper's schedule at the measured speeds, beside the A100-days it reports."""
    stages = {}
    for name, images, row, a100_days in SCHEDULE:
        speed = max(
            (
                rows[r]["images_per_s"]
                for r in (row, f"{row}, CUDA graph")
                if "images_per_s" in rows.get(r, {})
            ),
            default=None,
        )
        days = round(images / speed / 86400, 2) if speed else None
        stages[name] = {"images": images, "gpu_days": days, "paper_a100_days": a100_days}
    known = [days for s in stages.values() if (days := s["gpu_days"]) is not None]
    total = round(sum(known), 2) if len(known) == len(stages) else None
    return {"stages": stages, "gpu_days": total, "paper_a100_days": sum(s[3] for s in SCHEDULE)}


def describe(row: Row) -> str:
    """A row in words."""
    if "images_per_s" not in row:
        return "; ".join(f"{why}: {what}" for why, what in row.items())
    memory = f", peak {row['peak_allocated_gib']} GiB" if "peak_allocated_gib" in row else ""
    return (
        f"{row['images_per_s']} images/s at batch {row['batch_size']}{memory}, first {row['warm_seconds']} s"
    )


def table(rows: dict[str, Row]) -> str:
    """The rows as Markdown."""
    lines = ["| row | batch | images/s | peak GiB | ÷ plain |", "|---|---|---|---|---|"]
    by_name = dict(ratios(rows))
    for name, row in rows.items():
        if "images_per_s" not in row:
            lines.append(f"| {name} | – | {describe(row)} | – | – |")
            continue
        cells = (row["batch_size"], row["images_per_s"], row.get("peak_allocated_gib"), by_name.get(name))
        lines.append(f"| {name} | " + " | ".join("–" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines)


def schedule_table(rows: dict[str, Row]) -> str:
    """The paper's schedule as Markdown."""
    paper = schedule(rows)
    lines = ["| stage | images | GPU-days here | A100-days in the paper |", "|---|---|---|---|"]
    for name, stage in paper["stages"].items():
        lines.append(f"| {name} | {stage['images']:,} | {stage['gpu_days']} | {stage['paper_a100_days']} |")
    lines.append(f"| all | | {paper['gpu_days']} | {paper['paper_a100_days']:.1f} |")
    return "\n".join(lines).replace("None", "–")
