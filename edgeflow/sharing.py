"""Copies of a model's structure over the same tensors: a rewrite of a model of gigabytes costs none."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def sharing_copy(module: nn.Module) -> Any:
    """A copy of the module's structure that shares its tensors."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
