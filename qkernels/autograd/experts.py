"""`grouped_linear` and `trained_grouped_linear`: the products of fused experts, with straight-through gradients."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..formats.philox import draw_seed
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..kernels import ops
from .functions import (
    anchors,
    differentiable,
    needs_gradient,
    once_differentiable,
    save,
    total_tangent,
)
from .trained import quantized_weight, x_scale_gradient


def grouped_column_scales(weight: QuantizedWeight, in_features: int, scheme: str) -> Tensor:
    """float32 [E, K]: `ops.column_scales` of each expert."""
    each = [weight.map(itemgetter(expert)) for expert in range(len(weight.qweight))]
    return torch.stack([ops.column_scales(*stored, in_features, scheme) for stored in each])


def _experts_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the expert of each row; the number of experts for rows that belong to none."""
    return torch.bucketize(torch.arange(rows, device=offsets.device), offsets, right=True)


def _input_gradient(
    ctx: Any,
    grad_out: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: QuantizedWeight,
    seed: Tensor | None,
    column_scales: Tensor | None,
) -> Tensor:
    """The gradient of x [T, K]: the sum over all rows that multiplied the same row, in float32, rounded once.

    It gets the saved tensors, which may be unpacked once only (activation checkpointing).
    """
    sources, in_features = ctx.x_shape
    grad_rows = ops.grouped_linear_grad_input(
        grad_out,
        offsets,
        *weight,
        in_features,
        ctx.scheme.name,
        seed,
        column_scales=column_scales,
        out_dtype=ctx.x_dtype if rows is None else torch.float32,
    )
    if rows is None:
        return grad_rows
    return grad_rows.new_zeros((sources, in_features)).index_add_(0, rows, grad_rows).to(ctx.x_dtype)


