"""The operators on GPU tensors: plan, then run. `dispatch.run` calls this with bundled arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from . import expert_plans, loss_plans, matmul_plans, training_plans
from .late_errors import late_errors
from .launch import run_all
from .target import Target
from .tuning import target_of

PLANS: dict[str, Callable[..., matmul_plans.Plan]] = {
    "column_scales": matmul_plans.column_scales,
    "dequantize_weight": matmul_plans.dequantize_weight,
    "grouped_linear": expert_plans.grouped_linear,
    "grouped_linear_grad_input": expert_plans.grouped_linear_grad_input,
    "int_grad_input": matmul_plans.int_grad_input,
    "linear": matmul_plans.linear,
    "linear_cross_entropy": loss_plans.linear_cross_entropy,
    "linear_grad_input": matmul_plans.linear_grad_input,
    "linear_with_saved_input": training_plans.linear_with_saved_input,
    "mask_clipped": training_plans.mask_clipped,
    "quantize_activation": matmul_plans.quantize_activation,
    "quantize_columns_stochastic": training_plans.quantize_columns_stochastic,
    "quantize_rows_stochastic": training_plans.quantize_rows_stochastic,
    "quantize_weight": training_plans.quantize_weight,
    "quantize_weight_scaled": training_plans.quantize_weight_scaled,
    "scale_gradient": training_plans.scale_gradient,
}
# On the CPU, under Triton's interpreter, tiles are those for this target.
INTERPRETED = Target("cuda", 80, 108, 163 * 1024)


def plan(name: str, args: tuple[Any, ...], target: Target, **keywords: Any) -> matmul_plans.Plan:
    """The launches of the operator `name` on `target` for the arguments of its schema; see `arguments.bundle`."""
    return PLANS[name](*arguments.bundle(name, args), **keywords, device=target)


def run(name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
    """Compute the operator `name`.

    Raises:
        RuntimeError: if a weight to quantize, or a scale given for it, holds NaN or Inf, or the range of a group
            overflows. Nothing waits for a GPU to find out, so this call or a later one raises.
    """
    device = args[0].device
    late_errors.tell()
    configured = INTERPRETED if device.type == "cpu" else target_of(device)
    results, launches = PLANS[name](*args, **keywords, device=configured)
    run_all(launches, device)
    if name == "quantize_weight":
        message = "weight must be finite, and so must be the range of each group, got NaN or Inf"
        _refuse(results[1].isnan().any(), message)
    elif name == "quantize_weight_scaled":
        broken = ~(args[0].isfinite().all() & args[1].isfinite().all())
        _refuse(broken, "weight and scales must be finite, got NaN or Inf")
    return results[0] if len(results) == 1 else results


def _refuse(broken: Tensor, message: str) -> None:
    """Raise RuntimeError if the bool of shape [] is true: now if it is on the CPU, else once its device tells."""
    if broken.is_cuda:
        with torch.cuda.device(broken.device):
            late_errors.watch(broken, message)
    elif broken:
        raise RuntimeError(message)
