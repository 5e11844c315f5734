"""Every op in plain torch, for any device: the oracle the kernels are tested against.

Integer products are held in float64 and summed by `torch.matmul`; below 2^53 that is exact in any order, so the
result does not depend on the device or its BLAS. Signatures match the op schemas in `csrc/ops.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import quantize, stochastic
from .quantize import weight_integers
from .schemes import QuantScheme


def quantize_activation(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    return quantize.quantize_activation(x, scheme)


def dequantize_weight(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str) -> Tensor:
    return quantize.dequantize_weight(qweight, scales, zeros, in_features, scheme)


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x [M, K]` times the quantized weight `[N, K]` transposed, plus bias: `[M, N]` of `out_dtype` or x.dtype."""
    parsed = QuantScheme.parse(scheme)
    if parsed.int_activations:
        out = _int_product(x, qweight, scales, zeros, parsed)
    else:
        weight = quantize.dequantize_weight(qweight, scales, zeros, x.shape[1], parsed)
        out = x.to(torch.float32) @ weight.t()
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype or x.dtype)


def _exact_sum(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of integers held in float64, as float32; adding +0 removes the -0 that a float sum may give."""
    return (a @ b.t() + 0.0).to(torch.float32)


def _int_product(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Rule 4: exact integer sums per group, scaled and added in float32, groups ascending."""
    in_features = x.shape[1]
    qx, x_scales = quantize.quantize_activation(x, scheme)
    a = qx.to(torch.float64)
    b = weight_integers(qweight, zeros, in_features, scheme).to(torch.float64)
    w_scales = scales.t()  # [groups, N]
    if scheme.group_size is None and scheme.act_group_size is None:
        return _exact_sum(a, b) * (x_scales * w_scales)
    step = scheme.acc_group_size(in_features)
    total = torch.zeros(x.shape[0], qweight.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, in_features, step):
        acc = _exact_sum(a[:, start : start + step], b[:, start : start + step])
        x_scale = x_scales[:, start // scheme.act_group_size, None] if scheme.act_group_size else None
        w_scale = w_scales[None, start // scheme.group_size] if scheme.group_size else None
        if x_scale is None:
            total = total + acc * w_scale
        elif w_scale is None:
            total = total + acc * x_scale
        else:
            total = total + acc * (x_scale * w_scale)
    if scheme.group_size is None:
        return total * w_scales
    return total if scheme.act_group_size else total * x_scales


def linear_saving(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear`, and x quantized with one scale a row (rule 8): `[M, N]`, int8 `[M, K]`, float32 `[M]`."""
    parsed = QuantScheme.parse(scheme)
    qx, x_scales = quantize.quantize_activation(x, parsed)
    out = linear(x, qweight, scales, zeros, bias, scheme, out_dtype)
    if parsed.act_group_size is None:
        return out, qx, x_scales.flatten()
    groups = quantize.grouped(qx.to(torch.float32), parsed.act_group_size)
    counts = (groups != 0).any(dim=-1) | x_scales.isnan()
    row_scales = torch.where(counts, x_scales, 0.0).amax(dim=1)
    row_scales = torch.where(row_scales == 0, 1.0, row_scales)
    merged = (groups * (x_scales / row_scales[:, None]).unsqueeze(-1)).round()
    merged = torch.where(row_scales.isnan()[:, None, None], 0.0, merged)
    return out, merged.to(torch.int8).flatten(1)[:, : x.shape[1]].contiguous(), row_scales


def quantize_weight(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """The canonical storage; zeros is [N, 0] for symmetric schemes."""
    qweight, scales, zeros = quantize.quantize_weight(weight, scheme)
    return qweight, scales, scales.new_empty((len(scales), 0), dtype=torch.uint8) if zeros is None else zeros


def mask_clipped(grad: Tensor, weight: Tensor, scheme: str) -> Tensor:
    """`grad [N, K]` where the integer of the weight lies in 0..15 before it is clamped, and 0 elsewhere."""
    parsed = QuantScheme.parse(scheme)
    groups = quantize.grouped(weight.to(torch.float32), parsed.group_size)
    _, inverse, zeros = quantize.int4_parameters(groups.amin(dim=-1), groups.amax(dim=-1), parsed.symmetric)
    integers = (groups * inverse.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    inside = ((integers >= 0) & (integers <= 15)).flatten(1)[:, : weight.shape[1]]
    return torch.where(inside, grad, 0.0)


def column_scales(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str) -> Tensor:
    """float32 [in_features]: rule 1 on each column of the dequantized weight."""
    weight = quantize.dequantize_weight(qweight, scales, zeros, in_features, scheme)
    return quantize.int8_groups(pad(weight, (0, 0, 0, 1)).t().unsqueeze(1))[1].flatten()  # a zero, should N be 0


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
    """Rule 6: the quantized gradient times the integers of the weight, made anew by column where it is grouped."""
    if column_scales is None:
        integers, out_scales = weight_integers(qweight, zeros, in_features, scheme), grad_scales[:, None]
    else:
        weight = quantize.dequantize_weight(qweight, scales, zeros, in_features, scheme)
        scaled = weight * quantize.divide(1.0, column_scales)
        integers = torch.where(scaled > -127, scaled, -127.0).clamp(max=127).round()
        out_scales = grad_scales[:, None] * column_scales
    acc = _exact_sum(q_grad.to(torch.float64), integers.to(torch.float64).t())
    return (acc * out_scales).to(out_dtype or torch.float32)


def linear_grad_input(
    grad_out: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Straight-through gradient of `linear` with respect to x: `grad_out [M, N]` times the dequantized weight."""
    weight = quantize.dequantize_weight(qweight, scales, zeros, in_features, scheme)
    return (grad_out.to(torch.float32) @ weight).to(out_dtype or grad_out.dtype)


def quantize_rows(x: Tensor, column_factors: Tensor | None, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Rule 7: rules 1 and 2 on the rows of `x * column_factors`, rounded stochastically."""
    folded = x.to(torch.float32) if column_factors is None else x.to(torch.float32) * column_factors
    scaled, scales = quantize.int8_scaled(folded.unsqueeze(1))
    uniforms = stochastic.uniform(*x.shape, seed, stream, x.device)
    return stochastic.round_stochastic(scaled.squeeze(1), uniforms), scales.flatten()


def quantize_columns(x: Tensor, row_factors: Tensor | None, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Rule 7 on the columns of `x`, transposed; the random bits are those of the places in x."""
    folded = x.to(torch.float32) if row_factors is None else x.to(torch.float32) * row_factors[:, None]
    scaled, scales = quantize.int8_scaled(pad(folded, (0, 0, 0, 1)).t().unsqueeze(1))  # a zero, should M be 0
    uniforms = stochastic.uniform(*x.shape, seed, stream, x.device).t()
    return stochastic.round_stochastic(scaled.squeeze(1)[:, : x.shape[0]], uniforms).contiguous(), scales.flatten()
