"""What a benchmark ran on: the machine and its state, and how fast it multiplies matrices. Torch-free.

The matrix rate is what the best plain product of two matrices reaches with the same threads, in a process of
its own: no model can be faster, so its arithmetic over that rate is the floor of its time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflow.errors import RuntimeFailure

_SIZE = {"cpu": 1536, "cuda": 8192}
_SECONDS = 1.0


def machine() -> dict[str, Any]:
    """Processor, CPUs, memory, system, and what can be read of its power state; None is not readable."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "on_mains": _on_mains(),
        "gpu": _gpu(),
    }


def busy(facts: dict[str, Any]) -> str | None:
    """A warning where others were computing on the machine as the benchmark began."""
    load, cpus = facts["load"], facts["cpus"]
    if load is None or load < 0.5 * cpus:
        return None
    return f"the machine was busy as this began: load {load:g} on {cpus} CPUs; absolute times are too long"


def _processor() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_gib() -> float | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return None


def _on_mains() -> bool | None:
    """Whether a power supply of the kind "Mains" is online; None where the machine says nothing of one."""
    with contextlib.suppress(OSError):
        for supply in sorted(Path("/sys/class/power_supply").iterdir()):
            if _read(str(supply / "type")) == "Mains":
                return _read(str(supply / "online")) == "1"
    return None


def _gpu() -> str | None:
    """Name, power state and clock of the first NVIDIA GPU."""
    return _nvidia_smi("name,driver_version,pstate,clocks.sm,power.draw")


def gpu_used_mib() -> float | None:
    """What is in use of the first NVIDIA GPU's memory, whoever uses it; None where no driver says."""
    said = _nvidia_smi("memory.used")  # "604 MiB"
    with contextlib.suppress(ValueError):
        return float(said.split()[0]) if said else None
    return None


def _nvidia_smi(fields: str) -> str | None:
    """What the driver says of the first NVIDIA GPU, with units; None where none is there to ask."""
    asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.splitlines()
        return lines[0].strip() if lines else None
    return None


@dataclass(frozen=True)
class MatrixRate:
    """The best rate of a matrix product, and what reached it."""

    gflop_per_s: float
    by: str


def matrix_rate(threads: int, device: str = "cpu") -> MatrixRate:
    """Measured in a process of its own with ``threads`` threads. Raises RuntimeFailure where that fails."""
    env = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "edgeflow.bench_machine", device],
        capture_output=True,
        text=True,
        env=env,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeFailure(f"bench: the matrix rate could not be measured: {words[-1]}")
    return MatrixRate(**json.loads(done.stdout))


def _measure_rate(device: str) -> MatrixRate:
    """The faster of torch's and NumPy's product on a CPU; torch's in float16 on a GPU."""
    size = _SIZE[device]
    found = []
    with contextlib.suppress(ModuleNotFoundError):
        import torch

        dtype = torch.float32 if device == "cpu" else torch.float16
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

        def product() -> None:
            _ = a @ b
            if device == "cuda":
                torch.cuda.synchronize()

        by = f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {size} × {size}"
        found.append(MatrixRate(_best(product, size), by))
    if device == "cpu":
        import numpy as np

        x, y = (np.random.default_rng(i).standard_normal((size, size), np.float32) for i in range(2))
        by = f"NumPy {np.__version__}, float32, {size} × {size}"
        found.append(MatrixRate(_best(lambda: x @ y, size), by))
    return max(found, key=lambda rate: rate.gflop_per_s)


def _best(product: Callable[[], Any], size: int) -> float:
    """GFLOP/s of the fastest product within a second; a product of n × n is 2·n³."""
    product()
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        product()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest / 1e9


if __name__ == "__main__":
    import dataclasses

    print(json.dumps(dataclasses.asdict(_measure_rate(sys.argv[1]))))
