"""Inputs in the order in which a layer stores the columns of its weight (`QuantLinear.input_order`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functions import needs_gradient


def gather_features(x: Tensor, order: Tensor | None) -> Tensor:
    """x [..., K] with feature `order[j]` in the place j, and a gradient that goes back there; None: x itself."""
    if order is None:
        return x
    if torch.compiler.is_compiling() or not any(needs_gradient(x)):
        return x.index_select(-1, order)
    return _GatherFeatures.apply(x, order)


class _GatherFeatures(torch.autograd.Function):
    """Its gradient is the gather by the inverse: that of torch adds up, and takes 10 times as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(-1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_features(grad, ctx.saved_tensors[0].argsort()), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return gather_features(tangent, ctx.saved_tensors[0])
