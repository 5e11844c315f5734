"""`mask_gradient`: a trained weight of which some values stay 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _MaskGradient(torch.autograd.Function):
    """The weight itself, whose gradient is 0 where the mask is False."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return tangent * mask


def mask_gradient(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` [N, K], with a gradient that is 0 where the bool `mask` [N, K] is False."""
    return _MaskGradient.apply(weight, mask)