def _bias_gradient(grad_out: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N]: the sum of `grad_out [M, N]` over the rows of each expert."""
    total = grad_out.new_zeros((len(offsets) + 1, grad_out.shape[1]), dtype=torch.float32)
    total.index_add_(0, _experts_of_rows(offsets, len(grad_out)), grad_out.to(torch.float32))
    return total[:-1].to(dtype)


def _tangents(
    ctx: Any, x: Tensor | None, weight: QuantizedWeight, bias: Tensor | None, scheme: str | QuantScheme
) -> list[Tensor | None]:
    """How the output changes with x, straight through the rounding of that, and with the bias."""
    rows, offsets = ctx.saved_tensors[:2]
    parts: list[Tensor | None] = []
    if x is not None:
        floats = QuantScheme.parse(scheme).of_floats
        parts.append(ops.grouped_linear(x, offsets, *weight, None, floats, ctx.out_dtype, rows=rows))
    if bias is not None:
        owners = _experts_of_rows(offsets, ctx.shape[0])
        parts.append(torch.cat([bias, torch.zeros_like(bias[:1])])[owners])
    return parts


class _FrozenExperts(torch.autograd.Function):
    """`ops.grouped_linear` with gradients to x and bias; the quantized weights are constants.

    The rounding of the activations counts as the identity, as in `_FrozenLinear`. No activation is saved. With a seed,
    `grad_out` is rounded to int8.
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
        scheme: QuantScheme,
        out_dtype: torch.dtype | None,
        seed: Tensor | None,
        column_scales: Tensor | None,
        x_scale: Tensor | None,
    ) -> Tensor:
        stored = (qweight, scales, zeros)
        return ops.grouped_linear(x, offsets, *stored, bias, scheme.name, out_dtype, rows=rows, x_scale=x_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, rows, offsets, qweight, scales, zeros, bias, ctx.scheme, _, seed, column_scales, _ = inputs
        save(ctx, rows, offsets, qweight, scales, zeros, seed, column_scales)
        ctx.x_shape, ctx.x_dtype, ctx.out_dtype, ctx.shape = x.shape, x.dtype, output.dtype, output.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, offsets, qweight, scales, zeros, seed, column_scales = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(
                ctx, grad_out, rows, offsets, QuantizedWeight(qweight, scales, zeros), seed, column_scales
            )
        if ctx.needs_input_grad[6]:
            grad_bias = _bias_gradient(grad_out, offsets, ctx.bias_dtype)
        return grad_x, None, None, None, None, None, grad_bias, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        stored = QuantizedWeight(*ctx.saved_tensors[2:5])
        parts = _tangents(ctx, tangents[0], stored, tangents[6], ctx.scheme)
        return total_tangent(ctx.shape, ctx.out_dtype, *parts)


class _TrainedExperts(torch.autograd.Function):
    """`ops.grouped_linear` with gradients to x, bias and weights [E * N, K]: what `_TrainedLinear` is to `linear`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        rows: Tensor | None,
        offsets: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        scheme: QuantScheme,
        out_dtype: torch.dtype | None,
        seed: Tensor | None,
        needs_x: bool,
        needs_weight: bool,
        x_scale: Tensor | None,
        needs_x_scale: bool,
        *graphs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        flat = quantized_weight(weight, scales, scheme)
        stored = _by_expert(flat, len(offsets))
        out = ops.grouped_linear(x, offsets, *stored, bias, scheme.name, out_dtype, rows=rows, x_scale=x_scale)
        needs_x = needs_x or needs_x_scale
        kept: tuple[Tensor | None, ...] = flat if needs_x else (None, None, None)
        if needs_x and scales is not None:
            kept = (flat.qweight, None, flat.zeros)  # the scales are an input
        if not (needs_weight and scheme.int_activations):
            return out, None, None, *kept
        # A product with no columns is nothing but x with one scale a row.
        none = flat.map(lambda tensor: tensor[:0])
        return out, *ops.linear_with_saved_input(x, *none, None, scheme.name, x_scale=x_scale)[1:], *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, rows, offsets, weight, scales, bias, ctx.scheme, _, seed, _, needs_weight, x_scale, learns, *graphs = inputs
        out, saved_x, x_scales, *kept = output
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        if needs_weight and saved_x is None:
            saved_x = x
        if kept[0] is not None and scales is not None:
            kept[1] = scales
        clips = ctx.scheme.weight_bits == 4 or scales is not None
        master, learned = (weight, scales) if needs_weight and clips else (None, None)
        clamped = (x, x_scale) if learns else (None, None)
        save(ctx, rows, offsets, *kept, saved_x, x_scales, master, learned, seed, *clamped, *graphs)
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.out_dtype, ctx.shape = out.dtype, out.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        rows, offsets, qweight, scales, zeros, saved_x, x_scales, master, learned, seed, x, x_scale, *_graphs = (
            ctx.saved_tensors
        )
        needs_x, _, _, needs_weight, needs_scales, needs_bias = ctx.needs_input_grad[:6]
        name = ctx.scheme.name
        grad_x = grad_weight = grad_scales = grad_bias = grad_x_scale = None
        if needs_x or x_scale is not None:
            stored = _by_expert(QuantizedWeight(qweight, scales, zeros), len(offsets))
            grouped = seed is not None and not ctx.scheme.row_scaled
            column_scales = grouped_column_scales(stored, ctx.x_shape[1], name) if grouped else None
            grad_x = _input_gradient(ctx, grad_out, rows, offsets, stored, seed, column_scales)
        if x_scale is not None:
            assert grad_x is not None
            grad_x, grad_x_scale = x_scale_gradient(grad_x, x, x_scale)
        if needs_weight or needs_scales:
            if x_scales is None:
                grad_weight = ops.grouped_outer(grad_out, offsets, saved_x, rows)
            else:
                grad_weight = ops.grouped_linear_grad_weight(
                    grad_out, offsets, saved_x, x_scales, rows, seed, out_dtype=ctx.weight_dtype
                )
            grad_weight = grad_weight.flatten(0, 1).to(ctx.weight_dtype)
            if learned is not None:
                grad_weight, grad_scales = ops.scale_gradient(grad_weight, master, learned, name)
            elif master is not None:
                grad_weight = ops.mask_clipped(grad_weight, master, name)
        if needs_bias:
            grad_bias = _bias_gradient(grad_out, offsets, ctx.bias_dtype)
        rest = (None,) * (len(ctx.needs_input_grad) - 12)
        return grad_x, None, None, grad_weight, grad_scales, grad_bias, *(None,) * 5, grad_x_scale, *rest

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(tangents[place] is not None for place in (3, 4, 11)):
            raise NotImplementedError("forward-mode derivatives with respect to the weights or scales of experts")
        stored = _by_expert(QuantizedWeight(*ctx.saved_tensors[2:5]), len(ctx.saved_tensors[1]))
        parts = _tangents(ctx, tangents[0], stored, tangents[5], ctx.scheme)
        return total_tangent(ctx.shape, ctx.out_dtype, *parts), None, None, None, None, None


def _by_expert(flat: QuantizedWeight, experts: int) -> QuantizedWeight:
    """Storages [E * N, ...] as [E, N, ...]."""
    return flat.map(lambda tensor: tensor.unflatten(0, (experts, len(tensor) // max(experts, 1))))


_frozen_experts = differentiable(_FrozenExperts)
_trained_experts = differentiable(_TrainedExperts)


def grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    *,
    out_dtype: torch.dtype | None = None,
    grad_dtype: str = "float",
    column_scales: Tensor | None = None,
    x_scale: Tensor | None = None,
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
        grad_dtype: "int8" rounds the gradient of the output stochastically to int8 for the product with the weights.
        column_scales: `grouped_column_scales` of the weights, for that and `-g` schemes; None: computed in the
            backward.
        x_scale: float32 [1], the scale of the activations, for `a8s` schemes only.

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
    scheme = QuantScheme.parse(scheme)
    needs_x, needs_bias = needs_gradient(x, bias)
    if not (needs_x or needs_bias):
        return ops.grouped_linear(x, offsets, *weight, bias, scheme.name, out_dtype, rows=rows, x_scale=x_scale)
    seed = draw_seed() if grad_dtype == "int8" and needs_x else None
    if seed is not None and not scheme.row_scaled and column_scales is None:
        column_scales = grouped_column_scales(weight, x.shape[1], scheme.name)
    return _frozen_experts(x, rows, offsets, *weight, bias, scheme, out_dtype, seed, column_scales, x_scale)


def trained_grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: QuantScheme,
    *,
    out_dtype: torch.dtype | None = None,
    grad_dtype: str = "float",
    scales: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """`grouped_linear` with weights that are trained: they are quantized in each call, and get a gradient.

    Args:
        x, rows, offsets, bias, out_dtype: as in `grouped_linear`.
        weight: float [E, N, K], or the same rows as [E * N, K]: a float tensor or an `Int8Weight`, which is multiplied
            as it is.
        scheme: the format and the activations.
        grad_dtype: "int8" rounds the gradient of the output stochastically to int8 for both products.
        scales: float32 [E, N, groups] or [E * N, groups] that a float weight is rounded to, and that are trained; None:
            those of its range.
        x_scale: float32 [1], the scale of the activations of `a8s` schemes, which is trained if there are `scales`.

    Returns:
        [M, N]. The gradient of the weight has its shape; an expert without rows gets zeros.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    weight = weight if weight.dim() == 2 else weight.flatten(0, 1)
    scales = scales if scales is None or scales.dim() == 2 else scales.flatten(0, 1)
    learned = (scales, x_scale) if scales is not None else (None, None)
    needs_x, needs_weight, needs_bias, needs_scales, needs_x_scale = needs_gradient(x, weight, bias, *learned)
    if not (needs_x or needs_weight or needs_scales or needs_bias or needs_x_scale):
        stored = _by_expert(quantized_weight(weight, scales, scheme), len(offsets))
        return ops.grouped_linear(x, offsets, *stored, bias, scheme.name, out_dtype, rows=rows, x_scale=x_scale)
    needs_weight = needs_weight or needs_scales
    seed = draw_seed() if grad_dtype == "int8" and (needs_x or needs_weight or needs_x_scale) else None
    graphs = anchors(x if needs_x else None, weight if needs_weight else None)
    options = (scheme, out_dtype, seed, needs_x, needs_weight, x_scale, needs_x_scale)
    return _trained_experts(x, rows, offsets, weight, scales, bias, *options, *graphs)
