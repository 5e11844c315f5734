"""Gradients as integer products: `grad_out` is rounded to int8 stochastically and multiplied with the integers."""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.philox import GRAD_INPUT, GRAD_WEIGHT
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, weight_integers
from ..kernels import ops

# Terms that a gradient sums in integers; the sums of longer ones are added in float32.
_BLOCK = 65536


class LinearWeight(NamedTuple):
    """A quantized weight [N, K] and the facts that a product with it needs.

    Attributes:
        stored: its canonical storage.
        in_features: K.
        scheme: the name of its scheme.
        column_scales: `ops.column_scales` of it under `-g` schemes, for an integer gradient; else None.
    """

    stored: QuantizedWeight
    in_features: int
    scheme: str
    column_scales: Tensor | None = None


def input_gradient(grad_out: Tensor, weight: LinearWeight, seed: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Gradient of `ops.linear` with respect to x: an integer product, or without a seed one of floats.

    Args:
        grad_out: float [M, N].
        weight: [N, K].
        seed: int64 of shape [], or None.
        out_dtype: of the result [M, K].
    """
    if seed is None:
        return ops.linear_grad_input(grad_out, *weight.stored, weight.in_features, weight.scheme, out_dtype)
    return int8_input_gradient(grad_out, weight, seed, out_dtype)


def weight_gradient(
    grad_out: Tensor, saved_x: Tensor, x_scales: Tensor | None, seed: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Gradient of `ops.linear` with respect to the weight: an integer product, or one of floats.

    Args:
        grad_out: float [M, N].
        saved_x: int8 [M, K] with x_scales float32 [M], as `ops.linear_with_saved_input` returns them; or a float x
            [M, K], whose product is one of floats always, with None.
        seed: int64 of shape []; None: a product of floats.
        out_dtype: of the result [N, K].
    """
    if x_scales is None:
        return (grad_out.t().to(saved_x.dtype) @ saved_x).to(out_dtype)
    if seed is None:
        x = (saved_x, x_scales.unsqueeze(1), None)
        return ops.linear_grad_input(grad_out.t(), *x, saved_x.shape[1], "w8a16", out_dtype)
    return int8_weight_gradient(grad_out, saved_x, x_scales, seed, out_dtype)


def int8_input_gradient(grad_out: Tensor, weight: LinearWeight, seed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`input_gradient` with `grad_out` rounded to int8.

    The scale of a weight with one scale a row is folded into `grad_out` before that is rounded.
    """
    return int_product(*quantized_rows(grad_out, weight, seed), weight, out_dtype)


def quantized_rows(grad_out: Tensor, weight: LinearWeight, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The integers int8 [M, N] and scales float32 [M] that `int8_input_gradient` multiplies."""
    folded = _row_factors(weight) if weight.column_scales is None else None
    return ops.quantize_rows_stochastic(grad_out, folded, seed, GRAD_INPUT)


def int8_weight_gradient(
    grad_out: Tensor, qx: Tensor, x_scales: Tensor, seed: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Gradient of `ops.linear` with respect to the weight as an integer product, the scales of x folded in likewise.

    Args:
        grad_out: float [M, N].
        qx, x_scales: int8 [M, K] and float32 [M], as `ops.linear_with_saved_input` returns them.
        seed: int64 of shape [].
        out_dtype: of the result [N, K].
    """
    q_grad, grad_scales = ops.quantize_columns_stochastic(grad_out, x_scales, seed, GRAD_WEIGHT)
    x = QuantizedWeight(qx, torch.ones_like(x_scales).unsqueeze(1), None)
    return int_product(q_grad, grad_scales, LinearWeight(x, qx.shape[1], "w8a8"), out_dtype)


def int_product(q_grad: Tensor, grad_scales: Tensor, weight: LinearWeight, out_dtype: torch.dtype) -> Tensor:
    """`ops.int_grad_input`, for any depth: blocks of rows of the weight, whose sums are added in ascending order."""
    stored, in_features, scheme, column_scales = weight
    depth = q_grad.shape[1]
    if depth <= _BLOCK:
        return ops.int_grad_input(q_grad, grad_scales, *stored, in_features, scheme, column_scales, out_dtype=out_dtype)
    total, ones = None, torch.ones_like(grad_scales)
    for start in range(0, depth, _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = stored.map(itemgetter(rows))
        part = ops.int_grad_input(q_grad[:, rows], ones, *block, in_features, scheme, column_scales)
        total = part if total is None else total + part
    assert total is not None
    return (total * grad_scales[:, None]).to(out_dtype)


def _row_factors(weight: LinearWeight) -> Tensor:
    """The scales to fold into a gradient [N].

    A row of zeros has a scale of 1 by convention. It counts as 0 here, so that it does not set the range of all rows.
    """
    stored = weight.stored
    factors = stored.scales.flatten()
    ones = factors == 1.0
    # Looking at the ones saves a pass over the weight, but a GPU would have to be waited for.
    if factors.device.type == "cpu" and not torch.compiler.is_compiling() and not ones.any():
        return factors
    integers = weight_integers(stored.qweight, stored.zeros, weight.in_features, QuantScheme.parse(weight.scheme))
    return torch.where(ones & ~integers.any(dim=1), 0.0, factors)
