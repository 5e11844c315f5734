"""`trained_linear`: a weight that is quantized in every call, with straight-through gradients to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.philox import draw_seed
from ..formats.scheme import QuantScheme
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
from .int8_gradients import LinearWeight, input_gradient, weight_gradient
from .int8_weight import Int8Weight


class _TrainedLinear(torch.autograd.Function):
    """`linear` with gradients to x, bias and weight: a float master weight, quantized here, or an `Int8Weight`.

    With x^ and w^ for what is multiplied, grad_x = grad_out @ w^ and grad_w = grad_out.T @ x^, the latter 0 where
    clamping changed an integer. Scales are chosen by the range of the weight or, if they are given, trained with it
    (learned step size, Esser et al. 2020, arXiv:1902.08153). So is the scale of static activations then, and the
    gradient of x is 0 where x was clamped. Saved are, as far as their gradient is asked for: x as int8 (`a16` schemes,
    and for a learned scale: x itself) and the quantized weight. With a seed, `grad_out` is rounded to int8 for both
    products, except for the gradient of the weight under `a16`, whose x is a float.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
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
        quantized = quantized_weight(weight, scales, scheme)
        needs_x = needs_x or needs_x_scale
        kept: tuple[Tensor | None, ...] = quantized if needs_x else (None, None, None)
        if needs_x and scales is not None:
            kept = (quantized.qweight, None, quantized.zeros)  # the scales are an input
        if needs_weight and scheme.int_activations:
            return *ops.linear_with_saved_input(x, *quantized, bias, scheme.name, out_dtype, x_scale), *kept
        return ops.linear(x, *quantized, bias, scheme.name, out_dtype, x_scale), None, None, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, scales, bias, ctx.scheme, _, seed, _, needs_weight, x_scale, needs_x_scale, *graphs = inputs
        out, saved_x, x_scales, *kept = output
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        if needs_weight and saved_x is None:
            saved_x = x
        if kept[0] is not None and scales is not None:
            kept[1] = scales
        clips = ctx.scheme.weight_bits == 4 or scales is not None
        master, learned = (weight, scales) if needs_weight and clips else (None, None)
        clamped = (x, x_scale) if needs_x_scale else (None, None)
        save(ctx, *kept, saved_x, x_scales, master, learned, seed, *clamped, *graphs)
        ctx.in_features, ctx.x_dtype, ctx.weight_dtype = x.shape[1], x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.out_dtype, ctx.shape = out.dtype, out.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        qweight, scales, zeros, saved_x, x_scales, master, learned, seed, x, x_scale, _, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_scales, needs_bias = ctx.needs_input_grad[:4]
        name, in_features = ctx.scheme.name, ctx.in_features
        grad_x = grad_weight = grad_scales = grad_bias = grad_x_scale = None
        if needs_x or x_scale is not None:
            grouped = seed is not None and not ctx.scheme.row_scaled
            stored = QuantizedWeight(qweight, scales, zeros)
            column_scales = ops.column_scales(*stored, in_features, name) if grouped else None
            weight = LinearWeight(stored, in_features, name, column_scales)
            grad_x = input_gradient(grad_out, weight, seed, ctx.x_dtype)
        if x_scale is not None:
            assert grad_x is not None
            grad_x, grad_x_scale = x_scale_gradient(grad_x, x, x_scale)
        if needs_weight or needs_scales:
            grad_weight = weight_gradient(grad_out, saved_x, x_scales, seed, ctx.weight_dtype)
            if learned is not None:
                grad_weight, grad_scales = ops.scale_gradient(grad_weight, master, learned, name)
            elif master is not None:
                grad_weight = ops.mask_clipped(grad_weight, master, name)
        if needs_bias:
            grad_bias = bias_gradient(grad_out, ctx.bias_dtype)
        return grad_x, grad_weight, grad_scales, grad_bias, *(None,) * 5, grad_x_scale, None, None, None

    @staticmethod
    def tangent(
        ctx: Any, x: Tensor | None, weight: Tensor | None, scales: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        *kept, saved_x, x_scales, master, learned = ctx.saved_tensors[:7]
        if scales is not None or rest[5] is not None:
            raise NotImplementedError("forward-mode derivatives with respect to learned scales are not implemented")
        parts = [tangent_product(x, QuantizedWeight(*kept), ctx.scheme, ctx.out_dtype), bias]
        if weight is not None:
            if learned is not None:
                weight = ops.scale_gradient(weight, master, learned, ctx.scheme.name)[0]
            elif master is not None:
                weight = ops.mask_clipped(weight, master, ctx.scheme.name)
            inputs = saved_x if x_scales is None else saved_x * x_scales.unsqueeze(1)
            parts.append(inputs.to(torch.float32) @ weight.to(torch.float32).t())
        return total_tangent(ctx.shape, ctx.out_dtype, *parts), None, None, None, None, None


def x_scale_gradient(grad: Tensor, x: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the gradient [M, K] of quantized activations is for x, and for their scale [1] (rule 11, on rows of x)."""
    grad_x, grad_scales = ops.scale_gradient(grad, x, x_scale.expand(len(x), 1), "w8a8")
    return grad_x, grad_scales.sum(dim=0)


def quantized_weight(weight: Tensor, scales: Tensor | None, scheme: QuantScheme) -> QuantizedWeight:
    """The quantized weight that is multiplied in the place of a trained one."""
    if isinstance(weight, Int8Weight):
        return QuantizedWeight(weight.qweight, weight.scales, None)
    if scales is not None:
        return QuantizedWeight(ops.quantize_weight_scaled(weight, scales, scheme.name), scales, None)
    return ops.quantize_weight(weight, scheme.name)


_trained_linear = differentiable(_TrainedLinear)


def trained_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: QuantScheme,
    out_dtype: torch.dtype | None = None,
    grad_dtype: str = "float",
    scales: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """`quant_linear` with a weight that is trained: it is quantized in each call, and gets a gradient.

    Args:
        x: float [..., K].
        weight: float [N, K], or an `Int8Weight`, which is multiplied as it is.
        bias, out_dtype: as in `ops.linear`.
        scheme: the format and the activations.
        grad_dtype: "int8" rounds the gradient of the output stochastically to int8 for both products.
        scales: float32 [N, groups] that a float weight is rounded to, and that are trained; None: those of its range.
        x_scale: float32 [1], the scale of the activations of `a8s` schemes, which is trained if there are `scales`.

    Returns:
        [..., N] of `out_dtype` or x.dtype.
    """
    learned = (scales, x_scale) if scales is not None else (None, None)
    needs_x, needs_weight, needs_bias, needs_scales, needs_x_scale = needs_gradient(x, weight, bias, *learned)
    if torch.jit.is_tracing() and isinstance(weight, Int8Weight):  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace cannot hold a layer of mode 'int8'; qkernels.freeze_(model) makes it frozen, with the "
            "same outputs, and that can be traced"
        )
    if not (needs_x or needs_weight or needs_scales or needs_bias or needs_x_scale):
        return over_leading_dimensions(
            _trained_without_gradient, x, weight.shape[0], weight, scales, bias, scheme, out_dtype, x_scale
        )
    needs_weight = needs_weight or needs_scales
    seed = draw_seed() if grad_dtype == "int8" and (needs_x or needs_weight or needs_x_scale) else None
    graphs = anchors(x if needs_x else None, weight if needs_weight else None)
    args = (weight, scales, bias, scheme, out_dtype, seed, needs_x, needs_weight, x_scale, needs_x_scale, *graphs)
    return over_leading_dimensions(_trained_linear, x, weight.shape[0], *args)


def _trained_without_gradient(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    scheme: QuantScheme,
    out_dtype: torch.dtype | None,
    x_scale: Tensor | None,
) -> Tensor:
    return ops.linear(x, *quantized_weight(weight, scales, scheme), bias, scheme.name, out_dtype, x_scale)
