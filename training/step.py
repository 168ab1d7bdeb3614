"""One optimizer step of any objective, on one process or many, eager or as one CUDA graph."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgeflow.errors import ConfigError
from edgeflow.training.config import LoopConfig
from edgeflow.training.draw import Draw
from edgeflow.training.parallel import Processes, buckets

if TYPE_CHECKING:
    from edgeflow.training.loop import Objective

_EAGER_STEPS = 3  # run before a CUDA graph is captured: allocations, compilation and cuDNN's choices settle
#: Steps that take long: those, and the one that captures.
SETTLING_STEPS = _EAGER_STEPS + 1


class Step:
    """Loss, backward, mean over processes, clip, AdamW, moving average; replayed as one CUDA graph if asked.

    Everything stays on the device: the batch is drawn inside, losses are summed into ``sums`` and read only
    when logged, so no step waits for the host. So a step whose losses or gradients are not finite cannot
    stop the run at once: it and all later steps leave weights, optimizer and average as they are, and
    :meth:`first_bad` tells of it when asked.
    """

    def __init__(self, objective: Objective, config: LoopConfig, processes: Processes):
        self.objective, self.config, self.processes = objective, config, processes
        self.device = device = processes.device
        self.draw: Draw | None = getattr(objective, "draw", None)
        _share_draw(self.draw, config, processes)
        if config.checkpointing:
            checkpoint_activations(objective.trained)
        self.modules = {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in objective.trained.items()
        }
        self.params = [p for params in self.modules.values() for p in params]
        average, self.buffers = _averaged(objective)
        own = dict(average)
        self.average = [(bucket, [own[a] for a in bucket]) for bucket in buckets(list(own))]
        self.rates: list[Tensor] = []
        self.factors: list[float] = []  # of the learning rate, by parameter group
        self.decay = torch.tensor(0.0, device=device)
        self.number = torch.tensor(0, device=device)
        self.bad = torch.tensor(0, device=device)
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
            capturable=config.cuda_graph,
        )
        # What torch.amp.GradScaler sets: the fused kernel leaves everything as it is where this is 1.
        self.skip = self.optimizer.found_inf = torch.tensor(0.0, device=device)
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0  # steps in ``sums``
        self._bad_values: Tensor | None = None
        self._bad_batch: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager_left = _EAGER_STEPS

    def _groups(self) -> list[dict[str, Any]]:
        """A parameter group for each module, with the options that the objective names for it."""
        groups: list[dict[str, Any]] = []
        for name, params in self.modules.items():
            options = dict(getattr(self.objective, "adamw", {}).get(name, {}))
            self.factors.append(float(options.pop("rate", 1.0)))
            self.rates.append(torch.tensor(self.config.learning_rate, device=self.device))
            groups.append({"params": params, "lr": self.rates[-1], **options})
        return groups

    def run(self, number: int, rate: float, decay: float) -> None:
        """Take the step of this number (from 1) at this learning rate and decay of the average."""
        self.number.fill_(number)
        for tensor, factor in zip(self.rates, self.factors, strict=True):
            tensor.fill_(rate * factor)
        self.decay.fill_(decay)
        self.count += 1
        if not self.config.cuda_graph:
            self._step()
        elif self._eager_left:
            self._eager_left -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()

    def autocast(self) -> torch.autocast:
        """The precision that losses are computed in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16, cache_enabled=False)

    def close(self) -> None:
        """Let go of the CUDA graph; its all-reduces must not outlive the process group."""
        if self._graph is not None:
            torch.cuda.synchronize()
            self._graph = None

    def _capture(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients live in the graph's own pool
        self._graph = torch.cuda.CUDAGraph()
        mode = "global"
        if self.processes.size > 1:
            # NCCL's watchdog thread asks after earlier work at any time: under "global" that ends a capture.
            mode = "thread_local"
            self.processes.barrier()
            torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, capture_error_mode=mode):
            self._step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        values = self._backward()
        gradients = [p.grad for p in self.params if p.grad is not None]
        values = self.processes.average(gradients, values)
        norms = [self._clip(params) for params in self.modules.values()]
        with torch.no_grad():
            self._judge(torch.cat([values, torch.stack(norms).float()]))
        self.optimizer.step()
        with torch.no_grad():
            self._move_average()

    def _clip(self, params: list[nn.Parameter]) -> Tensor:
        """Clip the gradients of one module; returns their norm before. PyTorch answers from the CPU where
        there is no gradient at all, which a capture would not survive."""
        if all(p.grad is None for p in params):
            return torch.zeros((), device=self.device)
        return nn.utils.clip_grad_norm_(params, self.config.clip_norm)

    def _backward(self) -> Tensor:
        """Gradients of the mean over this process's micro-batches; returns the losses' means."""
        pieces, values = self.config.accumulate, None
        for piece in range(pieces):
            if self.draw is not None:
                self.draw.begin(piece)
            with self.autocast():
                losses = self.objective.loss()
            (losses["loss"] / pieces if pieces > 1 else losses["loss"]).backward()
            row = torch.stack([v.detach().float() for v in losses.values()])
            values = row if values is None else values + row
        assert values is not None
        if not self.names:
            one = len(self.modules) == 1
            self.names = [*losses, *("grad_norm" if one else f"grad_norm_{name}" for name in self.modules)]
        return values / pieces if pieces > 1 else values

    def _judge(self, values: Tensor) -> None:
        """Sum the values up, or remember that, where and on which batch they stopped being finite."""
        chosen = None if self.draw is None else self.draw.chosen
        if self.sums is None:
            self.sums = torch.zeros_like(values)
        if self._bad_values is None:
            self._bad_values = torch.zeros_like(values)
            self._bad_batch = None if chosen is None else torch.zeros_like(chosen)
        new = ~torch.isfinite(values).all() & (self.bad == 0)
        self.bad.copy_(torch.where(new, self.number, self.bad))
        self._bad_values.copy_(torch.where(new, values, self._bad_values))
        if self._bad_batch is not None:
            self._bad_batch.copy_(torch.where(new, chosen, self._bad_batch))
        self.skip.copy_(self.bad > 0)
        self.sums.add_(torch.where(self.bad > 0, torch.zeros_like(values), values))

    def _move_average(self) -> None:
        """average ← decay·average + (1 − decay)·weights, a bucket at a time: large models have no room for
        a second copy. A bad step keeps the average: its decay is 1."""
        decay = torch.where(self.bad > 0, torch.ones_like(self.decay), self.decay)
        for average, weights in self.average:
            torch._foreach_mul_(average, decay)
            torch._foreach_add_(average, torch._foreach_mul(weights, 1.0 - decay))
        if self.buffers:
            torch._foreach_copy_([a for a, _ in self.buffers], [b for _, b in self.buffers])

    def take_means(self) -> dict[str, float]:
        """Means over the steps since the last call; waits for the device."""
        assert self.sums is not None
        means = (self.sums / self.count).tolist()
        self.sums.zero_()
        self.count = 0
        return dict(zip(self.names, means, strict=True))

    def first_bad(self) -> tuple[int, list[str], Tensor | None] | None:
        """The first step that was not finite, the names of its values that were not, and the examples of its
        batch (int64, on the CPU); waits for the device."""
        if not (number := int(self.bad)):
            return None
        assert self._bad_values is not None
        finite = torch.isfinite(self._bad_values).tolist()
        names = [name for name, good in zip(self.names, finite, strict=True) if not good]
        return number, names, None if self._bad_batch is None else self._bad_batch.cpu()


