"""Straight-through gradients of the quantized linear: which tensors are saved and which gradients exist."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


class _FrozenLinear(torch.autograd.Function):
    """`linear` with gradients to x and bias; the quantized weight is a constant.

    The rounding of the activations counts as the identity (straight-through estimator, Bengio et al. 2013,
    arXiv:1308.3432), so grad_x = grad_out @ dequantize(weight). No activation is saved: the gradient needs the weight
    only, which is resident anyway. Double backward is refused by `once_differentiable`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, qweight, scales, zeros, bias, scheme, out_dtype):
        return ops.linear(x, qweight, scales, zeros, bias, scheme, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, qweight, scales, zeros, bias, ctx.scheme, _ = inputs
        ctx.save_for_backward(qweight, scales, zeros)
        ctx.in_features, ctx.x_dtype = x.shape[1], x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            qweight, scales, zeros = ctx.saved_tensors
            grad_x = ops.linear_grad_input(grad_out, qweight, scales, zeros, ctx.in_features, ctx.scheme, ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = grad_out.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, None, None


# `Function.apply` asks for the signature at every call, and finding it out takes longer than a small product.
_FrozenLinear.forward.__signature__ = inspect.signature(_FrozenLinear.forward)


def quant_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ops.linear` over any leading dimensions, with straight-through gradients to x and bias.

    Args:
        x: float [..., K]; the other arguments as in `ops.linear`.

    Returns:
        [..., N] of `out_dtype` or x.dtype.
    """
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    function = _FrozenLinear.apply if needs_grad else ops.linear
    if x.dim() == 2:
        return function(x, qweight, scales, zeros, bias, scheme, out_dtype)
    out = function(x.reshape(-1, x.shape[-1]), qweight, scales, zeros, bias, scheme, out_dtype)
    return out.reshape(*x.shape[:-1], qweight.shape[0])
