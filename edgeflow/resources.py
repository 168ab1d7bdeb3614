"""What the machine has left: memory and disk. Torch-free."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path


def memory_bytes() -> tuple[int | None, int | None]:
    """Memory in all, and what can be had without swapping; a container's own limit counts. None: unknown."""
    total = available = None
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, available = sizes["MemTotal"], sizes.get("MemAvailable")
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if total is None or limit < total:
            total, available = limit, min(available or limit, limit - used)
    return total, available


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk that ``path`` lies on, or would lie on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
