"""The results of the operators without values, for fake tensors.

A function has the name of its operator, and takes its arguments as `arguments.bundle` makes them, checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedRows, StoredWeight, storage_dtypes
from .arguments import ConvGeometry


def quantize_activation(x: Tensor, scheme: QuantScheme, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((x.shape[0], scheme.act_groups(x.shape[1])), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales


def dequantize_weight(weight: StoredWeight) -> Tensor:
    return weight.scales.new_empty((weight.out_features, weight.in_features), dtype=torch.float32)


def linear(x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.out_features), dtype=out_dtype or x.dtype)


def conv(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    size = geometry.output_size(x.shape[1], x.shape[2])
    return x.new_empty((x.shape[0], *size, weight.out_features), dtype=out_dtype or x.dtype)


def linear_with_saved_input(x: Tensor, *weight_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = linear(x, *weight_and_options)
    return out, x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    return x.new_empty(((x if rows is None else rows).shape[0], weight.out_features), dtype=out_dtype or x.dtype)


def grouped_linear_grad_input(
    grad_out: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    seed: Tensor | None = None,
    column_scales: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return linear_grad_input(grad_out, weight, out_dtype)


def grouped_linear_grad_weight(
    grad_out: Tensor, offsets: Tensor, qx: Tensor, *args: Any, out_dtype: torch.dtype | None = None
) -> Tensor:
    shape = (offsets.shape[0], grad_out.shape[1], qx.shape[1])
    return grad_out.new_empty(shape, dtype=out_dtype or grad_out.dtype)


def grouped_outer(grad_out: Tensor, offsets: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
    return x.new_empty((offsets.shape[0], grad_out.shape[1], x.shape[1]))


def quantize_weight(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    shapes = scheme.storage_shapes(weight.shape[1], weight.shape[0])
    qweight = weight.new_empty(shapes["qweight"], dtype=scheme.weight_format.dtype)
    zeros = weight.new_empty(shapes.get("zeros", (weight.shape[0], 0)), dtype=storage_dtypes(scheme)["zeros"])
    return qweight, weight.new_empty(shapes["scales"], dtype=torch.float32), zeros


def mask_clipped(grad: Tensor, weight: Tensor, scheme: QuantScheme) -> Tensor:
    return grad.new_empty(grad.shape)


def quantize_weight_scaled(weight: Tensor, scales: Tensor, scheme: QuantScheme) -> Tensor:
    shape = (weight.shape[0], scheme.packed_features(weight.shape[1]))
    return weight.new_empty(shape, dtype=scheme.weight_format.dtype)


def scale_gradient(grad: Tensor, weight: Tensor, scales: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), scales.new_empty(scales.shape)


def linear_grad_input(grad_out: Tensor, weight: StoredWeight, out_dtype: torch.dtype | None = None) -> Tensor:
    return grad_out.new_empty((grad_out.shape[0], weight.in_features), dtype=out_dtype or grad_out.dtype)


def column_scales(weight: StoredWeight) -> Tensor:
    return weight.scales.new_empty((weight.in_features,), dtype=torch.float32)


def int_grad_input(
    grad: QuantizedRows, weight: StoredWeight, column_scales: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    return grad.scales.new_empty((len(grad.scales), weight.in_features), dtype=out_dtype or torch.float32)


def linear_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    dither: Tensor | None = None,
    **options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = hidden.shape
    grad = hidden.new_empty((0 if dither is None else rows, columns), dtype=torch.float32)
    return hidden.new_empty((rows,), dtype=torch.float32), hidden.new_empty((rows,), dtype=torch.float32), grad


def quantize_rows_stochastic(
    x: Tensor, column_factors: Tensor | None, seed: Tensor, rng_stream: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def quantize_columns_stochastic(
    x: Tensor, row_factors: Tensor | None, seed: Tensor, rng_stream: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[1], x.shape[0]), dtype=torch.int8), x.new_empty(x.shape[1], dtype=torch.float32)
