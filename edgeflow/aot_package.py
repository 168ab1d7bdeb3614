"""Ahead-of-time compiled graphs in a bundle: the code, the weights beside it, and what both were made for.

``<graph>/model.pt2`` is AOTInductor's package without constants, ``<graph>/weights.safetensors`` holds every
constant by the name that the code calls it. Weights of four axes lie in memory channels-last, as the code
reads them: they are stored as (O, kh, kw, I), and named in the file's metadata.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeflow.errors import RuntimeFailure

CODE, WEIGHTS = "model.pt2", "weights.safetensors"
#: What the code depends on, as the manifest's ``versions`` call it.
MADE_FOR = ("device", "compute capability", "torch", "cuda")
_CHANNELS_LAST = "channels_last"
_MODEL = "model"  # what torch calls the one model of a package


def constants_of(code: str) -> list[str]:
    """The names of the constants that a package's code asks for; loads the code."""
    return list(load_code(code).get_constant_fqns())


def load_code(code: str) -> Any:
    """A package's code, without its constants; for one thread, as a capture needs. Raises RuntimeError.

    The loader that ``torch._inductor.aoti_load_package`` wraps. That function first compares the machine with
    the one that compiled, for a warning: also for code that runs on a GPU it imports the compiler (5 s) and
    tries the processor's vector units in ten child processes that import torch (44 to 54 s of a first
    picture, docs/cuda.md). ``check_made_for`` makes that comparison here, from the manifest.

    Some compilers (Red Hat's toolsets) link the newer half of libstdc++ into the code. Its locale facets are
    numbered otherwise than those of the libstdc++ that the process has, and the std::regex which reads the
    device's name crashes between the two; with that library in the global scope its own symbols come first.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
    return torch._C._aoti.AOTIModelPackageLoader(code, _MODEL, True, 1, -1)


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the constants, each contiguous or channels-last. Raises ValueError for other layouts."""
    stored, last = {}, []
    for name, tensor in sorted(tensors.items()):
        if tensor.is_contiguous():
            stored[name] = tensor.detach().cpu()
        elif tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            stored[name] = tensor.detach().permute(0, 2, 3, 1).cpu()
            last.append(name)
        else:
            raise ValueError(f"constant {name}: expected a contiguous or channels-last tensor")
    # Tensors that share memory are stored once each: the file has no notion of sharing.
    save_file({k: v.clone() for k, v in stored.items()}, path, metadata={_CHANNELS_LAST: json.dumps(last)})
    path.chmod(0o644)


def read_weights(path: Path, device: str) -> dict[str, Tensor]:
    """The constants on ``device`` in the layout that the code expects. Raises RuntimeFailure."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            last = set(json.loads((file.metadata() or {})[_CHANNELS_LAST]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RuntimeFailure(f"runtime cuda: {path}: the weights cannot be read: {error}") from error
    return {name: t.permute(0, 3, 1, 2) if name in last else t for name, t in tensors.items()}


def check_made_for(made: Mapping[str, str], here: Mapping[str, str], where: object) -> None:
    """Raise RuntimeFailure naming everything that differs between where code was compiled and where it is."""
    wrong = [
        f"{key} {made.get(key, 'unknown')} (here {here.get(key, 'none')})"
        for key in MADE_FOR
        if made.get(key) != here.get(key)
    ]
    if wrong:
        raise RuntimeFailure(
            f"runtime cuda: {where}: compiled for {', '.join(wrong)}; "
            "export it again on this machine: edgeflow export MODEL --to cuda"
        )
