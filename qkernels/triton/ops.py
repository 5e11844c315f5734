"""The operators on GPU tensors: plan, then run. Signatures are those of the schemas; `dispatch.run` calls these."""

from __future__ import annotations

import torch
from torch import Tensor

from . import plans
from .launch import Target, run_all

# On the CPU, under Triton's interpreter, tiles are those for this target.
INTERPRETED = Target("cuda", 80, 108, 163 * 1024)


def target_of(x: Tensor) -> Target:
    """What kernels on this tensor's device are configured for."""
    return INTERPRETED if x.device.type == "cpu" else Target.of(x.device)


def _run(x: Tensor, plan: plans.Plan) -> Tensor:
    out, launches = plan
    run_all(launches, x.device)
    return out


def quantize_activation(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    q, scales, launches = plans.quantize_activation(x, scheme)
    run_all(launches, x.device)
    return q, scales


def dequantize_weight(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str) -> Tensor:
    return _run(qweight, plans.dequantize_weight(qweight, scales, zeros, in_features, scheme))


def column_scales(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str) -> Tensor:
    return _run(qweight, plans.column_scales(qweight, scales, zeros, in_features, scheme))


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return _run(x, plans.linear(x, qweight, scales, zeros, bias, scheme, out_dtype, target_of(x)))


def linear_grad_input(
    grad_out: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    target = target_of(grad_out)
    return _run(
        grad_out,
        plans.linear_grad_input(grad_out, qweight, scales, zeros, in_features, scheme, out_dtype, target),
    )


def int_grad_input(
    q_grad: Tensor,
    grad_scales: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: str,
    column_scales: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    weight, target = (qweight, scales, zeros), target_of(q_grad)
    return _run(
        q_grad,
        plans.int_grad_input(q_grad, grad_scales, weight, in_features, scheme, column_scales, out_dtype, target),
    )


def int_grad_weight(q_grad: Tensor, grad_scales: Tensor, qx: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Weight gradient [N, K] from quantized gradient and activations; see `plans.int_grad_weight`."""
    return _run(q_grad, plans.int_grad_weight(q_grad, grad_scales, qx, out_dtype, target_of(q_grad)))
