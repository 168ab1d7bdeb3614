"""Copies of a model's structure over the same tensors: a rewrite of a model of gigabytes costs none."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def sharing_copy(module: nn.Module) -> Any:
    """A copy of the module's structure that shares its tensors."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def placed_children(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every child with its parent and its name there, listed before anything is changed."""
    return [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]


def constant(tensor: Tensor) -> nn.Parameter:
    """A tensor as a parameter that is not trained."""
    from torch import nn

    return nn.Parameter(tensor, requires_grad=False)
