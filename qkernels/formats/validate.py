"""The one check of a quantized weight's tensors, at every door through which they come in.

`QuantLinear.set_weight`, `QuantEmbedding.set_weight`, `load_state_dict` (strict, loose and with `assign=True`) and
`from_pretrained` call it. What the kernels produce needs no check.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .scheme import QuantScheme
from .storage import storage_dtypes

STORAGE = ("qweight", "scales", "zeros")


def storage_problems(
    weight: Mapping[str, object],
    in_features: int,
    out_features: int,
    scheme: QuantScheme,
    *,
    leading: tuple[int, ...] = (),
    values: bool = True,
) -> dict[str, str]:
    """Why `weight` is not the canonical storage of a weight [*leading, out_features, in_features].

    Args:
        weight: the tensors by their names; None, or no entry, for one that is not there.
        leading: (E,) for the weights of E experts.
        values: look at the values too: scales and minima must be finite, and zero points at most 15.

    Returns:
        By the name of a tensor that does not fit: what it must be, and what came. Empty if all of them fit.
    """
    shapes, dtypes = scheme.storage_shapes(in_features, out_features), storage_dtypes(scheme)
    problems = {}
    for name in STORAGE:
        tensor = weight.get(name)
        shape = (*leading, *shapes[name]) if name in shapes else None
        problem = tensor_problem(tensor, shape, dtypes[name], scheme)
        if problem is None and isinstance(tensor, Tensor) and values:
            problem = value_problem(name, tensor)
        if problem is not None:
            problems[name] = problem
    return problems


def tensor_problem(
    tensor: object, shape: tuple[int, ...] | None, dtype: torch.dtype, scheme: QuantScheme
) -> str | None:
    """Why `tensor` has not this shape (None: `scheme` has no such tensor) and dtype."""
    if shape is None:
        return None if tensor is None else f"is given, but {scheme} has no zero points and no minima"
    if tensor is None:
        return f"is missing for {scheme}"
    expected = f"must be {dtype} of shape {list(shape)} for {scheme}"
    if not isinstance(tensor, Tensor):
        return f"{expected}, got {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"{expected}, got a tensor of layout {tensor.layout}"
    if tensor.dtype != dtype or tensor.shape != shape:
        return f"{expected}, got {tensor.dtype} of shape {list(tensor.shape)}"
    return None


def x_scale_problem(x_scale: object, scheme: QuantScheme, *, values: bool = True) -> str | None:
    """Why `x_scale` is not the scale of static activations under `scheme`; None: it is, or neither exists."""
    if not scheme.static_activations:
        return None if x_scale is None else f"is given, but {scheme} has no static activations"
    problem = tensor_problem(x_scale, (1,), torch.float32, scheme)
    if problem is None and isinstance(x_scale, Tensor) and values:
        problem = value_problem("x_scale", x_scale)
    return problem


def input_order_problem(input_order: object, in_features: int) -> str | None:
    """Why `input_order` is no permutation of the features; None: it is, or there is none."""
    if input_order is None:
        return None
    if not isinstance(input_order, Tensor):
        return f"must be a tensor, got {type(input_order).__name__}"
    if input_order.dtype != torch.int32 or input_order.shape != (in_features,):
        return f"must be torch.int32 of shape [{in_features}], got {input_order.dtype} of {list(input_order.shape)}"
    features = torch.arange(in_features, dtype=torch.int32, device=input_order.device)
    if not input_order.is_meta and not torch.equal(input_order.sort().values, features):
        return f"must be a permutation of {in_features} features"
    return None


def value_problem(name: str, tensor: Tensor) -> str | None:
    """Why the values of a stored tensor are none; a tensor on the meta device has no values."""
    if tensor.is_meta or tensor.numel() == 0:
        return None
    local = tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor
    if local.numel() == 0:
        return None
    if name in ("scales", "zeros") and local.is_floating_point() and not bool(local.isfinite().all()):
        return "must be finite, got NaN or Inf"
    if name == "x_scale" and not bool((local.isfinite() & (local.abs() >= 2.0**-96)).all()):
        return f"must be finite and at least 2^-96, got {local.tolist()}"
    if name == "zeros" and local.dtype == torch.uint8 and (most := local.max().item()) > 15:
        return f"must be at most 15, got {most}"
    return None
