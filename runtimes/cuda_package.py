"""A graph of a bundle that AOTInductor compiled: its code is checked, loaded, given its weights, captured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeflow import aot_package, gpu_device
from edgeflow.bundle import inside
from edgeflow.errors import RuntimeFailure
from edgeflow.runtimes import checks
from edgeflow.runtimes.cuda_graph import Captured
from edgeflow.spec import GraphSpec

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle

_LOG = logging.getLogger(__name__)


def load_package(bundle: Bundle, graph: GraphSpec, device: str = "cuda") -> Callable[..., Tensor]:
    """The graph as a function of tensors on ``device``, in the order of its inputs.

    Raises RuntimeFailure for code made for another chip or torch, code or weights that cannot be read,
    weights that are not those the code asks for, and a graph that cannot be captured.
    """
    here = {"device": "cpu", "torch": gpu_device.torch_release()}
    if device == "cuda":
        here = gpu_device.require_chip().versions()
    aot_package.check_made_for(bundle.manifest.versions, here, bundle.root)
    code = inside(bundle.root, graph.file)
    with _timed(graph, "weights read"):
        weights = aot_package.read_weights(code.with_name(aot_package.WEIGHTS), device)
    with _timed(graph, "code loaded"):
        package = _Package(code, weights)
    package.check_signature(graph)
    if device == "cpu":
        return package
    with _timed(graph, "captured"):
        return Captured(package, [_example(t, device) for t in graph.inputs])


@contextmanager
def _timed(graph: GraphSpec, what: str) -> Iterator[None]:
    """Say with ``-v`` what a first picture waits for."""
    began = time.monotonic()
    yield
    _LOG.debug("runtime cuda: graph %s: %s in %.2f s", graph.name, what, time.monotonic() - began)


def _example(tensor: Any, device: str) -> Tensor:
    return torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype), device=device)


class _Package:
    """Code and the weights it points into, which must live as long."""

    def __init__(self, code: Any, weights: dict[str, Tensor]):
        self._where, self._weights = code, weights
        try:
            # Without its locks, which a capture does not allow; nobody calls it from two threads.
            self._model = aot_package.load_code(str(code))
            wanted = set(self._model.get_constant_fqns())
        except Exception as error:  # torch raises whatever its archive, its linker or its driver raises
            raise RuntimeFailure(
                f"runtime cuda: {code}: could not be loaded: {checks.one_line(error)}"
            ) from error
        if wanted != set(weights):
            wrong = sorted(wanted ^ set(weights))[0]
            raise RuntimeFailure(
                f"runtime cuda: {code}: expected the {len(wanted)} weights that the code asks for, got "
                f"{len(weights)}, which differ in {wrong}"
            )
        # use_inactive (a second set of weights), check_full_update, user_managed
        self._model.load_constants(weights, False, True, True)

    def check_signature(self, graph: GraphSpec) -> None:
        """Raises RuntimeFailure where the code's own record of its tensors is not the manifest's."""
        said = self._model.get_metadata()
        checks.expect_keys("cuda", graph, said.get("inputs", "").split(), said.get("outputs", "").split())

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self._model.run(list(tensors))[0]
