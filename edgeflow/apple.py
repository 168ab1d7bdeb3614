"""What a Core ML bundle is made for: attention's layout, the system it needs, the UNet in chunks. Torch-free.

The minimum deployment target is the earliest system that has the operations which the program needs, known
from the checkpoint's headers before any work starts. A later one may be asked for, an earlier one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeflow.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from edgeflow.checkpoint import Checkpoint

#: Attention as one operation, where the target has it; or in the Neural Engine's layout.
FUSED, SPLIT_EINSUM = "fused", "split-einsum"
ATTENTIONS = (FUSED, SPLIT_EINSUM)
#: Target → iOS's version of its operations; a Mac's system has those of the iOS three versions ahead.
TARGETS = {f"iOS{v}": v for v in (15, 16, 17, 18)} | {f"macOS{v - 3}": v for v in (15, 16, 17, 18)}
#: Weights of this many bytes are too much for one program on the Neural Engine.
CHUNK_BYTES = 10**9
CHUNKS = (1, 2)


@dataclass(frozen=True)
class AppleSettings:
    """What was asked for; None is for edgeflow to choose."""

    attention: str = FUSED
    target: str | None = None
    chunks: int | None = None

    def check(self, backends: Sequence[str], layouts: Sequence[str]) -> None:
        """Raise UsageError for settings that are not known or that nothing of what is exported can take."""
        if self.attention not in ATTENTIONS:
            raise UnknownNameError("attention", self.attention, ATTENTIONS)
        if self.target is not None and self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)
        if self.chunks is not None and self.chunks not in CHUNKS:
            raise UsageError(
                f"export: --chunks {self.chunks}: expected 1 or 2, which Apple's package looks for"
            )
        if self.attention != FUSED and set(backends) != {"coreml"}:
            others = ", ".join(b for b in backends if b != "coreml")
            raise UsageError(
                f"export: --attention {self.attention}: expected --to coreml alone, got {others} as well"
            )
        if self != AppleSettings() and "coreml" not in backends:
            raise UsageError(
                f"export: --target and --chunks: expected --to coreml among the backends, "
                f"got {', '.join(backends)}"
            )
        if self.chunks == 2 and "components" not in layouts:
            raise UsageError(
                "export: --chunks 2: expected --graph components, whose UNet is cut; got pipeline alone"
            )


def settle(checkpoint: Checkpoint, asked: AppleSettings, layout: str, precision: str) -> dict[str, Any]:
    """What a bundle's manifest says: attention, target, chunks. Reads headers.

    Raises UsageError for a target that is earlier than the program needs.
    """
    found = list(needs(checkpoint))
    chunks = _chunks(checkpoint, asked, precision) if layout == "components" else 1
    if chunks == 2 and precision == "fp16":
        found.append((16, "float16 values go from one chunk to the next"))
    needed, reason = max(found, key=lambda need: need[0])
    target = asked.target or f"iOS{needed}"
    if TARGETS[target] < needed:
        raise UsageError(
            f"export: --target {target}: {checkpoint.name}: expected iOS{needed} or macOS{needed - 3}, "
            f"or later, as {reason}"
        )
    return {"attention": asked.attention, "target": target, "chunks": chunks}


def needs(checkpoint: Checkpoint) -> Iterator[tuple[int, str]]:
    """(iOS version, what needs it) for everything that a program made from the checkpoint holds."""
    yield 15, "ML programs begin there"
    for part in ("text_encoder", "unet", "vae"):
        for name, layer in checkpoint.quantized_layers(part).items():
            where = f"({part}: {name})"
            if layer.activations:
                yield 17, f"it rounds activations {where}"
            if layer.palette:
                yield 16, f"its weights are look-up tables {where}"
            elif layer.bits == 4:
                yield 18, f"its weights are 4-bit integers {where}"
            elif any(size > 1 for size in layer.scale_shape[1:]):
                yield 18, f"its weights are integers with a scale a block {where}"
            elif layer.zero_point:
                yield 18, f"its weights are integers with zero points {where}"
            else:
                yield 16, f"its weights are 8-bit integers {where}"


def _chunks(checkpoint: Checkpoint, asked: AppleSettings, precision: str) -> int:
    """As asked; else two for iOS where the UNet's weights are too much for one program."""
    from edgeflow.export_plan import stored_bytes

    if asked.chunks is not None:
        return asked.chunks
    for_ios = asked.target is None or asked.target.startswith("iOS")
    return 2 if for_ios and stored_bytes(checkpoint, "unet", precision) >= CHUNK_BYTES else 1
