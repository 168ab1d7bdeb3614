"""Drawing with one component in memory at a time. Torch-free unless the runtime is torch.

Each graph is loaded when it is run, and given back when it has run. Peak memory is then that of the largest
component with its activations, in place of the sum of all; a picture takes the loading on top, each time.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from edgeflow import registry
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import UsageError
from edgeflow.registry import Runtime
from edgeflow.spec import PIPELINE


class OneAtATime:
    """A runtime that holds no graph between two runs. ``load`` opens one graph by its name."""

    def __init__(self, name: str, load: Callable[[str], Runtime]):
        self.name = name
        self._load = load

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Named arrays to named arrays; see edgeflow.registry.Runtime."""
        runtime = self._load(graph)
        try:
            return runtime.run(graph, inputs)
        finally:
            del runtime
            give_back()


def one_at_a_time(model: Bundle | Checkpoint, name: str) -> OneAtATime:
    """The runtime called ``name`` over one graph at a time.

    Raises UsageError for a fused bundle, which is one graph, and for a runtime that cannot load a part.
    """
    runtime: Any = registry.runtime(name)
    if isinstance(model, Bundle) and any(graph.name == PIPELINE for graph in model.manifest.graphs):
        raise UsageError(
            f"--low-memory: {model.root}: expected a bundle of components, got the one graph {PIPELINE!r}; "
            "export it with --graph components"
        )
    if not hasattr(runtime, "load_one"):
        raise UsageError(f"--low-memory: runtime {name!r} loads all graphs; known: onnx, openvino, torch")
    return OneAtATime(name, lambda graph: runtime.load_one(model, graph))


def give_back() -> None:
    """Return freed memory to the system; glibc keeps it otherwise for the process's next allocation."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
