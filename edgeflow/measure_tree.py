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
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m edgeflow.measure_tree", description=__doc__)
    parser.add_argument("--interval", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(argv)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    if not command:
        parser.error("expected a command after --")
    before, started = os.getloadavg(), time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    peak: dict[int, int] = {}
    own: dict[int, int] = {}
    while process.poll() is None:
        found = {pid: resident_kib(pid) for pid in family(process.pid)}
        peak = max(peak, found, key=lambda sizes: sum(sizes.values()))
        for pid, size in found.items():
            own[pid] = max(own.get(pid, 0), size)
        time.sleep(asked.interval)
    report = {
        "exit_code": process.returncode,
        "wall_s": round(time.monotonic() - started, 1),
        "peak_rss_mib": round(sum(peak.values()) / 1024),
        "processes_at_peak_mib": [round(size / 1024) for size in peak.values()],
        "processes": len(own),
        "load_before": [round(x, 1) for x in before],
        "load_after": [round(x, 1) for x in os.getloadavg()],
        "cpus": os.cpu_count(),
    }
    print(json.dumps(report))
    return process.returncode


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
