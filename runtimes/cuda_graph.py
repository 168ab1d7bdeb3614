"""A function of fixed shapes as one CUDA graph: its inputs are copied in, everything is replayed at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgeflow.errors import RuntimeFailure
from edgeflow.runtimes import checks

#: Calls before the capture: they compile, choose kernels and fill every cache.
WARM_CALLS = 3


class Captured:
    """``function`` of tensors on the GPU, captured once. The result is overwritten by the next call."""

    def __init__(self, function: Callable[..., Tensor], examples: Sequence[Tensor]):
        """Raises RuntimeFailure where the function cannot be captured: it is then not run another way."""
        # The graph reads weights where they lay when it was captured, and keeps none of them alive.
        self._function = function
        self._inputs = [t.clone() for t in examples]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.no_grad(), torch.cuda.stream(stream):
                for _ in range(WARM_CALLS):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(self._graph):
                self._output = function(*self._inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeFailure(
                f"runtime cuda: it could not be captured: {checks.one_line(error)}"
            ) from error

    def __call__(self, *tensors: Tensor) -> Tensor:
        for static, tensor in zip(self._inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._output

    def on_host(self, *tensors: Tensor) -> Tensor:
        """The same of tensors on the host, to one on the host that is the caller's: copied through
        page-locked memory, which the GPU reads and writes by itself."""
        self(*(t.pin_memory() for t in tensors))
        result = torch.empty_like(self._output, device="cpu", pin_memory=True)
        result.copy_(self._output, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return result
