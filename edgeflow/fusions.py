"""How many operations of a bundle's graphs are fused where they run: what a backend makes of what is stored.

Each backend is asked itself: ONNX Runtime writes the graph that its session optimized, OpenVINO describes the
program that it compiled; a Core ML package is counted as it is saved, for off a Mac nothing compiles it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeflow import registry
from edgeflow.bundle import Bundle
from edgeflow.generate import default_runtime

#: Graphs of more bytes than this are opened for counting only where that was asked for.
LARGE = 1 << 28
#: What an operation stands for, by the names that ONNX Runtime, OpenVINO and Core ML give it.
KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": (
        "Attention",
        "MultiHeadAttention",
        "ScaledDotProductAttention",
        "scaled_dot_product_attention",
    ),
    "norm": (
        "LayerNormalization",
        "SkipLayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "GroupNorm",
        "MVN",
        "layer_norm",
        "instance_norm",
    ),
    "gelu, silu": ("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Swish", "gelu", "silu"),
}


@dataclass(frozen=True)
class Operations:
    """One graph: operations as stored and as run.

    ``kinds`` says of each of KINDS how many are one operation, or part of one, where they run; ``fused`` are
    the operations that run and stand for several, by type.
    """

    stored: int
    run: int
    kinds: Mapping[str, int]
    fused: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {"stored": self.stored, "run": self.run, "kinds": dict(self.kinds), "fused": dict(self.fused)}


def fusions(bundle: Bundle, *, large: bool = False) -> dict[str, Operations] | None:
    """Graph → its operations; None where the graphs are ``LARGE`` and were not asked for, or nothing can say.

    Raises BackendMissing without the backend, RuntimeFailure for a graph that it refuses.
    """
    if not large and bundle.graph_bytes() > LARGE:
        return None
    runtime: Any = registry.runtime(default_runtime(bundle))
    if not hasattr(runtime, "operations"):
        return None
    return {graph.name: runtime.operations(bundle, graph.name) for graph in bundle.manifest.graphs}


def kinds_of(types: Counter[str]) -> dict[str, int]:
    """Kind → how many, of operations by type."""
    return {kind: sum(types[name] for name in names) for kind, names in KINDS.items()}


def composite(types: Counter[str]) -> dict[str, int]:
    """Of operations by type, those that are of one of KINDS, the most frequent first."""
    known = {name for names in KINDS.values() for name in names}
    return {name: n for name, n in types.most_common() if name in known}
