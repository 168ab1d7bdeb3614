"""Many processes on one batch: who they are, and what they tell each other.

accelerate reads the launcher's environment (``torchrun``, ``accelerate launch``), opens the process group
(NCCL on GPUs, gloo on CPUs) and picks the GPU. Its wrapper of models, PyTorch's DistributedDataParallel, is
not used: DDP all-reduces from hooks inside the backward pass, and the whole step here may be one captured
CUDA graph, for which DDP wants a side stream from its construction on, at least eleven warm-up iterations and
NCCL's error handling off. Gradients are instead gathered into flat buckets and averaged between the backward
pass and clipping: a few all-reduces at one known place, captured like any other kernel, the same on gloo, and
right for any objective (several modules, several forward passes, gradient accumulation). What is given up is
that sending overlaps with the backward pass.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

#: Elements of a flat bucket: 256 MiB of float32.
_BUCKET = 64 * 1024 * 1024
#: How long a process waits for the others: process 0 may be saving a state or drawing a sheet.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. ``device`` is its own."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Join the processes that the launcher's environment tells of; alone where there is no launcher."""
        if "LOCAL_RANK" in os.environ and not dist.is_initialized():
            from accelerate import PartialState

            os.environ.setdefault("OMP_NUM_THREADS", "1")
            state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
            if state.num_processes > 1:
                atexit.register(state.destroy_process_group)
        return cls.current(device)

    @classmethod
    def current(cls, device: torch.device) -> Processes:
        """The processes that were joined before; alone if none were."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def average(self, gradients: Sequence[Tensor], values: Tensor) -> Tensor:
        """Replace the gradients by their mean over processes; returns the mean of ``values`` (N,) float32."""
        if self.size == 1:
            return values
        values = values.clone()
        for bucket in buckets([values, *gradients]):
            flat = torch.cat([t.reshape(-1).float() for t in bucket])
            dist.all_reduce(flat)
            flat /= self.size
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(bucket, [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)])
        return values

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by those of process 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def share_random_state(self) -> None:
        """Give every process the random state of process 0."""
        if self.size == 1:
            return
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state())
        moved = [s.to(self.device) for s in states]
        self.share(moved)
        torch.set_rng_state(moved[0].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(moved[1].cpu())


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of at most ``_BUCKET`` elements (or one larger tensor)."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.numel() > _BUCKET:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.numel()
    if group:
        yield group
