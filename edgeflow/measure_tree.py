"""Peak memory and time of a command with all its children: ``python -m edgeflow.measure_tree -- COMMAND…``.

Every ``--interval`` seconds the resident sizes (VmRSS) of the command and all its descendants are added; the
largest sum is printed as JSON on stdout, with the processes that made it up, the wall time, and the load
average before and after. A page that two processes share counts twice, so the sum errs upwards. Linux only.
The exit code is the command's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeflow.measure_tree", description=__doc__)
    parser.add_argument("--interval", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(argv)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    if not command:
        parser.error("expected a command after --")
    report = watch(command, asked.interval)
    print(json.dumps(report))
    return int(report["exit_code"])


def watch(
    command: Sequence[str], interval: float = 0.1, *, stdout: int | IO[str] | None = None, step: str = ""
) -> dict[str, Any]:
    """Run ``command`` and report as the module says; its output goes to stderr, or to ``stdout``.

    Where ``step`` is given, a line of the command's stderr that begins with it begins a step: the report's
    ``steps`` hold what the rest of each such line says, its seconds and its largest sum. Other lines are
    passed on.
    """
    before, started = os.getloadavg(), time.monotonic()
    pipe = subprocess.PIPE if step else None
    process = subprocess.Popen(command, stdout=stdout or sys.stderr, stderr=pipe, text=True)
    steps: list[dict[str, Any]] = [{"what": "", "began": started, "peak": 0}]
    reader = threading.Thread(target=_read_steps, args=(process.stderr, step, steps), daemon=True)
    if step:
        reader.start()
    peak: dict[int, int] = {}
    seen: set[int] = set()
    while process.poll() is None:
        found = {pid: resident_kib(pid) for pid in family(process.pid)}
        peak = max(peak, found, key=lambda sizes: sum(sizes.values()))
        steps[-1]["peak"] = max(steps[-1]["peak"], sum(found.values()))
        seen |= set(found)
        time.sleep(interval)
    ended = time.monotonic()
    if step:
        reader.join()
    report = {
        "exit_code": process.returncode,
        "wall_s": round(ended - started, 1),
        "peak_rss_mib": round(sum(peak.values()) / 1024),
        "processes_at_peak_mib": [round(size / 1024) for size in peak.values()],
        "processes": len(seen),
        "load_before": [round(x, 1) for x in before],
        "load_after": [round(x, 1) for x in os.getloadavg()],
        "cpus": os.cpu_count(),
    }
    return report | {"steps": _lengths(steps, ended)} if step else report


def _read_steps(lines: IO[str], step: str, steps: list[dict[str, Any]]) -> None:
    for line in lines:
        if line.startswith(step):
            what = line.removeprefix(step).strip()
            steps.append({"what": what, "began": time.monotonic(), "peak": 0})
            print(f"{steps[-1]['began'] - steps[0]['began']:7.1f} s  {what}", file=sys.stderr, flush=True)
        else:
            sys.stderr.write(line)


def _lengths(steps: list[dict[str, Any]], ended: float) -> list[dict[str, Any]]:
    ends = [s["began"] for s in steps[1:]] + [ended]
    return [
        {"what": s["what"], "seconds": round(end - s["began"], 1), "peak_mib": round(s["peak"] / 1024)}
        for s, end in zip(steps, ends, strict=True)
    ]


def family(root: int) -> list[int]:
    """A process and its descendants that are there now."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def resident_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
