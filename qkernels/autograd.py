"""Straight-through gradients of the quantized linear: which tensors are saved and which gradients exist."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import heap, ops
from .int8_weight import Int8Weight
from .quantize import QuantizedWeight, weight_integers
from .schemes import QuantScheme
from .stochastic import GRAD_INPUT, GRAD_WEIGHT, draw_seed

# Terms that a gradient sums in integers; the sums of longer ones are added in float32.
_BLOCK = 65536


def _product(
    q_grad: Tensor,
    grad_scales: Tensor,
    weight: QuantizedWeight,
    in_features: int,
    scheme: str,
    columns: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`ops.int_grad_input`, for any depth: blocks of rows of the weight, whose sums are added in ascending order."""
    depth = q_grad.shape[1]
    if depth <= _BLOCK:
        return ops.int_grad_input(q_grad, grad_scales, *weight, in_features, scheme, columns, out_dtype=out_dtype)
    total, ones = None, torch.ones_like(grad_scales)
    for start in range(0, depth, _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = (None if tensor is None else tensor[rows] for tensor in weight)
        part = ops.int_grad_input(q_grad[:, rows], ones, *block, in_features, scheme, columns)
        total = part if total is None else total + part
    return (total * grad_scales[:, None]).to(out_dtype)


def _row_factors(weight: QuantizedWeight, in_features: int, scheme: str) -> Tensor:
    """The scales to fold into a gradient [N]. A row of zeros has a scale of 1, which would set that of all others."""
    factors = weight.scales.flatten()
    ones = factors == 1.0
    if not torch.compiler.is_compiling() and not ones.any():
        return factors
    zero = (weight_integers(weight.qweight, weight.zeros, in_features, scheme) == 0).all(dim=1)
    return torch.where(ones & zero, 0.0, factors)


def int8_grad_input(
    grad_out: Tensor,
    weight: QuantizedWeight,
    in_features: int,
    scheme: str,
    columns: Tensor | None,
    seed: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Gradient of `ops.linear` with respect to x as an integer product of the stochastically rounded `grad_out`.

    The scale of a weight with one scale a row is folded into `grad_out` before that is rounded.

    Args:
        grad_out: float [M, N].
        weight: the canonical storage of a weight [N, in_features] for `scheme`.
        columns: `ops.column_scales` of the weight under `-g` schemes, else None.
        seed: int64 of shape [].
        out_dtype: of the result [M, in_features].
    """
    folded = _row_factors(weight, in_features, scheme) if columns is None else None
    q_grad, grad_scales = ops.quantize_rows(grad_out, folded, seed, GRAD_INPUT)
    return _product(q_grad, grad_scales, weight, in_features, scheme, columns, out_dtype)


def int8_grad_weight(grad_out: Tensor, qx: Tensor, x_scales: Tensor, seed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Gradient of `ops.linear` with respect to the weight as an integer product, the scales of x folded in likewise.

    Args:
        grad_out: float [M, N].
        qx, x_scales: int8 [M, K] and float32 [M], as `ops.linear_saving` returns them.
        seed: int64 of shape [].
        out_dtype: of the result [N, K].
    """
    q_grad, grad_scales = ops.quantize_columns(grad_out, x_scales, seed, GRAD_WEIGHT)
    x = QuantizedWeight(qx, torch.ones_like(x_scales).unsqueeze(1), None)
    return _product(q_grad, grad_scales, x, qx.shape[1], "w8a8", None, out_dtype)


def _frozen_grad_input(
    grad_out: Tensor,
    weight: QuantizedWeight,
    in_features: int,
    scheme: str,
    columns: Tensor | None,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`int8_grad_input`, or without a seed the product of floats."""
    if seed is None:
        return ops.linear_grad_input(grad_out, *weight, in_features, scheme, out_dtype)
    return int8_grad_input(grad_out, weight, in_features, scheme, columns, seed, out_dtype)


def _grad_bias(grad_out: Tensor, dtype: torch.dtype) -> Tensor:
    # torch adds bfloat16 and float16 in float32 and rounds once; with `dtype` it would copy grad_out to float32 first.
    return grad_out.sum(dim=0, dtype=None if grad_out.dtype == dtype else torch.float32).to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """`linear` with gradients to x and bias; the quantized weight is a constant.

    The rounding of the activations counts as the identity (straight-through estimator, Bengio et al. 2013,
    arXiv:1308.3432), so grad_x = grad_out @ dequantize(weight). No activation is saved: the gradient needs the weight
    only, which is resident anyway. With a seed, `grad_out` is rounded to int8 for that product. Double backward is
    refused by `once_differentiable`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, qweight, scales, zeros, bias, scheme, out_dtype, seed, columns):
        return ops.linear(x, qweight, scales, zeros, bias, scheme, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, qweight, scales, zeros, bias, ctx.scheme, _, seed, columns = inputs
        ctx.save_for_backward(qweight, scales, zeros, seed, columns)
        ctx.in_features, ctx.x_dtype = x.shape[1], x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            *weight, seed, columns = ctx.saved_tensors
            fixed = (ctx.in_features, ctx.scheme)
            grad_x = _frozen_grad_input(grad_out, QuantizedWeight(*weight), *fixed, columns, seed, ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = _grad_bias(grad_out, ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, None, None, None, None


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

    @staticmethod
    def forward(ctx, x, weight, bias, scheme, out_dtype, seed, columns, down, up, scaling):
        out = ops.linear(x, *weight, bias, scheme, out_dtype)
        input = x.to(out.dtype)
        middle = (input @ down.to(out.dtype).t()).mul_(scaling)
        out.addmm_(middle, up.to(out.dtype).t())
        ctx.save_for_backward(*weight, seed, columns, input, middle, down, up)
        ctx.scheme, ctx.scaling, ctx.x_dtype = scheme, scaling, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        *weight, seed, columns, input, middle, down, up = ctx.saved_tensors
        needs_x, needs_bias, needs_down, needs_up = (ctx.needs_input_grad[i] for i in (0, 2, 7, 8))
        grad_x = grad_bias = grad_down = grad_up = None
        grad_middle = (grad_out @ up.to(grad_out.dtype)).mul_(ctx.scaling) if needs_x or needs_down else None
        if needs_x:
            fixed = (input.shape[1], ctx.scheme)
            grad_x = _frozen_grad_input(grad_out, QuantizedWeight(*weight), *fixed, columns, seed, ctx.x_dtype)
            grad_x.addmm_(grad_middle.to(grad_x.dtype), down.to(grad_x.dtype))
        if needs_bias:
            grad_bias = _grad_bias(grad_out, ctx.bias_dtype)
        if needs_down:
            grad_down = (grad_middle.t() @ input).to(down.dtype)
        if needs_up:
            grad_up = (grad_out.t() @ middle).to(up.dtype)
        return grad_x, None, grad_bias, None, None, None, None, grad_down, grad_up, None


# `Function.apply` asks for the signature at every call, and finding it out takes longer than a small product.
_FrozenLinear.forward.__signature__ = inspect.signature(_FrozenLinear.forward)


class _TrainedLinear(torch.autograd.Function):
    """`linear` with gradients to x, bias and weight: a float master weight, quantized here, or an `Int8Weight`.

    With x^ and w^ for what is multiplied, grad_x = grad_out @ w^ and grad_w = grad_out.T @ x^, the latter 0 where
    clamping changed an integer. Scales are chosen by the range of the weight or, if they are given, trained with it
    (learned step size, Esser et al. 2020, arXiv:1902.08153). Saved are, as far as their gradient is asked for: x as
    int8 (`a16` schemes: x itself) and the quantized weight. With a seed, `grad_out` is rounded to int8 for both
    products, except for the gradient of the weight under `a16`, whose x is a float.
    """

    @staticmethod
    def forward(ctx, x, weight, scales, bias, scheme, out_dtype, seed):
        needs_x, needs_weight, needs_scales, _ = ctx.needs_input_grad[:4]
        needs_weight = needs_weight or needs_scales
        if isinstance(weight, Int8Weight):
            quantized = QuantizedWeight(weight.qweight, weight.scales, None)
        elif scales is not None:
            quantized = QuantizedWeight(ops.quantize_weight_scaled(weight, scales, scheme.name), scales, None)
        else:
            quantized = QuantizedWeight(*ops.quantize_weight(weight, scheme.name))
        if scheme.symmetric:
            quantized = quantized._replace(zeros=None)
        saved_x = x_scales = None
        if needs_weight and scheme.int_activations:
            out, saved_x, x_scales = ops.linear_saving(x, *quantized, bias, scheme.name, out_dtype)
        else:
            out = ops.linear(x, *quantized, bias, scheme.name, out_dtype)
            saved_x = x if needs_weight else None
        kept = quantized if needs_x else (None, None, None)
        clips = scheme.weight_bits == 4 or scales is not None
        master, learned = (weight, scales) if needs_weight and clips else (None, None)
        ctx.save_for_backward(*kept, saved_x, x_scales, master, learned, seed)
        ctx.scheme, ctx.in_features, ctx.x_dtype, ctx.weight_dtype = scheme, x.shape[1], x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        *kept, saved_x, x_scales, master, learned, seed = ctx.saved_tensors
        needs_x, needs_weight, needs_scales, needs_bias = ctx.needs_input_grad[:4]
        name, in_features = ctx.scheme.name, ctx.in_features
        grad_x = grad_weight = grad_scales = grad_bias = None
        if needs_x and seed is None:
            grad_x = ops.linear_grad_input(grad_out, *kept, in_features, name, ctx.x_dtype)
        elif needs_x:
            columns = ops.column_scales(*kept, in_features, name) if ctx.scheme.group_size else None
            grad_x = int8_grad_input(grad_out, QuantizedWeight(*kept), in_features, name, columns, seed, ctx.x_dtype)
        if needs_weight or needs_scales:
            if x_scales is None:
                grad_weight = (grad_out.t().to(saved_x.dtype) @ saved_x).to(ctx.weight_dtype)
            elif seed is None:
                x = (saved_x, x_scales.unsqueeze(1), None)
                grad_weight = ops.linear_grad_input(grad_out.t(), *x, in_features, "w8a16", ctx.weight_dtype)
            else:
                grad_weight = int8_grad_weight(grad_out, saved_x, x_scales, seed, ctx.weight_dtype)
            if learned is not None:
                grad_weight, grad_scales = ops.scale_gradient(grad_weight, master, learned, name)
            elif master is not None:
                grad_weight = ops.mask_clipped(grad_weight, master, name)
            if not torch.compiler.is_compiling():
                heap.count_gradient(grad_weight)
        if needs_bias:
            grad_bias = _grad_bias(grad_out, ctx.bias_dtype)
        return grad_x, grad_weight, grad_scales, grad_bias, None, None, None


def _over_leading_dimensions(function, x: Tensor, out_features: int, *args) -> Tensor:
    if x.dim() == 2:
        return function(x, *args)
    return function(x.reshape(-1, x.shape[-1]), *args).reshape(*x.shape[:-1], out_features)


def quant_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None = None,
    grad: str = "float",
    columns: Tensor | None = None,
) -> Tensor:
    """`ops.linear` over any leading dimensions, with straight-through gradients to x and bias.

    Args:
        x: float [..., K].
        weight: the canonical storage of a weight [N, K].
        bias, scheme, out_dtype: as in `ops.linear`.
        grad: "int8" rounds the gradient of the output stochastically to int8 for the product with the weight.
        columns: `ops.column_scales` of the weight, for that and `-g` schemes.

    Returns:
        [..., N] of `out_dtype` or x.dtype.
    """
    out_features = weight.qweight.shape[0]
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return _over_leading_dimensions(ops.linear, x, out_features, *weight, bias, scheme, out_dtype)
    seed = draw_seed() if grad == "int8" and x.requires_grad else None
    args = (*weight, bias, scheme, out_dtype, seed, columns)
    return _over_leading_dimensions(_FrozenLinear.apply, x, out_features, *args)


def adapted_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: str,
    adapter: LowRank,
    out_dtype: torch.dtype | None = None,
    grad: str = "float",
    columns: Tensor | None = None,
) -> Tensor:
    """`quant_linear` plus a low-rank product, with gradients to both of its matrices too.

    Args:
        x, weight, bias, scheme, out_dtype, grad, columns: as in `quant_linear`.
        adapter: what is added, multiplied in the dtype of the output.

    Returns:
        [..., N] of `out_dtype` or x.dtype.
    """
    seed = draw_seed() if grad == "int8" and torch.is_grad_enabled() and x.requires_grad else None
    args = (weight, bias, scheme, out_dtype, seed, columns, *adapter)
    return _over_leading_dimensions(_AdaptedLinear.apply, x, weight.qweight.shape[0], *args)


def trained_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: QuantScheme,
    out_dtype: torch.dtype | None = None,
    grad: str = "float",
    scales: Tensor | None = None,
) -> Tensor:
    """`quant_linear` with a weight that is trained: it is quantized in each call, and gets a gradient.

    Args:
        x: float [..., K].
        weight: float [N, K], or an `Int8Weight`, which is multiplied as it is.
        bias, out_dtype: as in `ops.linear`.
        scheme: the format and the activations.
        grad: "int8" rounds the gradient of the output stochastically to int8 for both products.
        scales: float32 [N, groups] that a float weight is rounded to, and that are trained; None: those of its range.

    Returns:
        [..., N] of `out_dtype` or x.dtype.
    """
    trained = (x, weight) if scales is None else (x, weight, scales)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    seed = draw_seed() if grad == "int8" and wanted else None
    args = (weight, scales, bias, scheme, out_dtype, seed)
    return _over_leading_dimensions(_TrainedLinear.apply, x, len(weight), *args)
