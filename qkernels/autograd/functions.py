"""Shared by the autograd functions: how they are called, what they save, and their refusal of second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..kernels import ops


def differentiable(function: Any) -> Callable[..., Tensor]:
    """A callable that gives the first output of an autograd function, by the cheapest way that the caller allows.

    The class `function` has `tangent` where others have `jvp`: Dynamo does not trace a function that has a `jvp`, so
    only a subclass has it. `torch.autograd.Function.apply` binds its arguments to the signature of `forward` in Python
    at every call, for defaults and keywords, which these have not. That takes longer than a small product, so eager
    calls leave it out.
    """
    with_tangents: Any = type(function.__name__, (function,), {"jvp": staticmethod(function.tangent)})
    eager = super(torch.autograd.Function, function).apply

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            out = function.apply(*args)
        elif transformed():
            out = with_tangents.apply(*args)
        else:
            out = eager(*args)
        return out if isinstance(out, Tensor) else out[0]

    return call


def over_leading_dimensions(function: Callable[..., Tensor], x: Tensor, out_features: int, *args: Any) -> Tensor:
    """`function(x, *args)` [M, out_features] for x [M, K], with any leading dimensions of x in the place of M."""
    if x.dim() == 2:
        return function(x, *args)
    out = function(x.reshape(-1, x.shape[-1]), *args)
    # No view, whose writes in place FSDP2 could not follow: `out` is seen nowhere else.
    return torch.ops.aten._unsafe_view.default(out, [*x.shape[:-1], out_features])


def bias_gradient(grad_out: Tensor, dtype: torch.dtype) -> Tensor:
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
    def forward(sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[sources:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_SECOND)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(_SECOND)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate a `backward`: the gradients are computed without a graph, and differentiating them is an error.

    torch's decorator of this name leaves them without a connection to what they depend on, so that a second derivative
    with respect to that is 0 and not an error. Whatever they depend on must be among the saved tensors.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return outputs
        every = transformed()
        sources = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor) and (every or t.requires_grad)]
        if not sources:
            return outputs
        marked = iter(_NoSecondDerivative.apply(len(sources), *sources, *(t for t in outputs if t is not None)))
        return tuple(None if tensor is None else next(marked) for tensor in outputs)

    return wrapper


def anchors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The autograd graph of each tensor without its memory, as a tensor of no rows, for `once_differentiable`.

    Compiled code has no second derivatives anyway, and gets None.
    """
    if torch.compiler.is_compiling() or all(tensor is None for tensor in tensors):
        return (None,) * len(tensors)
    device = next(tensor.device for tensor in tensors if tensor is not None)
    none = torch.empty(0, dtype=torch.int64, device=device)
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(None if tensor is None else tensor.index_select(0, none) for tensor in tensors)


def transformed() -> bool:
    """True while torch.func or forward mode differentiates: tensors then do not tell what is asked for."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Tell which tensors need a gradient."""
    if transformed():
        return tuple(tensor is not None for tensor in tensors)
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # torch.jit.trace records operators only
        return (False,) * len(tensors)
    return tuple(tensor is not None and tensor.requires_grad for tensor in tensors)


def tangent_product(
    tangent: Tensor | None, weight: QuantizedWeight, scheme: str | QuantScheme, out_dtype: torch.dtype
) -> Tensor | None:
    """How the output changes with x, straight through the rounding of that."""
    if tangent is None:
        return None
    return ops.linear(tangent, *weight, None, QuantScheme.parse(scheme).of_floats, out_dtype)


def total_tangent(shape: torch.Size, dtype: torch.dtype, *parts: Tensor | None) -> Tensor | None:
    """The tangent of an output [M, N]: the sum of its parts, each [M, N] or [N]."""
    present = [part.to(dtype).expand(shape) for part in parts if part is not None]
    return functools.reduce(torch.add, present).contiguous() if present else None


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for `backward` and `jvp`: torch.func wants the same tensors for both."""
    ctx.save_for_backward(*tensors)
    if not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)
