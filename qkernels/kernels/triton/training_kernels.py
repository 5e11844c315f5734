"""Kernels of training: gradients rounded at random, activations with one scale a row, weights quantized each step."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    INF_BITS,
    LANES,
    TINY_BITS,
    int8_parameters,
    magnitude_bits,
    round_half_even,
    round_up_or_down,
    sum_of_lanes,
    uniforms,
)

# Numbers that differ in each call: specialized for none of them, as triton would for multiples of 16.
RANDOM = ("seed_low", "seed_high", "rng_stream")


@triton.jit(do_not_specialize=RANDOM)
def random_rows_kernel(
    x, factors, q, scales, N, stride_x, seed_low, seed_high, rng_stream, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """Rule 8, one row a program: int8 q [M, N] and float32 scales [M] of x [M, N] times the factors [N], if any."""
    row = tl.program_id(0) + tl.arange(0, 1)
    start = row.to(tl.int64)[:, None]
    largest = tl.zeros((1, BLOCK), tl.int32)
    for block in range(0, BLOCKS):
        columns = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        value = tl.load(x + start * stride_x + columns, mask=columns < N, other=0.0).to(tl.float32)
        if factors is not None:
            value = value * tl.load(factors + columns, mask=columns < N, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(value))
    scale, inverse, usable = int8_parameters(tl.max(largest, axis=1))
    tl.store(scales + row, scale)
    for block in range(0, BLOCKS):
        columns = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        value = tl.load(x + start * stride_x + columns, mask=columns < N, other=0.0).to(tl.float32)
        if factors is not None:
            value = value * tl.load(factors + columns, mask=columns < N, other=0.0)
        value = tl.where(usable[:, None], value, 0.0) * inverse[:, None]
        uniform = uniforms(row, block * BLOCK, seed_low, seed_high, rng_stream, BLOCK)
        tl.store(q + start * N + columns, round_up_or_down(value, uniform), mask=columns < N)


@triton.jit
def _load_scaled_rows(x, factors, rows, columns, M, N, stride_x):
    """float32 tile of x [M, N] times the factors [M] of its rows, if any; 0 beyond the shape."""
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    value = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if factors is not None:
        value = value * tl.load(factors + rows, mask=rows < M, other=0.0)[:, None]
    return value


@triton.jit
def column_ranges_kernel(
    x, factors, bits, M, N, stride_x, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """int32 bits [slices, N]: of the largest magnitude of each column of x, in slices of ROWS rows."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * ROWS
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(begin, tl.minimum(M, begin + ROWS), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        value = _load_scaled_rows(x, factors, rows, columns, M, N, stride_x)
        largest = tl.maximum(largest, magnitude_bits(value))
    at = tl.program_id(1).to(tl.int64) * N + columns
    tl.store(bits + at, tl.max(largest, axis=0), mask=columns < N)


@triton.jit(do_not_specialize=RANDOM)
def random_columns_kernel(
    x,
    factors,
    bits,
    q,
    scales,
    M,
    N,
    stride_x,
    slices,
    seed_low,
    seed_high,
    rng_stream,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rule 8 on columns, given their ranges: int8 q [N, M] and float32 scales [N] of x [M, N]."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    largest = tl.zeros((BLOCK_N,), tl.int32)
    for part in range(0, slices):
        largest = tl.maximum(largest, tl.load(bits + tl.cast(part, tl.int64) * N + columns, mask=columns < N, other=0))
    scale, inverse, usable = int8_parameters(largest)
    if tl.program_id(1) == 0:
        tl.store(scales + columns, scale, mask=columns < N)
    value = _load_scaled_rows(x, factors, rows, columns, M, N, stride_x)
    value = tl.where(usable[None, :], value, 0.0) * inverse[None, :]
    uniform = uniforms(rows, tl.program_id(0) * BLOCK_N, seed_low, seed_high, rng_stream, BLOCK_N)
    at = columns.to(tl.int64)[:, None] * M + rows[None, :]
    tl.store(q + at, tl.trans(round_up_or_down(value, uniform)), mask=(columns[:, None] < N) & (rows[None, :] < M))


@triton.jit
def merge_groups_kernel(q, scales, out, row_scales, K, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rule 9, one row a program: q [M, K] with a scale for each group made anew for one float32 scale a row."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(K, GROUP)
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        integers = tl.load(q + row * K + columns, mask=columns < K, other=0).to(tl.int32)
        bits = magnitude_bits(tl.load(scales + row * groups + group, mask=group < groups, other=0.0))
        counts = (tl.max(tl.abs(integers), axis=1) > 0) | (bits > INF_BITS)
        largest = tl.maximum(largest, tl.where(counts, bits, 0))
    bits = tl.max(largest)
    row_scale = tl.where(bits == 0, 0x3F800000, bits).to(tl.float32, bitcast=True)
    tl.store(row_scales + row, row_scale)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        integers = tl.load(q + row * K + columns, mask=columns < K, other=0).to(tl.float32)
        ratio = tl.div_rn(tl.load(scales + row * groups + group, mask=group < groups, other=0.0), row_scale)
        merged = round_half_even(integers * tl.where(bits > INF_BITS, 0.0, ratio)[:, None])
        tl.store(out + row * K + columns, merged.to(tl.int8), mask=columns < K)


@triton.jit
def int4_parameters_kernel(
    weight,
    scales,
    inverses,
    zeros,
    N,
    K,
    stride,
    size,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Rule 3: scale, inverse and (asymmetric: zeros is not None) zero point of each group of `size` columns.

    A program works on GROUPS of them, in BLOCKS steps. The scale of a group that holds Inf or NaN, or whose range
    overflows, is NaN.
    """
    index = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    groups = tl.cdiv(K, size)
    row = index // groups
    begin = ((index % groups) * size)[:, None]
    low = tl.zeros((GROUPS, BLOCK), tl.float32)  # a zero never changes what rule 3 makes of a range
    high = tl.zeros((GROUPS, BLOCK), tl.float32)
    bits = tl.zeros((GROUPS, BLOCK), tl.int32)
    for block in range(0, BLOCKS):
        place = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = (row[:, None] < N) & (place < size) & (begin + place < K)
        value = tl.load(weight + row[:, None] * stride + begin + place, mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
        bits = tl.maximum(bits, magnitude_bits(value))
    least = tl.min(low, axis=1)
    most = tl.max(high, axis=1)
    if zeros is None:
        span = tl.where(-least > most, least, most)
        levels = -8.0
    else:
        span = most - least
        levels = 15.0
    largest = tl.maximum(tl.max(bits, axis=1), magnitude_bits(span))
    usable = (magnitude_bits(span) >= TINY_BITS) & (largest < INF_BITS)
    safe = tl.where(usable, span, 1.0)
    number = tl.zeros((GROUPS,), tl.float32) + levels
    inverse = tl.where(usable, tl.div_rn(number, safe), 0.0)
    scale = tl.where(usable, tl.div_rn(safe, number), tl.where(largest < INF_BITS, 1.0, float("nan")))
    tl.store(scales + index, scale, mask=row < N)
    tl.store(inverses + index, inverse, mask=row < N)
    if zeros is not None:
        zero = tl.minimum(tl.maximum(round_half_even(-least * inverse), 0.0), 15.0)
        tl.store(zeros + index, zero.to(tl.uint8), mask=row < N)


@triton.jit
def _integers(weight, inverses, zeros, rows, columns, shape, GROUP: tl.constexpr):
    """float32 tile: a weight of `shape` (N, K, row stride) times inverse scales, rounded, before it is clamped; plus
    zero points, if any. What lies beyond 2^22 comes out inexact, but on the same side of any clamp.
    """
    N = shape[0]
    K = shape[1]
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    at = rows.to(tl.int64)[:, None] * shape[2] + columns[None, :]
    value = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if GROUP == 0:
        group = rows[:, None] + 0 * columns[None, :]
    else:
        group = rows[:, None] * tl.cdiv(K, GROUP) + columns[None, :] // GROUP
    integers = round_half_even(value * tl.load(inverses + group, mask=inside, other=0.0))
    if zeros is not None:
        integers = integers + tl.load(zeros + group, mask=inside, other=0).to(tl.float32)
    return integers


@triton.jit
def _int4_integers(weight, inverses, zeros, rows, columns, shape, GROUP: tl.constexpr):
    """`_integers` as they are stored, 0..15 but for the clamp: without zero points 8 is added."""
    integers = _integers(weight, inverses, zeros, rows, columns, shape, GROUP)
    if zeros is None:
        integers = integers + 8.0
    return integers


@triton.jit
def int4_pack_kernel(
    weight,
    inverses,
    zeros,
    out,
    N,
    K,
    stride,
    row_bytes,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """uint8 out [N, row_bytes]: two nibbles a byte, the even column low; the last one of an odd row is 0."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    integers = _int4_integers(weight, inverses, zeros, rows, columns, (N, K, stride), GROUP)
    clamped = tl.minimum(tl.maximum(integers, 0.0), 15.0)
    nibbles = tl.where(columns[None, :] < K, clamped, 0.0).to(tl.uint8)
    low, high = tl.split(tl.reshape(nibbles, (BLOCK_N, BLOCK_K // 2, 2)))
    places = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    at = rows.to(tl.int64)[:, None] * row_bytes + places[None, :]
    tl.store(out + at, low | (high << 4), mask=(rows[:, None] < N) & (places[None, :] < row_bytes))


@triton.jit
def int4_mask_kernel(
    grad,
    weight,
    inverses,
    zeros,
    out,
    N,
    K,
    stride_grad,
    stride,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [N, K]: grad where the integer of the weight needs no clamping, 0 elsewhere."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    integers = _int4_integers(weight, inverses, zeros, rows, columns, (N, K, stride), GROUP)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    start = rows.to(tl.int64)[:, None]
    value = tl.load(grad + start * stride_grad + columns[None, :], mask=inside, other=0.0)
    kept = tl.where((integers >= 0.0) & (integers <= 15.0), value, 0.0)
    tl.store(out + start * K + columns[None, :], kept, mask=inside)


@triton.jit
def invert_scales_kernel(scales, out, COUNT, BLOCK: tl.constexpr):
    """Rule 11: float32 out [COUNT], what a weight is multiplied with for its scale to be the given one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scales + at, mask=at < COUNT, other=0.0)
    usable = tl.abs(scale) >= 1.262177448353619e-29  # 2^-96
    one = tl.full((BLOCK,), 1.0, tl.float32)
    tl.store(out + at, tl.where(usable, tl.div_rn(one, tl.where(usable, scale, 1.0)), 0.0), mask=at < COUNT)


@triton.jit
def int8_clamp_kernel(
    weight, inverses, out, N, K, stride, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rule 11: int8 out [N, K] of a weight with inverse scales [N, groups]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    integers = _integers(weight, inverses, None, rows, columns, (N, K, stride), GROUP)
    clamped = tl.minimum(tl.maximum(integers, -127.0), 127.0).to(tl.int8)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    tl.store(out + rows.to(tl.int64)[:, None] * K + columns[None, :], clamped, mask=inside)


@triton.jit(do_not_specialize=("factor_bits", "last_factor_bits"))
def scale_gradient_kernel(
    grad,
    weight,
    inverses,
    out,
    grad_scales,
    N,
    K,
    stride_grad,
    stride,
    size,
    factor_bits,
    last_factor_bits,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rule 11 for GROUPS groups of `size` columns: out [N, K], grad where the integer of the weight needs no clamping,
    and float32 grad_scales [N, groups]. The bits of a factor are float32's; the last group of a row has its own.
    """
    index = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    groups = tl.cdiv(K, size)
    row = index // groups
    begin = ((index % groups) * size)[:, None]
    start = row[:, None]
    inverse = tl.load(inverses + index, mask=row < N, other=0.0)[:, None]
    lanes = tl.zeros((GROUPS, LANES), tl.float32)
    for first in range(0, size, LANES):
        place = (first + tl.arange(0, LANES))[None, :]
        columns = begin + place
        inside = (start < N) & (place < size) & (columns < K)
        value = tl.load(weight + start * stride + columns, mask=inside, other=0.0).to(tl.float32) * inverse
        slope = tl.load(grad + start * stride_grad + columns, mask=inside, other=0.0)
        # Clamped to one beyond the integers, which keeps NaN, so that `round_half_even` holds.
        near = tl.where(value > HIGH + 1, HIGH + 1.0, tl.where(value < LOW - 1, LOW - 1.0, value))
        integer = round_half_even(near)
        kept = (integer >= LOW) & (integer <= HIGH)
        clamped = tl.where(integer > HIGH, HIGH + 0.0, tl.where(integer < LOW, LOW + 0.0, integer))
        lanes = lanes + slope.to(tl.float32) * tl.where(kept, clamped - value, clamped)
        tl.store(out + start * K + columns, tl.where(kept, slope, 0.0), mask=inside)
    last = index % groups == groups - 1
    factor = tl.where(last, last_factor_bits, factor_bits).to(tl.float32, bitcast=True)
    tl.store(grad_scales + index, sum_of_lanes(lanes) * factor, mask=row < N)
