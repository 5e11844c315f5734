"""`grouped_linear`: the products of fused experts, with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..kernels import ops
from .functions import differentiable, needs_gradient, of_float_activations, once_differentiable, save, total_tangent


def experts_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the expert of each row; the number of experts for rows that belong to none."""
    return torch.bucketize(torch.arange(rows, device=offsets.device), offsets, right=True)


def sum_by_source(grad_rows: Tensor, rows: Tensor | None, sources: int, dtype: torch.dtype) -> Tensor:
    """[sources, K]: the sum of the gradients of all rows that multiplied the same row of x, rounded once."""
    if rows is None:
        return grad_rows.to(dtype)
    total = grad_rows.new_zeros((sources, grad_rows.shape[1]), dtype=torch.float32)
    return total.index_add_(0, rows, grad_rows.to(torch.float32)).to(dtype)


def grouped_bias_gradient(grad_out: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N]: the sum of `grad_out [M, N]` over the rows of each expert."""
    total = grad_out.new_zeros((len(offsets) + 1, grad_out.shape[1]), dtype=torch.float32)
    total.index_add_(0, experts_of_rows(offsets, len(grad_out)), grad_out.to(torch.float32))
    return total[:-1].to(dtype)


class _FrozenExperts(torch.autograd.Function):
    """`ops.grouped_linear` with gradients to x and bias; the quantized weights are constants.

    The rounding of the activations counts as the identity, as in `_FrozenLinear`. No activation is saved.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        rows: Tensor | None,
        offsets: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        scheme: str,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        return ops.grouped_linear(x, offsets, qweight, scales, zeros, bias, scheme, out_dtype, rows=rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, rows, offsets, qweight, scales, zeros, bias, ctx.scheme, _ = inputs
        save(ctx, rows, offsets, qweight, scales, zeros)
        ctx.x_shape, ctx.x_dtype, ctx.out_dtype, ctx.shape = x.shape, x.dtype, output.dtype, output.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, offsets, qweight, scales, zeros = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            sources, in_features = ctx.x_shape
            dtype = ctx.x_dtype if rows is None else torch.float32
            stored = QuantizedWeight(qweight, scales, zeros)
            grad_rows = ops.grouped_linear_grad_input(grad_out, offsets, *stored, in_features, ctx.scheme, dtype)
            grad_x = sum_by_source(grad_rows, rows, sources, ctx.x_dtype)
        if ctx.needs_input_grad[6]:
            grad_bias = grouped_bias_gradient(grad_out, offsets, ctx.bias_dtype)
        return grad_x, None, None, None, None, None, grad_bias, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        x, bias = tangents[0], tangents[6]
        rows, offsets, qweight, scales, zeros = ctx.saved_tensors
        parts = []
        if x is not None:
            stored, floats = QuantizedWeight(qweight, scales, zeros), of_float_activations(ctx.scheme)
            parts.append(ops.grouped_linear(x, offsets, *stored, None, floats, ctx.out_dtype, rows=rows))
        if bias is not None:
            owners = experts_of_rows(offsets, ctx.shape[0])
            parts.append(torch.cat([bias, torch.zeros_like(bias[:1])])[owners])
        return total_tangent(ctx.shape, ctx.out_dtype, *parts)


_frozen_experts = differentiable(_FrozenExperts)


def grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ops.grouped_linear` with straight-through gradients to x and bias; the quantized weights are constants.

    Args:
        x: float [T, K].
        rows: int64 [M] in [0, T): the row of x that each row of the result multiplies; None: M = T, as they are.
        offsets: int64 [E], ascending, at most M: rows of expert e end before `offsets[e]`, and rows from `offsets[-1]`
            on belong to no expert: they give 0, and get no gradient.
        weight: the canonical storages of E weights [N, K], one after the other: [E, N, ...].
        bias: float [E, N] or None.
        scheme: the scheme or its canonical name.
        out_dtype: dtype of the result; None: x.dtype.

    Returns:
        [M, N]. The gradient of a row of x is the sum over all rows that multiplied it, formed in float32.

    Raises:
        RuntimeError: naming the argument that does not fit.

    Example:
        >>> from qkernels.autograd.experts import grouped_linear
        >>> experts, tokens, k = 4, 3, 2
        >>> chosen = torch.tensor([[0, 2], [2, 3], [0, 1]])  # the experts of each token
        >>> order = chosen.flatten().argsort(stable=True)
        >>> offsets = torch.bincount(chosen.flatten(), minlength=experts).cumsum(0)
        >>> weights = qk.quantize_weight(torch.randn(experts * 16, 32), "w8a8").map(lambda t: t.unflatten(0, (-1, 16)))
        >>> grouped_linear(torch.randn(tokens, 32), order // k, offsets, weights, None, "w8a8").shape
        torch.Size([6, 16])
    """
    name = QuantScheme.parse(scheme).name
    needs_x, needs_bias = needs_gradient(x, bias)
    if not (needs_x or needs_bias):
        return ops.grouped_linear(x, offsets, *weight, bias, name, out_dtype, rows=rows)
    return _frozen_experts(x, rows, offsets, *weight, bias, name, out_dtype)
