"""Checks of the operators' arguments: an error names the argument, what was expected and what came.

A check has the name of its operator, takes its arguments as `arguments.bundle` makes them, and returns nothing. The
fake kernels, the GPU path and the reference call it; `csrc/torch/arguments.h` is its twin on the CPU. It allocates
nothing and reads no values, so it does not wait for a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, MAX_REDUCTION, QuantizedRows, StoredWeight, storage_dtypes
from .arguments import ConvGeometry, LossOptions


def check_weight(weight: StoredWeight, of_experts: bool = False) -> None:
    """Raise RuntimeError, naming the tensor, unless the tensors are the canonical storage of the scheme.

    Args:
        weight: one weight, or with `of_experts` one for each expert.
    """
    qweight, scales, zeros, in_features, scheme, _ = weight
    if in_features < 1:
        raise RuntimeError(f"in_features must be at least 1, got {in_features}")
    if qweight.dim() != (3 if of_experts else 2):
        expected = "of three dimensions (experts first)" if of_experts else "a matrix"
        raise RuntimeError(f"qweight must be {expected}, got shape {list(qweight.shape)}")
    rows, groups = qweight.shape[:-1], scheme.weight_groups(in_features)
    integer, columns = scheme.weight_format.dtype, scheme.packed_features(in_features)
    _check_stored("qweight", qweight, integer, (*rows, columns), in_features, scheme)
    _check_stored("scales", scales, torch.float32, (*rows, groups), in_features, scheme)
    _check_device("scales", scales, qweight.device)
    if scheme.symmetric:
        if zeros is not None:
            raise RuntimeError(f"zeros must be None for scheme {scheme}")
        return
    if zeros is None:
        raise RuntimeError(f"zeros is required for scheme {scheme}")
    _check_stored("zeros", zeros, storage_dtypes(scheme)["zeros"], (*rows, groups), in_features, scheme)
    _check_device("zeros", zeros, qweight.device)


def _check_stored(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], in_features: int, scheme: QuantScheme
) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise RuntimeError(
            f"{name} must be {dtype} of shape {list(shape)} for scheme {scheme} with {in_features} input features, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )


def check_strided(names: tuple[str, ...], args: tuple[Any, ...]) -> None:
    """Raise RuntimeError for a tensor whose elements do not lie in memory with strides: sparse, MKL-DNN or nested."""
    for name, value in zip(names, args, strict=False):
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
            found = "a nested tensor" if value.is_nested else f"layout {value.layout}"
            raise RuntimeError(f"{name} must be a dense tensor (layout torch.strided), got {found}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise RuntimeError(f"{name} must be on {device}, got {tensor.device}")


def _check_matrix(name: str, x: Tensor, columns: int | None = None) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise RuntimeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 2:
        raise RuntimeError(f"{name} must be a matrix, got shape {list(x.shape)}")
    if columns is None:
        if x.shape[1] < 1:
            raise RuntimeError(f"{name} must have at least one column, got shape {list(x.shape)}")
    elif x.shape[1] != columns:
        raise RuntimeError(f"{name} must have {columns} columns, got shape {list(x.shape)}")


def _check_shaped(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise RuntimeError(
            f"{name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    _check_device(name, tensor, device)


def _check_out_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise RuntimeError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


def _check_int_activations(scheme: QuantScheme) -> None:
    if not scheme.int_activations:
        raise RuntimeError(f"scheme must be an a8 scheme, got {scheme}")


def _check_x_scale(x_scale: Tensor | None, scheme: QuantScheme, device: torch.device) -> None:
    if scheme.static_activations != (x_scale is not None):
        wanted = "is required" if scheme.static_activations else "must be None"
        raise RuntimeError(f"x_scale {wanted} for scheme {scheme}")
    if x_scale is not None:
        _check_shaped("x_scale", x_scale, torch.float32, (1,), device)


def quantize_activation(x: Tensor, scheme: QuantScheme, x_scale: Tensor | None = None) -> None:
    _check_int_activations(scheme)
    _check_matrix("x", x)
    _check_x_scale(x_scale, scheme, x.device)


def dequantize_weight(weight: StoredWeight) -> None:
    check_weight(weight)


column_scales = dequantize_weight


def linear(x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> None:
    _check_product("x", x, weight, bias)
    _check_out_dtype(out_dtype)


def _check_product(name: str, x: Tensor, weight: StoredWeight, bias: Tensor | None, of_experts: bool = False) -> None:
    _check_matrix(name, x)
    check_weight(weight, of_experts)
    _check_device("qweight", weight.qweight, x.device)
    _check_x_scale(weight.x_scale, weight.scheme, x.device)
    if weight.scheme.int_activations and x.shape[1] > MAX_REDUCTION:
        raise RuntimeError(f"in_features must be at most {MAX_REDUCTION} for exact int32 sums, got {x.shape[1]}")
    _check_bias(bias, weight, x.device, of_experts)


def _check_bias(bias: Tensor | None, weight: StoredWeight, device: torch.device, of_experts: bool = False) -> None:
    if bias is None:
        return
    shape = weight.qweight.shape[:-1]
    if bias.shape != shape or bias.dtype not in FLOAT_DTYPES:
        expected = f"matrix of {list(shape)}" if of_experts else f"vector of {shape[0]}"
        raise RuntimeError(f"bias must be a float {expected}, got {bias.dtype} of shape {list(bias.shape)}")
    _check_device("bias", bias, device)


def conv(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    out_dtype: torch.dtype | None = None,
) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise RuntimeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4 or 0 in x.shape[1:3]:
        raise RuntimeError(f"x must be images [N, H, W, C] that are not empty, got shape {list(x.shape)}")
    _check_geometry(x, geometry)
    scheme, groups = weight.scheme, geometry.groups
    if scheme.int_activations and weight.in_features > MAX_REDUCTION:
        raise RuntimeError(
            f"in_features must be at most {MAX_REDUCTION} for exact int32 sums, got {weight.in_features}"
        )
    if scheme.act_group_size is not None:
        raise RuntimeError(f"scheme must have no activation groups for a convolution, got {scheme}")
    check_weight(weight)
    _check_device("qweight", weight.qweight, x.device)
    if weight.out_features % groups:
        shape = list(weight.qweight.shape)
        raise RuntimeError(f"qweight must have a multiple of groups = {groups} rows, got shape {shape}")
    _check_bias(bias, weight, x.device)
    _check_out_dtype(out_dtype)
    _check_x_scale(weight.x_scale, scheme, x.device)


def _check_geometry(x: Tensor, geometry: ConvGeometry) -> None:
    for name, value in geometry._asdict().items():
        least = 0 if name in ("left", "right", "top", "bottom") else 1
        if not least <= value < 2**31:
            raise RuntimeError(f"{name} must be in [{least}, 2147483647], got {value}")
    if x.shape[3] % geometry.groups:
        raise RuntimeError(f"x must have a multiple of groups = {geometry.groups} channels, got shape {list(x.shape)}")
    rows, columns = x.shape[1] + geometry.top + geometry.bottom, x.shape[2] + geometry.left + geometry.right
    if math.prod(max(size, 1) for size in (x.shape[0], rows, columns, x.shape[3])) > 2**60:
        raise RuntimeError(f"x must have at most 2^60 values with its padding, got shape {list(x.shape)}")
    if min(geometry.output_size(x.shape[1], x.shape[2])) < 1:
        raise RuntimeError(f"the dilated kernel must fit into the padded x, got shape {list(x.shape)}")


def linear_with_saved_input(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None
) -> None:
    linear(x, weight, bias, out_dtype)
    _check_int_activations(weight.scheme)


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
) -> None:
    _check_product("x", x, weight, bias, of_experts=True)
    _check_shaped("offsets", offsets, torch.int64, (weight.qweight.shape[0],), x.device)
    _check_out_dtype(out_dtype)
    if rows is not None and rows.dim() != 1:
        raise RuntimeError(f"rows must be a vector, got shape {list(rows.shape)}")
    _check_rows(rows, x, len(x) if rows is None else len(rows))


def _check_rows(rows: Tensor | None, x: Tensor, count: int) -> None:
    if rows is not None:
        _check_shaped("rows", rows, torch.int64, (count,), x.device)
    elif len(x) != count:
        raise RuntimeError(f"rows is required where x has {len(x)} rows for {count}")


def grouped_linear_grad_input(
    grad_out: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    seed: Tensor | None = None,
    column_scales: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    check_weight(weight, of_experts=True)
    _check_matrix("grad_out", grad_out, columns=weight.out_features)
    _check_out_dtype(out_dtype)
    _check_device("qweight", weight.qweight, grad_out.device)
    experts = weight.qweight.shape[0]
    _check_shaped("offsets", offsets, torch.int64, (experts,), grad_out.device)
    if seed is not None:
        _check_seed(seed, grad_out)
    if seed is None or weight.scheme.row_scaled:
        if column_scales is not None:
            without = "without a seed" if seed is None else f"for scheme {weight.scheme}"
            raise RuntimeError(f"column_scales must be None {without}")
    elif column_scales is None:
        raise RuntimeError(f"column_scales is required for scheme {weight.scheme} with a seed")
    else:
        _check_shaped("column_scales", column_scales, torch.float32, (experts, weight.in_features), grad_out.device)


def grouped_linear_grad_weight(
    grad_out: Tensor,
    offsets: Tensor,
    qx: Tensor,
    x_scales: Tensor,
    rows: Tensor | None = None,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    if qx.dtype != torch.int8 or qx.dim() != 2 or qx.shape[1] < 1:
        raise RuntimeError(
            f"qx must be a torch.int8 matrix with at least one column, got {qx.dtype} of shape {list(qx.shape)}"
        )
    _check_shaped("x_scales", x_scales, torch.float32, (len(qx),), qx.device)
    _check_outer(grad_out, offsets, qx, rows)
    if seed is not None:
        _check_seed(seed, grad_out)
    _check_out_dtype(out_dtype)


def _check_outer(grad_out: Tensor, offsets: Tensor, x: Tensor, rows: Tensor | None) -> None:
    _check_matrix("grad_out", grad_out, columns=grad_out.shape[1] if grad_out.dim() == 2 else 0)
    _check_device("grad_out", grad_out, x.device)
    if offsets.dim() != 1:
        raise RuntimeError(f"offsets must be a vector, got shape {list(offsets.shape)}")
    _check_shaped("offsets", offsets, torch.int64, tuple(offsets.shape), x.device)
    _check_rows(rows, x, len(grad_out))


def grouped_outer(grad_out: Tensor, offsets: Tensor, x: Tensor, rows: Tensor | None = None) -> None:
    _check_matrix("x", x)
    _check_outer(grad_out, offsets, x, rows)


def quantize_weight(weight: Tensor, scheme: QuantScheme) -> None:
    _check_matrix("weight", weight)


def mask_clipped(grad: Tensor, weight: Tensor, scheme: QuantScheme) -> None:
    if scheme.weight_bits != 4 or scheme.has_min:
        raise RuntimeError(f"scheme must be a w4 scheme without minima, got {scheme}")
    _check_matrix("weight", weight)
    _check_gradient(grad, weight)


def _check_gradient(grad: Tensor, weight: Tensor) -> None:
    _check_matrix("grad", grad, columns=weight.shape[1])
    if grad.shape[0] != weight.shape[0]:
        raise RuntimeError(f"grad must have {weight.shape[0]} rows, got shape {list(grad.shape)}")
    _check_device("weight", weight, grad.device)


def quantize_weight_scaled(weight: Tensor, scales: Tensor, scheme: QuantScheme) -> None:
    _check_matrix("weight", weight)
    if not scheme.symmetric:
        raise RuntimeError(f"scheme must be symmetric, got {scheme}")
    shape = (weight.shape[0], scheme.weight_groups(weight.shape[1]))
    _check_shaped("scales", scales, torch.float32, shape, weight.device)


def scale_gradient(grad: Tensor, weight: Tensor, scales: Tensor, scheme: QuantScheme) -> None:
    quantize_weight_scaled(weight, scales, scheme)
    _check_gradient(grad, weight)


def linear_grad_input(grad_out: Tensor, weight: StoredWeight, out_dtype: torch.dtype | None = None) -> None:
    check_weight(weight)
    _check_matrix("grad_out", grad_out, columns=weight.out_features)
    _check_out_dtype(out_dtype)
    _check_device("qweight", weight.qweight, grad_out.device)


def int_grad_input(
    grad: QuantizedRows, weight: StoredWeight, column_scales: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> None:
    check_weight(weight)
    (q_grad, grad_scales), qweight = grad, weight.qweight
    scheme, out_features = weight.scheme, weight.out_features
    if out_features > MAX_REDUCTION:
        raise RuntimeError(
            f"qweight must have at most {MAX_REDUCTION} rows for exact int32 sums, got shape {list(qweight.shape)}"
        )
    if q_grad.dtype != torch.int8 or q_grad.dim() != 2 or q_grad.shape[1] != out_features:
        raise RuntimeError(
            f"q_grad must be torch.int8 with {out_features} columns, got {q_grad.dtype} of shape {list(q_grad.shape)}"
        )
    _check_device("qweight", qweight, q_grad.device)
    _check_shaped("grad_scales", grad_scales, torch.float32, (q_grad.shape[0],), q_grad.device)
    if scheme.row_scaled:
        if column_scales is not None:
            raise RuntimeError(f"column_scales must be None for scheme {scheme}")
    elif column_scales is None:
        raise RuntimeError(f"column_scales is required for scheme {scheme}")
    else:
        _check_shaped("column_scales", column_scales, torch.float32, (weight.in_features,), q_grad.device)
    _check_out_dtype(out_dtype)


def linear_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    dither: Tensor | None = None,
    **options: Any,
) -> None:
    softcap, z_loss, label_smoothing, _ = LossOptions(**options)
    _check_product("hidden", hidden, weight, bias)
    _check_shaped("target", target, torch.int64, (hidden.shape[0],), hidden.device)
    if dither is not None:
        _check_shaped("dither", dither, torch.int64, (hidden.shape[0],), hidden.device)
    if softcap != 0 and label_smoothing != 0:
        raise RuntimeError(f"softcap must be 0 with label_smoothing, got {softcap} and {label_smoothing}")
    if softcap != 0 and not softcap >= 2.0**-126:
        raise RuntimeError(f"softcap must be 0 or at least 2^-126, got {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not math.isfinite(z_loss):
        raise RuntimeError(f"z_loss must be finite, got {z_loss}")


def quantize_rows_stochastic(x: Tensor, column_factors: Tensor | None, seed: Tensor, rng_stream: int) -> None:
    _check_random(x, "column_factors", column_factors, 1, seed, rng_stream)


def quantize_columns_stochastic(x: Tensor, row_factors: Tensor | None, seed: Tensor, rng_stream: int) -> None:
    _check_random(x, "row_factors", row_factors, 0, seed, rng_stream)


def _check_random(x: Tensor, name: str, factors: Tensor | None, dim: int, seed: Tensor, rng_stream: int) -> None:
    _check_matrix("x", x)
    if factors is not None:
        _check_shaped(name, factors, torch.float32, (x.shape[dim],), x.device)
    _check_seed(seed, x)
    if not 0 <= rng_stream < 2**32:
        raise RuntimeError(f"rng_stream must be between 0 and 2^32 - 1, got {rng_stream}")


def _check_seed(seed: Tensor, x: Tensor) -> None:
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise RuntimeError(f"seed must be torch.int64 of shape [], got {seed.dtype} of shape {list(seed.shape)}")
    if seed.device.type != "cpu" and not (seed.is_meta and x.is_meta):  # every backend reads it on the host
        raise RuntimeError(f"seed must be on cpu, got {seed.device}")
