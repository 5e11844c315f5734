"""Straight-through gradients of the quantized linear: which tensors are saved and which gradients exist."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.philox import GRAD_INPUT, GRAD_WEIGHT, draw_seed
from ..formats.rules import QuantizedWeight, weight_integers
from ..formats.scheme import QuantScheme
from ..kernels import ops
from .int8_weight import Int8Weight

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
    # Looking at the ones saves a pass over the weight, but a GPU would have to be waited for.
    if factors.device.type == "cpu" and not torch.compiler.is_compiling() and not ones.any():
        return factors
    zero = ~weight_integers(weight.qweight, weight.zeros, in_features, scheme).any(dim=1)
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
    q_grad, grad_scales = ops.quantize_rows_stochastic(grad_out, folded, seed, GRAD_INPUT)
    return _product(q_grad, grad_scales, weight, in_features, scheme, columns, out_dtype)


def int8_grad_weight(grad_out: Tensor, qx: Tensor, x_scales: Tensor, seed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Gradient of `ops.linear` with respect to the weight as an integer product, the scales of x folded in likewise.

    Args:
        grad_out: float [M, N].
        qx, x_scales: int8 [M, K] and float32 [M], as `ops.linear_with_saved_input` returns them.
        seed: int64 of shape [].
        out_dtype: of the result [N, K].
    """
    q_grad, grad_scales = ops.quantize_columns_stochastic(grad_out, x_scales, seed, GRAD_WEIGHT)
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


_SECOND = (
    "trying to differentiate twice: second derivatives of a quantized layer are not defined, for its gradients pass "
    "straight through the rounding, and what they are made of has no gradient of its own. Use the float model for them"
)


class _NoSecondDerivative(torch.autograd.Function):
    """Hands on the gradients `tensors[sources:]`, and raises where they are to be differentiated once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(sources, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[sources:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(_SECOND)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_SECOND)


def _once_differentiable(backward):
    """For `backward`: the gradients are computed without a graph, and differentiating them is an error.

    torch's decorator of this name leaves them without a connection to what they depend on, so that a second derivative
    with respect to that is 0 and not an error. Whatever they depend on must be among the saved tensors.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return outputs
        every = _transformed()
        sources = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and (every or t.requires_grad)]
        if not sources:
            return outputs
        marked = iter(_NoSecondDerivative.apply(len(sources), *sources, *(t for t in outputs if t is not None)))
        return tuple(None if tensor is None else next(marked) for tensor in outputs)

    return wrapper


def _anchors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of each tensor its autograd graph without its memory, a tensor of no rows, for `_once_differentiable`.

    Compiled code has no second derivatives anyway, and gets None.
    """
    if torch.compiler.is_compiling() or all(tensor is None for tensor in tensors):
        return (None,) * len(tensors)
    device = next(tensor.device for tensor in tensors if tensor is not None)
    none = torch.empty(0, dtype=torch.int64, device=device)
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(None if tensor is None else tensor.index_select(0, none) for tensor in tensors)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: tensors then do not tell what is asked for."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _needs(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which tensors need a gradient."""
    if _transformed():
        return tuple(tensor is not None for tensor in tensors)
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # torch.jit.trace records operators only
        return (False,) * len(tensors)
    return tuple(tensor is not None and tensor.requires_grad for tensor in tensors)


def _tangent_product(
    tangent: Tensor | None, weight: QuantizedWeight, scheme: str | QuantScheme, out_dtype: torch.dtype
) -> Tensor | None:
    """How the output changes with x, straight through the rounding of that."""
    if tangent is None:
        return None
    of_floats = dataclasses.replace(QuantScheme.parse(scheme), act_bits=16, act_group_size=None)
    return ops.linear(tangent, *weight, None, of_floats.name, out_dtype)


def _total(shape: torch.Size, dtype: torch.dtype, *parts: Tensor | None) -> Tensor | None:
    """The tangent of an output [M, N]: the sum of its parts, each [M, N] or [N]."""
    present = [part.to(dtype).expand(shape) for part in parts if part is not None]
    return functools.reduce(torch.add, present).contiguous() if present else None


def _save(ctx, *tensors: Tensor | None) -> None:
    """For `backward` and `jvp`: torch.func wants the same tensors for both."""
    ctx.save_for_backward(*tensors)
    if not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


