"""The numeric rules (docs/numerics.md) once more in NumPy, group by group: a second, independent definition."""

import numpy as np

F = np.float32
TINY = F(2.0**-96)


def groups_of(columns: int, group_size: int | None) -> list[slice]:
    size = group_size or columns
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def int8_group(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Rules 1 and 2 on one group."""
    top = (values.view(np.uint32) & 0x7FFFFFFF).max()
    if top >= 0x7F800000:
        return np.zeros(values.shape, np.int8), F("nan")
    absmax = np.uint32(top).view(F)
    if absmax < TINY:
        return np.zeros(values.shape, np.int8), F(1)
    scaled = np.rint(values * (F(127) / absmax))
    return np.clip(scaled, -127, 127).astype(np.int8), absmax / F(127)


def symmetric_group(values: np.ndarray) -> tuple[np.ndarray, np.float32, int]:
    """Rule 3, symmetric: nibbles, scale, and the zero point 8."""
    low, high = values.min(), values.max()
    extreme = low if -low > high else high
    if abs(extreme) < TINY:
        return np.full(values.shape, 8), F(1), 8
    q = np.clip(np.rint(values * (F(-8) / extreme)), -8, 7)
    return (q + 8).astype(int), extreme / F(-8), 8


def asymmetric_group(values: np.ndarray) -> tuple[np.ndarray, np.float32, int]:
    """Rule 3, asymmetric: nibbles, scale, zero point."""
    low, high = min(F(0), values.min()), max(F(0), values.max())
    span = F(high - low)
    if span < TINY:
        return np.zeros(values.shape, int), F(1), 0
    inverse = F(15) / span
    zero = int(np.clip(np.rint(F(-low) * inverse), 0, 15))
    return np.clip(np.rint(values * inverse) + zero, 0, 15).astype(int), span / F(15), zero


def quantize_activation(x: np.ndarray, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    spans = groups_of(x.shape[1], group_size)
    q, scales = np.zeros(x.shape, np.int8), np.zeros((len(x), len(spans)), F)
    for r, row in enumerate(x):
        for g, span in enumerate(spans):
            q[r, span], scales[r, g] = int8_group(row[span])
    return q, scales


def quantize_static(x: np.ndarray, x_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rule 13: int8 [M, K], and the scales [M, 1] of the rows."""
    q, scales = np.zeros(x.shape, np.int8), np.full((len(x), 1), x_scale[0], F)
    inverse = F(1) / x_scale[0] if abs(x_scale[0]) >= TINY else F(0)
    for r, row in enumerate(x):
        if np.isfinite(row).all():
            q[r] = np.clip(np.rint(row * inverse), -127, 127)
        else:
            scales[r] = np.nan
    return q, scales


def quantize_weight(weight: np.ndarray, scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The canonical storage of `scheme`."""
    if scheme.has_min:
        return quantize_min(weight, scheme)
    if scheme.weight_bits == 8:
        return (*quantize_activation(weight, scheme.group_size), None)
    quantize_group = symmetric_group if scheme.symmetric else asymmetric_group
    spans = groups_of(weight.shape[1], scheme.group_size)
    nibbles = np.zeros(weight.shape, np.uint8)
    scales, zeros = np.zeros((len(weight), len(spans)), F), np.zeros((len(weight), len(spans)), np.uint8)
    for r, row in enumerate(weight):
        for g, span in enumerate(spans):
            nibbles[r, span], scales[r, g], zeros[r, g] = quantize_group(row[span])
    return pack_int4(nibbles), scales, None if scheme.symmetric else zeros


def quantize_min(weight: np.ndarray, scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rule 16: codes of 15 or 254 steps, their scales and minima."""
    spans = groups_of(weight.shape[1], scheme.group_size)
    least, greatest = (0, 15) if scheme.weight_bits == 4 else (-127, 127)
    codes, scales, minima = np.zeros(weight.shape, np.int64), *(np.ones((len(weight), len(spans)), F) for _ in "sm")
    for r, row in enumerate(weight):
        for g, span in enumerate(spans):
            low, width = row[span].min() + F(0), F(row[span].max() - row[span].min())
            minima[r, g] = low
            if width >= TINY:
                scales[r, g] = width / F(greatest - least)
                minima[r, g] = low - F(least) * scales[r, g]
                rounded = np.rint((row[span] - minima[r, g]) * (F(greatest - least) / width))
                codes[r, span] = np.clip(rounded, least, greatest)
    return (codes.astype(np.int8) if scheme.weight_bits == 8 else pack_int4(codes.astype(np.uint8))), scales, minima


def pack_int4(nibbles: np.ndarray) -> np.ndarray:
    packed = np.zeros((len(nibbles), (nibbles.shape[1] + 1) // 2), np.uint8)
    for k in range(nibbles.shape[1]):
        packed[:, k // 2] |= nibbles[:, k] << (4 * (k % 2))
    return packed


def weight_integers(qweight, zeros, columns: int, scheme) -> np.ndarray:
    """int64 [N, K]: the integers the kernels multiply."""
    if scheme.weight_bits == 8:
        return qweight.astype(np.int64)
    nibbles = np.stack([(qweight[:, k // 2] >> (4 * (k % 2))) & 15 for k in range(columns)], axis=1).astype(np.int64)
    if scheme.has_min:
        return nibbles
    for g, span in enumerate(groups_of(columns, scheme.group_size)):
        nibbles[:, span] -= 8 if zeros is None else zeros[:, g, None].astype(np.int64)
    return nibbles


def linear(x, qweight, scales, zeros, bias, scheme, x_scale=None) -> np.ndarray:
    """Rules 4 and 5 up to the last rounding: float32 [M, N]."""
    columns = x.shape[1]
    qx, x_scales = quantize_activation(x, scheme.act_group_size) if x_scale is None else quantize_static(x, x_scale)
    qx, qw = qx.astype(np.int64), weight_integers(qweight, zeros, columns, scheme)
    w_size, x_size = scheme.group_size, scheme.act_group_size
    if w_size is None and x_size is None:
        out = (qx @ qw.T).astype(F) * (x_scales * scales.T)
    else:
        out = np.zeros((len(x), len(qw)), F)
        for span in groups_of(columns, min(size for size in (w_size, x_size) if size)):
            scale = F(1)
            if w_size:
                scale = scales[None, :, span.start // w_size]
            if x_size:
                x_scale = x_scales[:, span.start // x_size, None]
                scale = x_scale * scale if w_size else x_scale
            out = out + (qx[:, span] @ qw[:, span].T).astype(F) * scale
        if not w_size:
            out = out * scales.T
        if not x_size:
            out = out * x_scales
    if scheme.has_min:
        out = out + minima_product(qx, x_scales, zeros, scheme)
    return out if bias is None else out + bias.astype(F)


def minima_product(qx, x_scales, minima, scheme) -> np.ndarray:
    """Rule 16: float32 [M, N]."""
    w_size, x_size = scheme.group_size or qx.shape[1], scheme.act_group_size or qx.shape[1]
    out = np.zeros((len(qx), len(minima)), F)
    for span in groups_of(qx.shape[1], min(w_size, x_size)):
        sums = qx[:, span].sum(axis=1).astype(F) * x_scales[:, span.start // x_size]
        out = out + sums[:, None] * minima[None, :, span.start // w_size]
    return out


def int_grad_input(q_grad, grad_scales, qweight, scales, zeros, columns: int, scheme) -> np.ndarray:
    """Rule 6: float32 [M, K]."""
    integers = weight_integers(qweight, zeros, columns, scheme)
    if scheme.row_scaled:
        return (q_grad.astype(np.int64) @ integers).astype(F) * grad_scales[:, None]
    out = np.zeros((len(q_grad), columns), F)
    for g, span in enumerate(groups_of(columns, scheme.group_size)):
        weight = integers[:, span].astype(F) * scales[:, g, None]
        weight = weight + zeros[:, g, None] if scheme.has_min else weight
        for k in range(span.start, span.stop):
            column = np.ascontiguousarray(weight[:, k - span.start])
            column_scale = int8_group(column)[1]
            w8 = np.clip(np.rint(column * (F(1) / column_scale)), -127, 127).astype(np.int64)
            out[:, k] = (q_grad.astype(np.int64) @ w8).astype(F) * (grad_scales * column_scale)
    return out


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16: round half to even by integer arithmetic; NaN becomes 0x7fc0."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 on Python's integers: the four words of one block."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def quantize_rows_stochastic(
    x: np.ndarray, factors: np.ndarray | None, seed: int, rng_stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rule 8, value by value: int8 of x's shape and a scale for each row."""
    q, scales = np.zeros(x.shape, np.int8), np.zeros(len(x), F)
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    for r, row in enumerate(x if factors is None else x * factors):
        scales[r] = int8_group(np.ascontiguousarray(row))[1]
        top = np.uint32((row.view(np.uint32) & 0x7FFFFFFF).max()).view(F)
        if not np.isfinite(top) or top < TINY:
            continue
        for c, v in enumerate(row * (F(127) / top)):
            u = F(philox((c // 4, r, rng_stream, 0), key)[c % 4] >> 8) * F(2.0**-24)
            down = np.floor(v)
            q[r, c] = np.clip(down + F(u < F(v - down)), -127, 127)
    return q, scales
