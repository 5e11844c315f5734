"""Nested tensors of layout `torch.jagged`: a layer is applied to their values, which are one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def over_values(layer: Callable[[Tensor], Tensor], x: Tensor, trailing: int) -> Tensor:
    """A jagged tensor of the structure of `x`, of what `layer` makes of its values.

    Args:
        layer: keeps all dimensions of a tensor but the last `trailing`.
        x: a nested tensor [B, ragged, ...].
        trailing: dimensions that the layer looks at, 1 for features and 0 for indices; they must not be the ragged one.

    Raises:
        TypeError: for a nested tensor of layout `torch.strided`, or one that is ragged in the dimension of features.
    """
    nested: Any = x
    if x.layout != torch.jagged or nested._ragged_idx >= x.dim() - trailing:
        raise TypeError(
            "input must be a nested tensor of layout torch.jagged whose last dimension is not the ragged one, got "
            f"layout {x.layout}; torch.nested.nested_tensor(tensors, layout=torch.jagged) makes one"
        )
    values = layer(nested.values())
    return torch.nested.nested_tensor_from_jagged(
        values, nested.offsets(), lengths=nested.lengths(), jagged_dim=nested._ragged_idx
    )
