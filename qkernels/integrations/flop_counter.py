"""torch's `FlopCounterMode`: our products count as those of a float layer do, two operations for each multiply-add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.qkernels


@register_flop_formula([_ops.linear, _ops.linear_with_saved_input])
def _linear(x_shape: Sequence[int], qweight_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * qweight_shape[0]


@register_flop_formula(_ops.grouped_linear)
def _grouped_linear(
    x_shape: Sequence[int], offsets_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * x_shape[1] * out_shape[0] * out_shape[1]  # rows of no expert count, too: shapes do not tell them


@register_flop_formula([_ops.linear_grad_input, _ops.int_grad_input, _ops.grouped_linear_grad_input])
def _grad_input(grad_shape: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * grad_shape[0] * grad_shape[1] * out_shape[1]


@register_flop_formula(_ops.linear_cross_entropy)
def _linear_cross_entropy(
    hidden_shape: Sequence[int],
    target_shape: Any,
    qweight_shape: Sequence[int],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    logits = 2 * hidden_shape[0] * hidden_shape[1] * qweight_shape[0]
    return logits * (2 if out_shape[2][0] else 1)  # with a gradient, if there are rows of it