def _share_draw(draw: Draw | None, config: LoopConfig, processes: Processes) -> None:
    if draw is not None:
        draw.share(processes.rank, processes.size, config.accumulate)
    elif processes.size * config.accumulate > 1:
        raise ConfigError(
            f"config: {processes.size} processes × loop.accumulate {config.accumulate}: this stage does not "
            f"split its batch; expected 1 × 1"
        )


def _averaged(objective: Objective) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """(averaged, trained) parameters by name, and floating-point buffers, which are copied. ``averaged`` may
    hold some of ``trained``'s modules."""
    parameters, buffers = [], []
    for name, module in objective.averaged.items():
        source = dict(objective.trained[name].named_parameters())
        parameters += [(p, source[key]) for key, p in module.named_parameters()]
        held = dict(objective.trained[name].named_buffers())
        buffers += [(b, held[key]) for key, b in module.named_buffers() if b.is_floating_point()]
    return parameters, buffers


def checkpoint_activations(trained: nn.ModuleDict) -> None:
    """Have the modules that can (diffusers' models) recompute activations in the backward pass.

    The models have no dropout, so the random state need not be replayed; reading it would end a capture.
    """
    able = [m for m in trained.values() if hasattr(m, "enable_gradient_checkpointing")]
    if not able:
        raise ConfigError("config: loop.checkpointing: expected a model that can, got none in this stage")
    for module in able:
        module.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        )
