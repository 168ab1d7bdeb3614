"""A benchmark in the terminal: a block a configuration, then who is faster, where anybody is."""

from __future__ import annotations

from collections.abc import Iterator

from edgeflow import terminal
from edgeflow.bench import BenchReport, BenchRow, NamedRatio
from edgeflow.measure_statistics import Summary
from edgeflow.terminal import Part

_STAGES = {
    "python": "python", "import": "imports", "open": "open and verify", "session": "session",
    "tokenizer": "tokenizer", "first": "first picture",
}  # fmt: skip
_DEVICES = {"cpu": "machine's", "cuda": "GPU's"}


def print_bench(report: BenchReport, *, as_json: bool = False) -> None:
    """The report on stdout: JSON, or text."""
    terminal.print_report(report, _parts(report), as_json=as_json)


def _parts(report: BenchReport) -> Iterator[Part]:
    from rich.text import Text

    for line in lines(report):
        yield Text(line, "bold" if line.startswith(("Benchmark", "Summary", "Machine")) else "")


def lines(report: BenchReport) -> Iterator[str]:
    """The report as text, a line at a time."""
    for number, row in enumerate(report.rows, 1):
        yield f"Benchmark {number}: {row.name}"
        yield from (f"  {name:<15} {said}" for name, said in _block(row))
        yield ""
    if report.ratios:
        yield "Summary"
        yield from (f"  {sentence(found)}" for found in report.ratios)
        yield ""
    yield from _machine(report)
    yield from report.notes


def _block(row: BenchRow) -> Iterator[tuple[str, str]]:
    processes = len(row.launches_ms)
    yield "runs", f"{row.runtime} {row.precision}, {row.threads} threads, {row.backend}"
    yield "picture", f"{shown(row.warm_ms)}   {row.warm_ms.count} in {processes} processes"
    if len(row.parts_ms) > 1:
        yield (
            "of which",
            " · ".join(f"{name} {part.median:.1f}" for name, part in row.parts_ms.items()) + " ms",
        )
    yield "first picture", f"{shown(row.first_picture_ms, 0)}   from the start of the process"
    yield "of which", " · ".join(f"{_STAGES[s]} {ms:.0f}" for s, ms in row.stages_ms.items()) + " ms"
    if row.cold_start_ms is not None:
        yield "cold start", f"{shown(row.cold_start_ms, 0)}   edgeflow generate, process start to saved PNG"
    gpu = "" if row.peak_gpu_mib is None else f", {row.peak_gpu_mib:.0f} MiB on the GPU"
    yield "peak memory", f"{row.peak_rss_mib:.0f} MiB ({row.imported_rss_mib:.0f} after imports){gpu}"
    yield "on disk", f"{row.bytes / 2**20:.2f} MiB (graphs and weights {row.graph_bytes / 2**20:.2f})"
    if row.gflop_per_s is not None:
        total = sum(row.gflop.values())
        share = f"{100 * (row.share_of_matrix_rate or 0):.0f} %"
        yield (
            "work",
            f"{total:.2f} GFLOP a picture, {row.gflop_per_s:.0f} GFLOP/s: {share} of the "
            f"{_DEVICES[row.device]} matrix rate, which would take {row.floor_ms:.1f} ms",
        )
    yield "checked", row.check


def shown(values: Summary, digits: int = 1) -> str:
    """``118.2 ms  p90 125.1  range 110.2 … 140.0``; one value alone is just that."""
    median = f"{values.median:.{digits}f} ms"
    if values.count == 1:
        return median
    return (
        f"{median}   p90 {values.p90:.{digits}f}   range {values.low:.{digits}f} … {values.high:.{digits}f}"
    )


def sentence(found: NamedRatio) -> str:
    """Who is faster and by how much, or that nobody can tell."""
    if found.verdict == "inside the noise":
        return (
            f"{found.a} and {found.b}: no winner; {found.value:.3f} × the time, "
            f"95 % interval {found.low:.3f} to {found.high:.3f}"
        )
    if found.verdict == "faster":
        a, b, value, low, high = found.a, found.b, 1 / found.value, 1 / found.high, 1 / found.low
    else:
        a, b, value, low, high = found.b, found.a, found.value, found.low, found.high
    return f"{a} is {value:.2f} times as fast as {b} (95 % interval {low:.2f} to {high:.2f})"


def _machine(report: BenchReport) -> Iterator[str]:
    facts = report.machine
    power = [f"governor {facts['governor']}"] if facts["governor"] else []
    power += [] if facts["on_mains"] is None else ["on mains" if facts["on_mains"] else "on battery"]
    said = [
        facts["processor"], f"{facts['cpus']} CPUs", f"{facts['memory_gib']} GiB", facts["gpu"],
        facts["system"],        f"Python {facts['python']}", f"load {facts['load']} at the start", *power,
    ]  # fmt: skip
    yield "Machine: " + ", ".join(str(part) for part in said if part is not None)
    for rate in report.matrix_rates.values():
        yield f"Matrix rate: {rate.gflop_per_s:.0f} GFLOP/s ({rate.by}), measured in the same run"
