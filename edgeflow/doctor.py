"""What of this machine and environment stands in edgeflow's way, each finding with its remedy. Torch-free.

Versions are read from the installed distributions' metadata; nothing heavy is imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgeflow.resources import free_disk_bytes, memory_bytes

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report: OK, a NOTE, a WARNING, or an ERROR, which decides the exit code."""

    status: str
    subject: str
    found: str
    remedy: str = ""


#: Backend → what exporting to it, and running its bundles, needs; and the extra that brings it.
BACKENDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "onnx (run)": (("onnxruntime",), "onnx"),
    "onnx (export)": (("torch", "diffusers", "transformers", "onnx", "onnxscript"), "export"),
    "openvino (run)": (("openvino",), "openvino"),
    "openvino (export)": (("torch", "diffusers", "transformers", "openvino"), "export"),
    "coreml (run)": (("coremltools",), "coreml"),
    "coreml (export)": (("torch", "diffusers", "transformers", "coremltools"), "export"),
    "training": (("torch", "diffusers", "transformers", "accelerate", "torchao"), "train"),
}

#: Each distribution's lowest version that edgeflow is made for, as pyproject.toml has it.
LOWEST: Mapping[str, str] = {
    "torch": "2.9",
    "diffusers": "0.36",
    "transformers": "5.0",
    "safetensors": "0.5",
    "huggingface_hub": "1.0",
    "torchao": "0.15",
    "onnx": "1.18",
    "onnxscript": "0.5",
    "onnxruntime": "1.21",
    "onnxruntime-gpu": "1.21",
    "openvino": "2025.0",
    "coremltools": "9.0",
    "numpy": "2.0",
}


def installed(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def diagnose(of: Callable[[str], str | None] = installed, folder: Path = Path()) -> list[Finding]:
    """Every check, in the order of the report. ``of`` gives a distribution's version."""
    return [
        _python(),
        *_backends(of),
        *_versions(of),
        *_conflicts(of),
        _memory(*memory_bytes()),
        _disk("output folder", folder),
        _disk("temporary folder", Path(tempfile.gettempdir())),
        _gpu(of),
    ]


def _python() -> Finding:
    return Finding(OK, "python", ".".join(map(str, sys.version_info[:3])))  # pip refuses older ones


def _backends(of: Callable[[str], str | None]) -> list[Finding]:
    found = []
    for name, (packages, extra) in BACKENDS.items():
        missing = [p for p in packages if of(p) is None and not (p == "onnxruntime" and of(f"{p}-gpu"))]
        if missing:
            pip = f"pip install 'edgeflow[{extra}]'"
            found.append(Finding(NOTE, name, f"not installed: {', '.join(missing)}", pip))
        else:
            found.append(Finding(OK, name, "installed"))
    usable = any(f.status == OK for f in found if f.subject.endswith("(run)"))
    if not usable and of("torch") is None:
        found.append(Finding(ERROR, "runtimes", "none is installed", "pip install 'edgeflow[onnx]'"))
    return found


def _versions(of: Callable[[str], str | None]) -> list[Finding]:
    """Installed versions below the lowest, which pip would not have put there."""
    found = []
    for name, lowest in LOWEST.items():
        own = of(name)
        if own is not None and _numbers(own) < _numbers(lowest):
            found.append(
                Finding(ERROR, name, f"{own}, older than {lowest}", f"pip install '{name}>={lowest}'")
            )
    return found


def _conflicts(of: Callable[[str], str | None]) -> list[Finding]:
    """Pairs that are known to break each other."""
    found = []
    if of("onnxruntime") and of("onnxruntime-gpu"):
        found.append(
            Finding(
                ERROR,
                "onnxruntime",
                "both onnxruntime and onnxruntime-gpu are installed, one over the other's files",
                "pip uninstall onnxruntime onnxruntime-gpu, then install one",
            )
        )
    transformers, optimum, intel = (of(n) for n in ("transformers", "optimum-onnx", "optimum-intel"))
    for name, own, limit in (("optimum-onnx", optimum, "4.58"), ("optimum-intel", intel, "5.6")):
        if own and transformers and _numbers(transformers) >= _numbers(limit):
            found.append(
                Finding(
                    WARNING,
                    name,
                    f"{own} needs transformers < {limit}, got {transformers}",
                    f"install {name} in an environment of its own",
                )
            )
    numpy, torch, coreml = of("numpy"), of("torch"), of("coremltools")
    if coreml and torch and _numbers(torch) > (2, 7, 99):
        found.append(
            Finding(
                NOTE,
                "coremltools",
                f"{coreml} was tested by its makers up to torch 2.7, got {torch}",
                "nothing: edgeflow measures every bundle; torch.jit.trace, which breaks, is not used",
            )
        )
    if coreml and numpy and _numbers(numpy) >= (2, 4) and _numbers(coreml) < (9,):
        found.append(Finding(ERROR, "coremltools", f"{coreml} with numpy {numpy}", "pip install 'numpy<2.4'"))
    return found


def _memory(total: int | None, available: int | None) -> Finding:
    if total is None or available is None:
        return Finding(NOTE, "memory", "unknown on this system", "look before exporting a full-size model")
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if available < 1.5 * GIB:
        return Finding(
            WARNING, "memory", found, "end other programs: the built-in model's export needs 1.5 GiB"
        )
    if available < 9 * GIB:
        remedy = (
            "enough for small models; a full-size export plans for up to 9 GiB: edgeflow export --dry-run"
        )
        return Finding(NOTE, "memory", found, remedy)
    return Finding(OK, "memory", found)


def _disk(name: str, folder: Path) -> Finding:
    free = free_disk_bytes(folder)
    found = f"{free / GIB:.1f} GiB free"
    if free < 0.2 * GIB:
        return Finding(ERROR, name, found, "make room: even the built-in model's bundles need 200 MiB")
    if free < 15 * GIB:
        return Finding(NOTE, name, found, "a full-size model in every form takes up to 15 GiB")
    return Finding(OK, name, found)


def _gpu(of: Callable[[str], str | None]) -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding(OK, "gpu", "none found; nothing but training in earnest needs one")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if answer.returncode:
        return Finding(
            WARNING, "gpu", "nvidia-smi fails", "install the driver that fits the kernel, or reboot"
        )
    found = "; ".join(answer.stdout.strip().splitlines())
    if of("torch") and "+cpu" in (of("torch") or ""):
        return Finding(WARNING, "gpu", f"{found}; torch {of('torch')} cannot use it", "install a CUDA build")
    return Finding(OK, "gpu", found)


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu → (2, 13, 0)."""
    numbers: list[int] = []
    for piece in text.split("+")[0].split("."):
        digits = "".join(c for c in piece if c.isdigit())
        if not digits or not piece[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)
