"""How much arithmetic a picture is: counted on the checkpoint's modules, so it needs torch."""

from __future__ import annotations

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import EdgeflowError
from edgeflow.parity_reference import TORCH_PACKAGES, find_checkpoint
from edgeflow.spec import COMPONENTS


def count_gflop(model: Bundle | Checkpoint) -> tuple[dict[str, float], str | None]:
    """Component → GFLOP of one picture (a multiply-add is two), or nothing and why not."""
    from importlib.util import find_spec

    missing = [package for package in TORCH_PACKAGES if find_spec(package) is None]
    if missing:
        return {}, f"{missing[0]} is not installed"
    if isinstance(model, Bundle):
        checkpoint, reason = find_checkpoint(model, None)
        if checkpoint is None:
            return {}, reason
        model = checkpoint
    try:
        return _count(model), None
    except EdgeflowError as error:
        return {}, str(error)


def _count(checkpoint: Checkpoint) -> dict[str, float]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from edgeflow.components import load_components

    components = load_components(checkpoint)
    found = {}
    for name in COMPONENTS:
        component = components[name]
        # Attention in its plain form: the counter knows matrix products, and not every fused kernel.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            component.module(**component.example)
        found[name] = counter.get_total_flops() / 1e9
    return found
