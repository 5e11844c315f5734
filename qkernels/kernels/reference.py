"""Every op in plain torch, for any device: the oracle the kernels are tested against.

Integer products are held in float64 and summed by `torch.matmul`; below 2^53 that is exact in any order, so the
result does not depend on the device or its BLAS. The arguments of the schemas come as `arguments.bundle` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from ..formats import philox, rules
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedRows, StoredWeight
from .arguments import ConvGeometry, LossOptions


def quantize_activation(x: Tensor, scheme: QuantScheme, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return rules.quantize_activation(x, scheme, x_scale)


def dequantize_weight(weight: StoredWeight) -> Tensor:
    return weight.dequantize()


def linear(x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`x [M, K]` times the quantized weight `[N, K]` transposed, plus bias: `[M, N]` of `out_dtype` or x.dtype."""
    if weight.scheme.int_activations:
        out = _int_product(x, weight)
    else:
        out = x.to(torch.float32) @ weight.dequantize().t()
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype or x.dtype)


def conv(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    geometry: ConvGeometry,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rule 14: images `x [N, H, W, C]` -> `[N, H_out, W_out, O]`; the products are those of `linear` on patches."""
    images, height, width, channels = x.shape
    rows, columns = geometry.output_size(height, width)
    kernel, strides, dilations, zeros = geometry[:2], geometry[2:4], geometry[4:6], geometry[6:10]
    flat, scales = x.to(torch.float32).reshape(images, height * width * channels), None
    if weight.scheme.int_activations:
        integers, of_images = rules.quantize_activation(flat, weight.scheme, weight.x_scale)
        flat, scales = integers.to(torch.float32), of_images.flatten()
    padded = pad(flat.view(x.shape).permute(0, 3, 1, 2), zeros)
    patches = unfold(padded, kernel, dilations, 0, strides)  # [N, C * taps, pixels]
    patches = patches.view(images, geometry.groups, channels // geometry.groups, math.prod(kernel), rows * columns)
    patches = patches.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)  # [groups, N * pixels, K]
    if scales is not None:
        scales = scales.repeat_interleave(rows * columns)
    per_group = weight.out_features // geometry.groups
    parts = [
        _product(part, weight.rows(slice(g * per_group, (g + 1) * per_group)), scales) for g, part in enumerate(patches)
    ]
    out = torch.cat(parts, dim=1).view(images, rows, columns, weight.out_features)
    return (out if bias is None else out + bias.to(torch.float32)).to(out_dtype or x.dtype)


def _product(rows: Tensor, weight: StoredWeight, scales: Tensor | None) -> Tensor:
    """`rows [M, K]` times a weight, float32 [M, N]: of floats, or of integers with a scale for each row."""
    if scales is None:
        return rows @ weight.dequantize().t()
    return _scaled_sums(rows, scales.unsqueeze(1), weight)


def _exact_sum(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of integers held in float64, as float32; adding +0 removes the -0 that a float sum may give."""
    return (a @ b.t() + 0.0).to(torch.float32)


def _int_product(x: Tensor, weight: StoredWeight) -> Tensor:
    """Rule 4, of float `x [M, K]`."""
    return _scaled_sums(*rules.quantize_activation(x, weight.scheme, weight.x_scale), weight)


def _scaled_sums(qx: Tensor, x_scales: Tensor, weight: StoredWeight) -> Tensor:
    """Rule 4: exact integer sums per group, scaled and added in float32, groups ascending; rule 16: plus minima."""
    product = _code_product(qx, x_scales, weight)
    return product + _min_product(qx, x_scales, weight) if weight.scheme.has_min else product


def _min_product(qx: Tensor, x_scales: Tensor, weight: StoredWeight) -> Tensor:
    """Rule 16: the sum of x over each group times the minimum of each row there, groups ascending."""
    scheme, step = weight.scheme, weight.scheme.acc_group_size(weight.in_features)
    assert weight.zeros is not None
    total = torch.zeros(qx.shape[0], weight.out_features, dtype=torch.float32, device=qx.device)
    for start in range(0, weight.in_features, step):
        sums = qx[:, start : start + step].sum(dim=1, keepdim=True, dtype=torch.int64).to(torch.float32)
        x_scale = x_scales[:, start // (scheme.act_group_size or weight.in_features), None]
        total = total + (sums * x_scale) * weight.zeros[None, :, start // (scheme.group_size or weight.in_features)]
    return total


def _code_product(qx: Tensor, x_scales: Tensor, weight: StoredWeight) -> Tensor:
    """Rule 4."""
    scheme, in_features = weight.scheme, weight.in_features
    a, b = qx.to(torch.float64), weight.integers().to(torch.float64)
    w_scales = weight.scales.t()  # [groups, N]
    if scheme.group_size is None and scheme.act_group_size is None:
        return _exact_sum(a, b) * (x_scales * w_scales)
    step = scheme.acc_group_size(in_features)
    total = torch.zeros(qx.shape[0], weight.out_features, dtype=torch.float32, device=qx.device)
    for start in range(0, in_features, step):
        acc = _exact_sum(a[:, start : start + step], b[:, start : start + step])
        x_scale = x_scales[:, start // scheme.act_group_size, None] if scheme.act_group_size else 1.0
        w_scale = w_scales[None, start // scheme.group_size] if scheme.group_size else 1.0
        total = total + acc * (x_scale * w_scale)
    if scheme.group_size is None:
        return total * w_scales
    return total if scheme.act_group_size else total * x_scales


def _expert_rows(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    ends = offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise([0, *ends])):
        if not begin <= end <= rows:
            raise RuntimeError(f"offsets must ascend from 0 to at most {rows}, got {end} at position {expert}")
        if begin < end:
            yield expert, slice(begin, end)


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Rule 12: `linear` of each expert's rows with its own weight, `[M, N]`; 0 in rows of no expert."""
    x = x if rows is None else x[rows]
    out = x.new_zeros((len(x), weight.out_features), dtype=out_dtype or x.dtype)
    for expert, part in _expert_rows(offsets, len(x)):
        out[part] = linear(x[part], weight.expert(expert), None if bias is None else bias[expert], out_dtype)
    return out


def grouped_linear_grad_input(
    grad_out: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    seed: Tensor | None = None,
    column_scales: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rule 12: the gradient of each expert's rows, `[M, K]`; 0 in rows of no expert."""
    out_dtype = out_dtype or grad_out.dtype
    rows, columns = grad_out.shape
    out = grad_out.new_zeros((rows, weight.in_features), dtype=out_dtype)
    uniforms = None if seed is None else philox.uniform(rows, columns, seed, philox.GRAD_INPUT, grad_out.device)
    for expert, part in _expert_rows(offsets, rows):
        own = weight.expert(expert)
        if uniforms is None:
            out[part] = linear_grad_input(grad_out[part], own, out_dtype)
            continue
        of_columns = None if column_scales is None else column_scales[expert]
        grad = grad_out[part].to(torch.float32)
        if of_columns is None:  # a row of zeros has a scale of 1, which would set the scale of all others
            zero = (own.scales[:, 0] == 1.0) & (own.integers() == 0).all(dim=1)
            grad = grad * torch.where(zero, 0.0, own.scales[:, 0])
        out[part] = _long_product(_round_rows(grad, uniforms[part]), own, of_columns, out_dtype)
    return out


def grouped_linear_grad_weight(
    grad_out: Tensor,
    offsets: Tensor,
    qx: Tensor,
    x_scales: Tensor,
    rows: Tensor | None = None,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rule 12: the gradient of each expert's weight, `[E, N, K]`; 0 for experts without rows."""
    qx, x_scales = (qx, x_scales) if rows is None else (qx[rows], x_scales[rows])
    out_dtype = out_dtype or grad_out.dtype
    out = grad_out.new_zeros((len(offsets), grad_out.shape[1], qx.shape[1]), dtype=out_dtype)
    uniforms = None
    if seed is not None:
        uniforms = philox.uniform(len(grad_out), grad_out.shape[1], seed, philox.GRAD_WEIGHT, grad_out.device)
    for expert, part in _expert_rows(offsets, len(grad_out)):
        scales = x_scales[part, None]
        if uniforms is None:
            x = StoredWeight(qx[part], scales, None, qx.shape[1], QuantScheme.parse("w8a16"))
            out[expert] = linear_grad_input(grad_out[part].t(), x, out_dtype)
            continue
        x = StoredWeight(qx[part], torch.ones_like(scales), None, qx.shape[1], QuantScheme.parse("w8a8"))
        grad = _round_columns(grad_out[part].to(torch.float32) * scales, uniforms[part])
        out[expert] = _long_product(grad, x, None, out_dtype)
    return out


def grouped_outer(grad_out: Tensor, offsets: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """`grad_out.T @ x` of each expert's rows, in the dtype of x: `[E, N, K]`; 0 for experts without rows.

    These are products of floats alone, which torch computes on every device.
    """
    x, grad_out = x if rows is None else x[rows], grad_out.to(x.dtype)
    out = x.new_zeros((len(offsets), grad_out.shape[1], x.shape[1]))
    for expert, part in _expert_rows(offsets, len(x)):
        torch.mm(grad_out[part].t(), x[part], out=out[expert])
    return out


def _long_product(
    grad: QuantizedRows, weight: StoredWeight, column_scales: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Rule 10: `int_grad_input` for any depth."""
    if grad.integers.shape[1] <= LONG_SUM:
        return int_grad_input(grad, weight, column_scales, out_dtype)
    total, ones = None, torch.ones_like(grad.scales)
    for start in range(0, grad.integers.shape[1], LONG_SUM):
        block = slice(start, start + LONG_SUM)
        part = int_grad_input(QuantizedRows(grad.integers[:, block], ones), weight.rows(block), column_scales)
        total = part if total is None else total + part
    assert total is not None
    return (total * grad.scales[:, None]).to(out_dtype)


def linear_with_saved_input(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear`, and x quantized with one scale a row (rule 9): `[M, N]`, int8 `[M, K]`, float32 `[M]`."""
    scheme = weight.scheme
    qx, x_scales = rules.quantize_activation(x, scheme, weight.x_scale)
    out = linear(x, weight, bias, out_dtype)
    if scheme.act_group_size is None:
        return out, qx, x_scales.flatten()
    groups = rules.grouped(qx.to(torch.float32), scheme.act_group_size)
    counts = (groups != 0).any(dim=-1) | x_scales.isnan()
    row_scales = torch.where(counts, x_scales, 0.0).amax(dim=1)
    row_scales = torch.where(row_scales == 0, 1.0, row_scales)
    merged = (groups * (x_scales / row_scales[:, None]).unsqueeze(-1)).round()
    merged = torch.where(row_scales.isnan()[:, None, None], 0.0, merged)
    return out, merged.to(torch.int8).flatten(1)[:, : x.shape[1]].contiguous(), row_scales


def quantize_weight(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """The canonical storage; zeros is uint8 [N, 0] for symmetric schemes."""
    qweight, scales, zeros = rules.quantize_weight(weight, scheme)
    return qweight, scales, scales.new_empty((len(scales), 0), dtype=torch.uint8) if zeros is None else zeros


def mask_clipped(grad: Tensor, weight: Tensor, scheme: QuantScheme) -> Tensor:
    """`grad [N, K]` where the integer of the weight lies in 0..15 before it is clamped, and 0 elsewhere."""
    groups = rules.grouped(weight.to(torch.float32), scheme.group_size)
    _, inverse, zeros = rules.int4_parameters(groups.amin(dim=-1), groups.amax(dim=-1), scheme.symmetric)
    integers = (groups * inverse.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    inside = ((integers >= 0) & (integers <= 15)).flatten(1)[:, : weight.shape[1]]
    return torch.where(inside, grad, 0.0)


def _in_scales(weight: Tensor, scales: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """float32 [N, groups, G]: the weight divided by its scale, and that rounded and clamped (rule 11)."""
    values = rules.grouped(weight.to(torch.float32), scheme.group_size) * rules.inverse_of(scales).unsqueeze(-1)
    return values, values.round().clamp(scheme.weight_format.least, scheme.weight_format.greatest)


def quantize_weight_scaled(weight: Tensor, scales: Tensor, scheme: QuantScheme) -> Tensor:
    """Rule 11: `qweight` of the canonical storage for given scales."""
    if not (weight.isfinite().all() and scales.isfinite().all()):
        raise RuntimeError("weight and scales must be finite, got NaN or Inf")
    integers = _in_scales(weight, scales, scheme)[1].flatten(1)[:, : weight.shape[1]]
    return scheme.weight_format.pack(integers + scheme.weight_format.offset)


def scale_gradient(grad: Tensor, weight: Tensor, scales: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Rule 11: what a gradient `[N, K]` is for the weight and, [N, groups], for its scales."""
    in_features = weight.shape[1]
    values, integers = _in_scales(weight, scales, scheme)
    inside = values.round() == integers
    group = scheme.group_size or in_features
    steps = rules.grouped(grad.to(torch.float32), group) * torch.where(inside, integers - values, integers)
    lanes = torch.zeros(*steps.shape[:2], 16, device=grad.device)
    for part in pad(steps, (0, -group % 16)).unflatten(-1, (-1, 16)).unbind(-2):
        lanes = lanes + part
    while lanes.shape[-1] > 1:
        lanes = lanes[..., : lanes.shape[-1] // 2] + lanes[..., lanes.shape[-1] // 2 :]
    counts = torch.full((scales.shape[1],), group, dtype=torch.float64, device=grad.device)
    counts[-1] = in_features - group * (scales.shape[1] - 1)
    factors = (1.0 / (counts * scheme.weight_format.greatest).sqrt()).to(torch.float32)
    masked = torch.where(inside.flatten(1)[:, :in_features], grad, 0.0)
    return masked, lanes.squeeze(-1) * factors


def column_scales(weight: StoredWeight) -> Tensor:
    """float32 [in_features]: rule 1 on each column of the dequantized weight."""
    return rules.int8_groups(pad(weight.dequantize(), (0, 0, 0, 1)).t().unsqueeze(1))[
        1
    ].flatten()  # a zero, should N be 0


def int_grad_input(
    grad: QuantizedRows, weight: StoredWeight, column_scales: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Rule 6: the quantized gradient times the integers of the weight, made anew by column unless scaled by row."""
    if column_scales is None:
        integers, out_scales = weight.integers(), grad.scales[:, None]
    else:
        scaled = weight.dequantize() * rules.divide(1.0, column_scales)
        integers = torch.where(scaled > -127, scaled, -127.0).clamp(max=127).round()
        out_scales = grad.scales[:, None] * column_scales
    acc = _exact_sum(grad.integers.to(torch.float64), integers.to(torch.float64).t())
    return (acc * out_scales).to(out_dtype or torch.float32)


def linear_grad_input(grad_out: Tensor, weight: StoredWeight, out_dtype: torch.dtype | None = None) -> Tensor:
    """Straight-through gradient of `linear` with respect to x: `grad_out [M, N]` times the dequantized weight."""
    return (grad_out.to(torch.float32) @ weight.dequantize()).to(out_dtype or grad_out.dtype)


# Terms that a gradient sums in integers; the sums of longer ones are added in float32 (rule 10).
LONG_SUM = 65536

# Columns of the vocabulary that share a scale of the gradient, and the ranges of such chunks that are summed apart.
LOSS_CHUNK = 1024
_LOSS_RANGES = 8
_LANES = 16
_LOWEST = torch.finfo(torch.float32).min


def exp_nonpositive(x: Tensor) -> Tensor:
    """exp of float32 x <= 0 within 2^-22, 0 below -87: single operations that are each rounded (`exp.inc`)."""
    shifted = x * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    power = (shifted.view(torch.int32) << 23) + (127 << 23)
    y = ((r * r * p + r) + 1.0) * power.view(torch.float32)
    return torch.where(x < -87.0, 0.0, y)


def _natural_log(x: Tensor) -> Tensor:
    """log of float64 x >= 0 in operations that are each rounded."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < 0.70710678118654752
    f = torch.where(low, mantissa * 2.0, mantissa)
    s = (f - 1.0) / (f + 1.0)
    series = torch.zeros_like(s)
    for k in range(19, 0, -2):
        series = series * (s * s) + 1.0 / k
    log = 2.0 * (s * series) + (exponent.to(torch.float64) - low.to(torch.float64)) * 0.69314718055994531
    return torch.where(x == 0, -torch.inf, torch.where(x == torch.inf, torch.inf, log))


def _lane_sum(x: Tensor) -> Tensor:
    """Row sums [M]: lane i adds columns i, i + 16, ... in order, then the 16 lanes are added by halves."""
    steps = -(-x.shape[1] // _LANES)
    lanes = pad(x, (0, steps * _LANES - x.shape[1])).view(len(x), steps, _LANES)
    total = torch.zeros_like(lanes[:, 0])
    for step in range(steps):
        total = total + lanes[:, step]
    while total.shape[1] > 1:
        low, high = total.chunk(2, dim=1)
        total = low + high
    return total[:, 0]


class _Softmax:
    """The softmax of rows of logits over the columns seen so far, and its product with the weight."""

    def __init__(self, rows: int, in_features: int, device: torch.device) -> None:
        self.max = torch.full((rows,), _LOWEST, device=device)
        self.sum = torch.zeros(rows, device=device)
        self.total = torch.zeros(rows, dtype=torch.float64, device=device)  # of the logits
        self.target = torch.zeros(rows, device=device)  # the target's logit
        self.product = torch.zeros(rows, in_features, device=device)

    def fold(self, largest: Tensor, total: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a part; the factors of what was there before and of the part."""
        highest = torch.where(largest > self.max, largest, self.max)
        before, own = exp_nonpositive(self.max - highest), exp_nonpositive(largest - highest)
        self.max, self.sum = highest, self.sum * before + total * own
        self.total = self.total + logits
        return before[:, None], own[:, None]


def _soft_cap(logits: Tensor, cap: float) -> Tensor:
    """c * tanh(y / c): below |y / c| = 0.625 by a polynomial, from there on by exponentials."""
    if cap == 0:
        return logits
    u = logits * rules.divide(1.0, torch.tensor(cap, dtype=torch.float32, device=logits.device))
    z = u * u
    p = z * -5.70498872745e-3 + 2.06390887954e-2
    for coefficient in (-5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = p * z + coefficient
    t = exp_nonpositive(u.abs() * -2.0)
    return torch.where(u.abs() < 0.625, logits + logits * (z * p), torch.copysign((1.0 - t) / (1.0 + t) * cap, u))


def _column_sums(weight: Tensor) -> Tensor:
    """float64 [K]: of each chunk of rows in order, then of the chunks."""
    chunks = [chunk.double().cumsum(dim=0)[-1] for chunk in weight.split(LOSS_CHUNK)]
    return torch.stack(chunks).cumsum(dim=0)[-1]


def _quantize_dithered(x: Tensor, dither: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """int8 of x with a scale for each row, rounded up where a fraction exceeds what the dither says."""
    bits = (x.view(torch.int32) & 0x7FFFFFFF).amax(dim=1, keepdim=True)
    absmax = bits.view(torch.float32)
    broken, tiny = bits >= 0x7F800000, bits < 0x0F800000  # Inf or NaN, below 2^-96
    v = x * rules.divide(127.0, torch.where(broken | tiny, 1.0, absmax))
    columns = torch.arange(first, first + x.shape[1], device=x.device)
    u = ((dither[:, None] + columns * 0x9E3779B9) % 2**32 >> 8).to(torch.float32) * 2.0**-24
    q = (v.floor() + (u < v - v.floor())).clamp(-127, 127)
    scale = torch.where(broken, torch.nan, torch.where(tiny, 1.0, rules.divide(absmax, 127.0)))
    return torch.where(broken | tiny, 0.0, q).to(torch.int8), scale


def linear_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    dither: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rule 7: losses [M], log-sum-exps [M] and gradients [M, K] of the losses (none without dither), float32."""
    softcap, z_loss, label_smoothing, ignore_index = LossOptions(**options)
    scheme, out_features, in_features = weight.scheme, weight.out_features, weight.in_features
    softcap = torch.tensor(softcap, dtype=torch.float32).item()
    softcap = 0.0 if math.isinf(softcap) else softcap
    valid = target != ignore_index
    hidden, picked = hidden[valid].to(torch.float32), target[valid]
    chunks = -(-out_features // LOSS_CHUNK)
    edges = [i * chunks // _LOSS_RANGES for i in range(_LOSS_RANGES + 1)]
    state = _Softmax(len(hidden), in_features, hidden.device)
    for begin, end in pairwise(edges):
        part = _Softmax(len(hidden), in_features, hidden.device)
        for first in range(begin * LOSS_CHUNK, min(end * LOSS_CHUNK, out_features), LOSS_CHUNK):
            rows = slice(first, first + LOSS_CHUNK)
            chunk = weight.rows(rows)
            logits = linear(hidden, chunk, None if bias is None else bias[rows])
            y = _soft_cap(logits, softcap)
            largest = torch.where(y.isnan(), _LOWEST, y).amax(dim=1).clamp(min=_LOWEST)
            e = exp_nonpositive(y - largest[:, None])
            before, own = part.fold(largest, _lane_sum(e), _lane_sum(y))
            is_target = picked[:, None] == torch.arange(first, first + y.shape[1], device=y.device)
            part.target = torch.where(
                is_target.any(dim=1), y.gather(1, is_target.int().argmax(1, True))[:, 0], part.target
            )
            if dither is None:
                continue
            if softcap != 0:
                t = y * rules.divide(1.0, torch.tensor(softcap, dtype=torch.float32, device=y.device))
                slope = 1.0 - t * t
                e = torch.where(slope > 0, e * slope, 0.0)
            if scheme.row_scaled:  # a row of zeros has a scale of 1, which would set the scale of all others
                zero = (chunk.integers() == 0).all(dim=1)
                e = e * torch.where(zero, 0.0, chunk.scales[:, 0])
            q, scale = _quantize_dithered(e.masked_fill(is_target, 0.0), dither[valid], first)
            factors = None if scheme.row_scaled else column_scales(chunk)
            product = int_grad_input(QuantizedRows(q, (scale * own)[:, 0]), chunk, factors)
            part.product = part.product * before + product
        before, own = state.fold(part.max, part.sum, part.total)
        state.target = state.target + part.target
        state.product = state.product * before + part.product * own
    lse = state.max + _natural_log(state.sum.to(torch.float64))
    expected = (1.0 - label_smoothing) * state.target.to(torch.float64)
    if label_smoothing != 0:
        expected = expected + label_smoothing * (state.total / out_features)
    loss, log_sum_exp = (target.new_zeros(len(target), dtype=torch.float32) for _ in range(2))
    loss[valid] = ((lse - expected) + z_loss * (lse * lse)).to(torch.float32)
    log_sum_exp[valid] = lse.to(torch.float32)
    grad = target.new_zeros((0 if dither is None else len(target), in_features), dtype=torch.float32)
    if dither is not None:
        slope = 1.0 + 2.0 * z_loss * lse
        at_target = slope * (exp_nonpositive(state.target - state.max).double() / state.sum) - (1.0 - label_smoothing)
        if softcap != 0:
            at_target = at_target * (1.0 - (state.target.double() / softcap) ** 2)
        factor = (slope / state.sum.double()).to(torch.float32)
        row = weight.rows(picked).dequantize()
        result = state.product * factor[:, None] + row * at_target.to(torch.float32)[:, None]
        if label_smoothing != 0:
            result = result - label_smoothing / out_features * _column_sums(weight.dequantize())
        grad[valid] = result.to(torch.float32)
    return loss, log_sum_exp, grad


def quantize_rows_stochastic(
    x: Tensor, column_factors: Tensor | None, seed: Tensor, rng_stream: int
) -> tuple[Tensor, Tensor]:
    """Rule 8: rules 1 and 2 on the rows of `x * column_factors`, rounded stochastically."""
    folded = x.to(torch.float32) if column_factors is None else x.to(torch.float32) * column_factors
    return _round_rows(folded, philox.uniform(len(x), x.shape[1], seed, rng_stream, x.device))


def quantize_columns_stochastic(
    x: Tensor, row_factors: Tensor | None, seed: Tensor, rng_stream: int
) -> tuple[Tensor, Tensor]:
    """Rule 8 on the columns of `x`, transposed; the random bits are those of the places in x."""
    folded = x.to(torch.float32) if row_factors is None else x.to(torch.float32) * row_factors[:, None]
    return _round_columns(folded, philox.uniform(len(x), x.shape[1], seed, rng_stream, x.device))


def _round_rows(x: Tensor, uniforms: Tensor) -> QuantizedRows:
    scaled, scales = rules.int8_scaled(x.unsqueeze(1))
    return QuantizedRows(philox.round_stochastic(scaled.squeeze(1), uniforms), scales.flatten())


def _round_columns(x: Tensor, uniforms: Tensor) -> QuantizedRows:
    scaled, scales = rules.int8_scaled(pad(x, (0, 0, 0, 1)).t().unsqueeze(1))  # a zero, should M be 0
    rounded = philox.round_stochastic(scaled.squeeze(1)[:, : x.shape[0]], uniforms.t())
    return QuantizedRows(rounded.contiguous(), scales.flatten())