class _FrozenLinear(torch.autograd.Function):
    """`linear` with gradients to x and bias; the quantized weight is a constant.

    The rounding of the activations counts as the identity (straight-through estimator, Bengio et al. 2013,
    arXiv:1308.3432), so grad_x = grad_out @ dequantize(weight). No activation is saved: the gradient needs the weight
    only, which is resident anyway. With a seed, `grad_out` is rounded to int8 for that product. Double backward is
    refused by `_once_differentiable`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, qweight, scales, zeros, bias, scheme, out_dtype, seed, columns):
        return ops.linear(x, qweight, scales, zeros, bias, scheme, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, qweight, scales, zeros, bias, ctx.scheme, _, seed, columns = inputs
        _save(ctx, qweight, scales, zeros, seed, columns)
        ctx.in_features, ctx.x_dtype, ctx.out_dtype, ctx.shape = x.shape[1], x.dtype, output.dtype, output.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad_out):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            *weight, seed, columns = ctx.saved_tensors
            fixed = (ctx.in_features, ctx.scheme)
            grad_x = _frozen_grad_input(grad_out, QuantizedWeight(*weight), *fixed, columns, seed, ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = _grad_bias(grad_out, ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, None, None, None, None

    @staticmethod
    def tangent(ctx, x, qweight, scales, zeros, bias, *_):
        weight = QuantizedWeight(*ctx.saved_tensors[:3])
        out = _tangent_product(x, weight, ctx.scheme, ctx.out_dtype)
        return _total(ctx.shape, ctx.out_dtype, out, bias)


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
    def forward(x, qweight, scales, zeros, bias, scheme, out_dtype, seed, columns, down, up, scaling, anchor):
        out = ops.linear(x, qweight, scales, zeros, bias, scheme, out_dtype)
        input = x.to(out.dtype)
        middle = (input @ down.to(out.dtype).t()).mul_(scaling)
        out.addmm_(middle, up.to(out.dtype).t())
        return out, middle, None if input is x else input

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *weight, bias, ctx.scheme, _, seed, columns, down, up, ctx.scaling, anchor = inputs
        out, middle, cast = output
        ctx.mark_non_differentiable(middle, *([] if cast is None else [cast]))
        input = x if cast is None else cast
        _save(ctx, *weight, seed, columns, input, middle, down, up, anchor)
        ctx.x_dtype, ctx.out_dtype, ctx.shape = x.dtype, out.dtype, out.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad_out, *_):
        *weight, seed, columns, input, middle, down, up, _ = ctx.saved_tensors
        needs_x, needs_bias, needs_down, needs_up = (ctx.needs_input_grad[i] for i in (0, 4, 9, 10))
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
        return grad_x, None, None, None, grad_bias, None, None, None, None, grad_down, grad_up, None, None

    @staticmethod
    def tangent(ctx, x, qweight, scales, zeros, bias, scheme, out_dtype, seed, columns, down_tangent, up_tangent, *_):
        *weight, _, _, input, middle, down, up = ctx.saved_tensors[:9]
        dtype = ctx.out_dtype
        parts = [_tangent_product(x, QuantizedWeight(*weight), ctx.scheme, dtype), bias]
        for left, right in ((x, down), (input, down_tangent)):
            if left is not None and right is not None:
                parts.append((left.to(dtype) @ right.to(dtype).t()) @ up.to(dtype).t() * ctx.scaling)
        if up_tangent is not None:
            parts.append(middle @ up_tangent.to(dtype).t())
        return _total(ctx.shape, dtype, *parts), None, None


class _TrainedLinear(torch.autograd.Function):
    """`linear` with gradients to x, bias and weight: a float master weight, quantized here, or an `Int8Weight`.

    With x^ and w^ for what is multiplied, grad_x = grad_out @ w^ and grad_w = grad_out.T @ x^, the latter 0 where
    clamping changed an integer. Scales are chosen by the range of the weight or, if they are given, trained with it
    (learned step size, Esser et al. 2020, arXiv:1902.08153). Saved are, as far as their gradient is asked for: x as
    int8 (`a16` schemes: x itself) and the quantized weight. With a seed, `grad_out` is rounded to int8 for both
    products, except for the gradient of the weight under `a16`, whose x is a float.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, scales, bias, scheme, out_dtype, seed, needs_x, needs_weight, *anchors):
        quantized = _quantized(weight, scales, scheme)
        kept = quantized if needs_x else QuantizedWeight(None, None, None)
        if scales is not None:
            kept = kept._replace(scales=None)  # an input
        if needs_weight and scheme.int_activations:
            return *ops.linear_with_saved_input(x, *quantized, bias, scheme.name, out_dtype), *kept
        return ops.linear(x, *quantized, bias, scheme.name, out_dtype), None, None, *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, scales, bias, ctx.scheme, _, seed, _, needs_weight, *anchors = inputs
        out, saved_x, x_scales, *kept = output
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        if needs_weight and saved_x is None:
            saved_x = x
        if kept[0] is not None and scales is not None:
            kept[1] = scales
        clips = ctx.scheme.weight_bits == 4 or scales is not None
        master, learned = (weight, scales) if needs_weight and clips else (None, None)
        _save(ctx, *kept, saved_x, x_scales, master, learned, seed, *anchors)
        ctx.in_features, ctx.x_dtype, ctx.weight_dtype = x.shape[1], x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.out_dtype, ctx.shape = out.dtype, out.shape

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad_out, *_):
        *kept, saved_x, x_scales, master, learned, seed, _, _ = ctx.saved_tensors
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
        if needs_bias:
            grad_bias = _grad_bias(grad_out, ctx.bias_dtype)
        return grad_x, grad_weight, grad_scales, grad_bias, None, None, None, None, None, None, None

    @staticmethod
    def tangent(ctx, x, weight, scales, bias, *_):
        *kept, saved_x, x_scales, master, learned = ctx.saved_tensors[:7]
        if scales is not None:
            raise NotImplementedError("forward-mode derivatives with respect to learned scales are not implemented")
        parts = [_tangent_product(x, QuantizedWeight(*kept), ctx.scheme, ctx.out_dtype), bias]
        if weight is not None:
            if learned is not None:
                weight, _ = ops.scale_gradient(weight, master, learned, ctx.scheme.name)
            elif master is not None:
                weight = ops.mask_clipped(weight, master, ctx.scheme.name)
            inputs = saved_x if x_scales is None else saved_x * x_scales.unsqueeze(1)
            parts.append(inputs.to(torch.float32) @ weight.to(torch.float32).t())
        return _total(ctx.shape, ctx.out_dtype, *parts), None, None, None, None, None


