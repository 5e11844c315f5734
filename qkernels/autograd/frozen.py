"""`quant_linear` and `adapted_linear`: a frozen weight, with straight-through gradients to x, bias and adapters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.philox import draw_seed
from ..formats.storage import QuantizedWeight
from ..kernels import ops
from .functions import (
    anchors,
    bias_gradient,
    differentiable,
    needs_gradient,
    once_differentiable,
    over_leading_dimensions,
    save,
    tangent_product,
    total_tangent,
)
from .int8_gradients import LinearWeight, input_gradient


class _FrozenLinear(torch.autograd.Function):
    """`linear` with gradients to x and bias; the quantized weight is a constant.

    The rounding of the activations counts as the identity (straight-through estimator, Bengio et al. 2013,
    arXiv:1308.3432), so grad_x = grad_out @ dequantize(weight). No activation is saved: the gradient needs the weight
    only, which is resident anyway. With a seed, `grad_out` is rounded to int8 for that product. Double backward is
    refused by `once_differentiable`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        scheme: str,
        out_dtype: torch.dtype | None,
        seed: Tensor | None,
        column_scales: Tensor | None,
        x_scale: Tensor | None,
    ) -> Tensor:
        return ops.linear(x, qweight, scales, zeros, bias, scheme, out_dtype, x_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, qweight, scales, zeros, bias, ctx.scheme, _, seed, column_scales, _ = inputs
        save(ctx, qweight, scales, zeros, seed, column_scales)
        ctx.in_features, ctx.x_dtype, ctx.out_dtype, ctx.shape = x.shape[1], x.dtype, output.dtype, output.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            *stored, seed, column_scales = ctx.saved_tensors
            weight = LinearWeight(QuantizedWeight(*stored), ctx.in_features, ctx.scheme, column_scales)
            grad_x = input_gradient(grad_out, weight, seed, ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = bias_gradient(grad_out, ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, None, None, None, None, None

    @staticmethod
    def tangent(
        ctx: Any, x: Tensor | None, qweight: None, scales: None, zeros: None, bias: Tensor | None, *_: None
    ) -> Tensor | None:
        weight = QuantizedWeight(*ctx.saved_tensors[:3])
        out = tangent_product(x, weight, ctx.scheme, ctx.out_dtype)
        return total_tangent(ctx.shape, ctx.out_dtype, out, bias)


class LowRank(NamedTuple):
    """An adapter beside a frozen weight: adds `(x @ down.T * scaling) @ up.T` to the output.

    Attributes:
        down: float [r, K].
        up: float [N, r].
        scaling: a number.
    """

    down: Tensor
    up: Tensor
    scaling: float


class _AdaptedLinear(torch.autograd.Function):
    """`_FrozenLinear` and a `LowRank` in one: the products of the adapter add in place, forward and backward.

    The adapter is multiplied in the dtype of the output and gets gradients of its own dtype. Saved are x and
    `x @ down.T * scaling`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        scheme: str,
        out_dtype: torch.dtype | None,
        seed: Tensor | None,
        column_scales: Tensor | None,
        x_scale: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        anchor: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out = ops.linear(x, qweight, scales, zeros, bias, scheme, out_dtype, x_scale)
        cast = x.to(out.dtype)
        middle = (cast @ down.to(out.dtype).t()).mul_(scaling)
        out.addmm_(middle, up.to(out.dtype).t())
        return out, middle, None if cast is x else cast

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, *weight, bias, ctx.scheme, _, seed, column_scales, _, down, up, ctx.scaling, anchor = inputs
        out, middle, cast = output
        ctx.mark_non_differentiable(middle, *([] if cast is None else [cast]))
        factor = x if cast is None else cast
        save(ctx, *weight, seed, column_scales, factor, middle, down, up, anchor)
        ctx.x_dtype, ctx.out_dtype, ctx.shape = x.dtype, out.dtype, out.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        *stored, seed, column_scales, factor, middle, down, up, _ = ctx.saved_tensors
        needs_x, needs_bias, needs_down, needs_up = (ctx.needs_input_grad[i] for i in (0, 4, 10, 11))
        grad_x = grad_bias = grad_down = grad_up = None
        if needs_x or needs_down:
            grad_middle = (grad_out @ up.to(grad_out.dtype)).mul_(ctx.scaling)
        if needs_x:
            weight = LinearWeight(QuantizedWeight(*stored), factor.shape[1], ctx.scheme, column_scales)
            grad_x = input_gradient(grad_out, weight, seed, ctx.x_dtype)
            grad_x.addmm_(grad_middle.to(grad_x.dtype), down.to(grad_x.dtype))
        if needs_bias:
            grad_bias = bias_gradient(grad_out, ctx.bias_dtype)
        if needs_down:
            grad_down = (grad_middle.t() @ factor).to(down.dtype)
        if needs_up:
            grad_up = (grad_out.t() @ middle).to(up.dtype)
        return grad_x, None, None, None, grad_bias, *(None,) * 5, grad_down, grad_up, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        x, bias, down_tangent, up_tangent = (tangents[i] for i in (0, 4, 10, 11))
        *weight, _, _, factor, middle, down, up = ctx.saved_tensors[:9]
        dtype = ctx.out_dtype
        parts = [tangent_product(x, QuantizedWeight(*weight), ctx.scheme, dtype), bias]
        for left, right in ((x, down), (factor, down_tangent)):
            if left is not None and right is not None:
                parts.append((left.to(dtype) @ right.to(dtype).t()) @ up.to(dtype).t() * ctx.scaling)
        if up_tangent is not None:
            parts.append(middle @ up_tangent.to(dtype).t())
        return total_tangent(ctx.shape, dtype, *parts), None, None


_frozen_linear = differentiable(_FrozenLinear)
_adapted_linear = differentiable(_AdaptedLinear)


def quant_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None = None,
    grad_dtype: str = "float",
    column_scales: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """`ops.linear` over any leading dimensions, with straight-through gradients to x and bias.

    Args:
        x: float [..., K].
        weight: the canonical storage of a weight [N, K].
        bias, scheme, out_dtype, x_scale: as in `ops.linear`.
        grad_dtype: "int8" rounds the gradient of the output stochastically to int8 for the product with the weight.
        column_scales: `ops.column_scales` of the weight, for that and `-g` schemes.

    Returns:
        [..., N] of `out_dtype` or x.dtype.
    """
    out_features = weight.qweight.shape[0]
    needs_x, needs_bias = needs_gradient(x, bias)
    if not (needs_x or needs_bias):
        return over_leading_dimensions(ops.linear, x, out_features, *weight, bias, scheme, out_dtype, x_scale)
    seed = draw_seed() if grad_dtype == "int8" and needs_x else None
    args = (*weight, bias, scheme, out_dtype, seed, column_scales, x_scale)
    return over_leading_dimensions(_frozen_linear, x, out_features, *args)


def adapted_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: str,
    adapter: LowRank,
    out_dtype: torch.dtype | None = None,
    grad_dtype: str = "float",
    column_scales: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
) -> Tensor:
    """`quant_linear` plus a low-rank product, with gradients to both of its matrices too.

    Args:
        x, weight, bias, scheme, out_dtype, grad_dtype, column_scales, x_scale: as in `quant_linear`.
        adapter: what is added, multiplied in the dtype of the output.

    Returns:
        [..., N] of `out_dtype` or x.dtype.
    """
    needs = needs_gradient(x, bias, adapter.down, adapter.up)
    if not any(needs):
        return over_leading_dimensions(
            _adapted_without_gradient, x, weight.qweight.shape[0], weight, bias, scheme, out_dtype, adapter, x_scale
        )
    seed = draw_seed() if grad_dtype == "int8" and needs[0] else None
    output_dtype = out_dtype or x.dtype
    anchor = anchors(x if needs[0] and x.dtype != output_dtype else None)
    args = (*weight, bias, scheme, out_dtype, seed, column_scales, x_scale, *adapter, *anchor)
    return over_leading_dimensions(_adapted_linear, x, weight.qweight.shape[0], *args)


def _adapted_without_gradient(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None,
    adapter: LowRank,
    x_scale: Tensor | None,
) -> Tensor:
    return _AdaptedLinear.forward(x, *weight, bias, scheme, out_dtype, None, None, x_scale, *adapter, None)[0]
