"""Facts about a call that reached a tensor subclass: who made it, what it writes to, and what it returns."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..formats.philox import is_traced


def called_by(module: str) -> bool:
    """True if a function of `module` made the call, from outside of this package, that led to the caller."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(__package__):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith(module)


def count_write(*tensors: Tensor) -> None:
    """Tell autograd of a write that it does not see."""
    if not is_traced():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def is_view(returned: Any) -> bool:
    """True if a result, as a schema describes it, is a view of an argument."""
    return returned.alias_info is not None and not returned.alias_info.is_write


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return found
