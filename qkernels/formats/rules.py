"""Float -> quantized: the definition of every format, in plain torch, for any device.

All arithmetic is float32 with each operation rounded on its own, so that every backend can compute the same bits
(`docs/numerics.md` states the rules; the numbers in the comments refer to it).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .scheme import QuantScheme
from .storage import QuantizedWeight, storage_dtypes
from .weight_format import INT4, INT8, WeightFormat

# Below this magnitude a range counts as zero: 127 / absmax and scale products then stay far from overflow.
TINY = 2.0**-96
_INF_BITS = 0x7F800000
_WEIGHTS_AT_ONCE = 1 << 17


def check_float_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"{name} must be a float matrix with K >= 1 columns, got {x.dtype} of shape {list(x.shape)}")


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """IEEE a / b of float32. torch turns `number / tensor`, and on GPUs `tensor / number`, into a reciprocal.

    Raises:
        TypeError: if neither is a tensor.
    """
    if isinstance(b, Tensor):
        return (a if isinstance(a, Tensor) else b.new_full((), a)) / b
    if isinstance(a, Tensor):
        return a / a.new_full((), b)
    raise TypeError("a or b must be a tensor, got two numbers")


def grouped(x: Tensor, group_size: int | None) -> Tensor:
    """float32 [R, K] -> [R, groups, group_size], zero-padded (a zero never changes a range that contains 0)."""
    columns = x.shape[-1]
    group_size = group_size or columns
    return pad(x, (0, -columns % group_size)).unflatten(-1, (-1, group_size))


def int8_scaled(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rule 1 and the product of rule 2: float32 [R, groups, G] -> what is rounded, and float32 scales [R, groups]."""
    bits = (groups.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(dim=-1)
    absmax = bits.view(torch.float32)
    finite, usable = bits < _INF_BITS, (bits < _INF_BITS) & (absmax >= TINY)
    safe = torch.where(usable, absmax, 1.0)
    scales = torch.where(usable, divide(safe, 127.0), torch.where(finite, 1.0, torch.nan))
    inverse = torch.where(usable, divide(127.0, safe), 0.0).unsqueeze(-1)
    return torch.where(usable.unsqueeze(-1), groups, 0.0) * inverse, scales.to(torch.float32)


def int8_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rules 1 and 2: float32 [R, groups, G] -> int8 of that shape and float32 scales [R, groups]."""
    scaled, scales = int8_scaled(groups)
    return scaled.round().clamp(-127, 127).to(torch.int8), scales


def quantize_activation(x: Tensor, scheme: str | QuantScheme, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize activations per token, or per group of K (rules 1 and 2), or with a given scale (rule 13).

    Args:
        x: float [M, K].
        scheme: an `a8` scheme.
        x_scale: float32 [1], for `a8s` schemes only: the scale of all rows. What is larger than 127 of it is clamped.

    Returns:
        int8 [M, K] and float32 scales [M, groups]. A group that holds Inf or NaN has q = 0 and scale NaN.

    Raises:
        ValueError: if x is not a float matrix with K >= 1, the scheme leaves activations in float, or x_scale is
            missing or not wanted.
    """
    scheme = QuantScheme.parse(scheme)
    if not scheme.int_activations:
        raise ValueError(f"scheme must be an a8 scheme, got {scheme}")
    check_float_matrix("x", x)
    if scheme.static_activations != (x_scale is not None):
        wanted = "is required" if scheme.static_activations else "must be None"
        raise ValueError(f"x_scale {wanted} for scheme {scheme}")
    if x_scale is not None:
        return int8_static(x.to(torch.float32), x_scale)
    q, scales = int8_groups(grouped(x.to(torch.float32), scheme.act_group_size))
    return q.flatten(-2)[:, : x.shape[-1]].contiguous(), scales


def inverse_of(scale: Tensor) -> Tensor:
    """What values are multiplied with to be rounded to a given float32 scale: 0 where that counts as 0 (rule 11)."""
    usable = scale.abs() >= TINY
    return torch.where(usable, divide(1.0, torch.where(usable, scale, 1.0)), 0.0)


def int8_static(x: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rule 13: float32 [M, K] and a scale [1] for all of it -> int8 of that shape and float32 scales [M, 1]."""
    finite = x.isfinite().all(dim=-1, keepdim=True)
    q = (torch.where(finite, x, 0.0) * inverse_of(x_scale)).round().clamp(-127, 127).to(torch.int8)
    return q, torch.where(finite, x_scale, torch.nan)


def quantize_weight(weight: Tensor, scheme: str | QuantScheme) -> QuantizedWeight:
    """Quantize a weight (rules 1 to 3, and rule 16 for its minima).

    Args:
        weight: float [N, K], any float dtype.
        scheme: the format.

    Raises:
        ValueError: if the weight is not a float matrix with K >= 1, or holds NaN or Inf.
    """
    scheme = QuantScheme.parse(scheme)
    check_float_matrix("weight", weight)
    out_features, in_features = weight.shape
    dtypes = storage_dtypes(scheme)
    stored = {
        name: torch.empty(shape, dtype=dtypes[name], device=weight.device)
        for name, shape in scheme.storage_shapes(in_features, out_features).items()
    }
    step = rows_per_block(in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        block = _quantize_rows(weight.detach()[rows].to(torch.float32), scheme)
        for name, tensor in stored.items():
            tensor[rows] = getattr(block, name)
    return QuantizedWeight(stored["qweight"], stored["scales"], stored.get("zeros"))


def rows_per_block(in_features: int) -> int:
    """Rows of a weight to work on at a time, so that float temporaries stay small against the layer."""
    return max(1, _WEIGHTS_AT_ONCE // in_features)


def _quantize_rows(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Rules 1 to 3 for some rows of a weight: float32 [R, K]."""
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got NaN or Inf values")
    in_features = weight.shape[1]
    if scheme.has_min:
        codes, scales, minima = min_codes(_repeated(weight, scheme.group_size), scheme.weight_format)
        return QuantizedWeight(scheme.weight_format.pack(codes.flatten(1)[:, :in_features]), scales, minima)
    groups = grouped(weight, scheme.group_size)
    if scheme.weight_format is INT8:
        q, scales = int8_groups(groups)
        return QuantizedWeight(q.flatten(1)[:, :in_features].contiguous(), scales, None)
    scales, inverse, zeros = int4_parameters(groups.amin(dim=-1), groups.amax(dim=-1), scheme.symmetric)
    nibbles = int4_nibbles(groups, inverse.unsqueeze(-1), zeros.unsqueeze(-1)).flatten(1)[:, :in_features]
    return QuantizedWeight(INT4.pack(nibbles), scales, None if scheme.symmetric else zeros.to(torch.uint8))


def _repeated(weight: Tensor, group_size: int | None) -> Tensor:
    """float32 [R, K] -> [R, groups, group_size], padded with the last value of each row: no range changes."""
    group_size = group_size or weight.shape[1]
    last = weight[:, -1:].expand(-1, -weight.shape[1] % group_size)
    return torch.cat([weight, last], dim=1).unflatten(-1, (-1, group_size))


def min_codes(groups: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Rule 16: float32 [R, groups, G] -> codes of that shape, and the scales and minima [R, groups] of each group.

    Raises:
        ValueError: if the greatest minus the least value of a group overflows.
    """
    low, high = groups.amin(dim=-1) + 0.0, groups.amax(dim=-1)  # of zeros the positive one
    span = high - low
    if not span.isfinite().all():
        raise ValueError("weight range of a group must be finite in float32, got max - min = Inf")
    least, greatest = weight_format.codes
    usable, levels = span >= TINY, float(greatest - least)
    safe = torch.where(usable, span, 1.0)
    scales = torch.where(usable, divide(safe, levels), 1.0)
    inverse = torch.where(usable, divide(levels, safe), 0.0)
    minima = torch.where(usable, low - float(least) * scales, low)
    codes = ((groups - minima.unsqueeze(-1)) * inverse.unsqueeze(-1)).round().clamp(least, greatest)
    return codes.to(weight_format.dtype), scales, minima


def int4_parameters(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rule 3: scale, its inverse and zero point (8 for symmetric groups) of groups with this minimum and maximum.

    Args:
        low, high: float32, of any common shape.

    Returns:
        Three float32 tensors of that shape.

    Raises:
        ValueError: if high - low overflows (asymmetric groups).
    """
    if symmetric:
        span, levels = torch.where(-low > high, low, high), -8.0
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        span, levels = high - low, 15.0
        if not span.isfinite().all():
            raise ValueError("weight range of a group must be finite in float32, got max - min = Inf")
    usable = span.abs() >= TINY
    safe = torch.where(usable, span, 1.0)
    scales = torch.where(usable, divide(safe, levels), 1.0)
    inverse = torch.where(usable, divide(levels, safe), 0.0)
    zeros = torch.full_like(span, 8.0) if symmetric else (-low * inverse).round().clamp(0, 15)
    return scales, inverse, zeros


def int4_nibbles(weight: Tensor, inverse: Tensor, zeros: Tensor) -> Tensor:
    """uint8 values 0..15 of float32 weights, given the parameters of their groups (broadcast)."""
    return ((weight * inverse).round() + zeros).clamp(0, 15).to(torch.uint8)


def int8_on_grid(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [N, K], scales [N, 1], and bool [N, 1]: which rows of float32 values are their product, bit for bit.

    The largest magnitude is 127 times the scale or, in weights of other writers, -128 times it. Its quotient by 127 may
    be off by one or two units in the last place from the scale that the values were multiplied with.
    """
    absmax = values.abs().amax(dim=1, keepdim=True)
    scales = torch.where(absmax > 0, absmax / 127.0, 1.0)
    qweight = (values / scales).round()
    exact = torch.zeros_like(absmax, dtype=torch.bool)
    chosen = scales
    for ulps in (0, 1, -1, 2, -2):
        candidate = (scales.view(torch.int32) + ulps).view(torch.float32)
        matches = (qweight * candidate == values).all(dim=1, keepdim=True) & ~exact
        chosen, exact = torch.where(matches, candidate, chosen), exact | matches
    extreme = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    scales = torch.where(absmax > 0, extreme / -128.0, 1.0)
    integers = (values / scales).round()
    matches = (integers * scales == values).all(dim=1, keepdim=True) & (integers.amax(dim=1, keepdim=True) <= 127)
    matches &= ~exact
    qweight = torch.where(matches, integers, qweight)
    chosen, exact = torch.where(matches, scales, chosen), exact | matches
    return qweight.clamp(-128, 127).to(torch.int8), chosen, exact