def _quantized(weight: Tensor, scales: Tensor | None, scheme: QuantScheme) -> QuantizedWeight:
    """What a trained weight is multiplied as."""
    if isinstance(weight, Int8Weight):
        return QuantizedWeight(weight.qweight, weight.scales, None)
    if scales is not None:
        return QuantizedWeight(ops.quantize_weight_scaled(weight, scales, scheme.name), scales, None)
    qweight, own_scales, zeros = ops.quantize_weight(weight, scheme.name)
    return QuantizedWeight(qweight, own_scales, None if scheme.symmetric else zeros)


# Dynamo does not trace a function that has a `jvp`, so it is a subclass that has it.
_WITH_TANGENTS = {
    function: type(function.__name__, (function,), {"jvp": staticmethod(function.tangent)})
    for function in (_FrozenLinear, _AdaptedLinear, _TrainedLinear)
}


# `torch.autograd.Function.apply` binds the arguments to the signature of `forward` in Python at every call, for its
# defaults and keywords, which these have not. That takes longer than a small product, so eager calls leave it out.
_EAGER = {function: super(torch.autograd.Function, function).apply for function in _WITH_TANGENTS}


def _call(function: type[torch.autograd.Function], *args) -> Tensor:
    """The first output of an autograd function."""
    if torch.compiler.is_compiling():
        out = function.apply(*args)
    elif _transformed():
        out = _WITH_TANGENTS[function].apply(*args)
    else:
        out = _EAGER[function](*args)
    return out if isinstance(out, Tensor) else out[0]


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
    needs_x, needs_bias = _needs(x, bias)
    if not (needs_x or needs_bias):
        return _over_leading_dimensions(ops.linear, x, out_features, *weight, bias, scheme, out_dtype)
    seed = draw_seed() if grad == "int8" and needs_x else None
    args = (*weight, bias, scheme, out_dtype, seed, columns)
    return _over_leading_dimensions(functools.partial(_call, _FrozenLinear), x, out_features, *args)


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
    needs = _needs(x, bias, adapter.down, adapter.up)
    if not any(needs):
        return _over_leading_dimensions(
            _adapted_without_gradient, x, weight.qweight.shape[0], weight, bias, scheme, out_dtype, adapter
        )
    seed = draw_seed() if grad == "int8" and needs[0] else None
    output_dtype = out_dtype or x.dtype
    anchors = _anchors(x if needs[0] and x.dtype != output_dtype else None)
    args = (*weight, bias, scheme, out_dtype, seed, columns, *adapter, *anchors)
    return _over_leading_dimensions(functools.partial(_call, _AdaptedLinear), x, weight.qweight.shape[0], *args)


def _adapted_without_gradient(x, weight, bias, scheme, out_dtype, adapter):
    args = (x, *weight, bias, scheme, out_dtype, None, None, *adapter, None)
    return _AdaptedLinear.forward(*args)[0]


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
    needs_x, needs_weight, needs_scales, needs_bias = _needs(x, weight, scales, bias)
    if torch.jit.is_tracing() and isinstance(weight, Int8Weight):
        raise RuntimeError(
            "torch.jit.trace cannot hold a layer of mode 'int8'; qkernels.freeze_(model) makes it frozen, with the "
            "same outputs, and that can be traced"
        )
    if not (needs_x or needs_weight or needs_scales or needs_bias):
        return _over_leading_dimensions(
            _trained_without_gradient, x, len(weight), weight, scales, bias, scheme, out_dtype
        )
    needs_weight = needs_weight or needs_scales
    seed = draw_seed() if grad == "int8" and (needs_x or needs_weight) else None
    anchors = _anchors(x if needs_x else None, weight if needs_weight else None)
    args = (weight, scales, bias, scheme, out_dtype, seed, needs_x, needs_weight, *anchors)
    return _over_leading_dimensions(functools.partial(_call, _TrainedLinear), x, len(weight), *args)


def _trained_without_gradient(x, weight, scales, bias, scheme, out_dtype):
    return ops.linear(x, *_quantized(weight, scales, scheme), bias, scheme.name, out_dtype)
