"""Kernels that touch each element once: quantize activations, dequantize a weight, scales of its columns."""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import INF_BITS, int8_parameters, inverse_of, load_weight, magnitude_bits, round_half_even


@triton.jit
def quantize_rows_kernel(x, q, scales, K, stride_x, BLOCK: tl.constexpr):
    """Rules 1 and 2, one row a program: int8 q [M, K] and float32 scales [M] of x [M, K] with row stride `stride_x`."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_x + columns, mask=columns < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(value))
    scale, inverse, usable = int8_parameters(tl.max(largest))
    tl.store(scales + row, scale)
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_x + columns, mask=columns < K, other=0.0).to(tl.float32)
        # |value * inverse| <= 127 * (1 + 2^-24)^2, so that the clamp of rule 2 never acts.
        rounded = round_half_even(tl.where(usable, value, 0.0) * inverse)
        tl.store(q + row * K + columns, rounded.to(tl.int8), mask=columns < K)


@triton.jit
def quantize_rows_static_kernel(x, x_scale, q, scales, K, stride_x, BLOCK: tl.constexpr):
    """Rule 13, one row a program: int8 q [M, K] and float32 scales [M] of x [M, K] with the scale x_scale [1]."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(x_scale)
    inverse = inverse_of(scale)
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_x + columns, mask=columns < K, other=0.0).to(tl.float32)
        bits = magnitude_bits(value)
        largest = tl.maximum(largest, bits)
        scaled = tl.where(bits < INF_BITS, value, 0.0) * inverse
        rounded = round_half_even(tl.minimum(tl.maximum(scaled, -127.0), 127.0))
        tl.store(q + row * K + columns, rounded.to(tl.int8), mask=columns < K)
    broken = tl.max(largest) >= INF_BITS
    tl.store(scales + row, tl.where(broken, float("nan"), scale))
    cleared = tl.where(broken, K, 0)
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(q + row * K + columns, tl.zeros((BLOCK,), tl.int8), mask=columns < cleared)


@triton.jit
def quantize_groups_kernel(x, q, scales, M, K, stride_x, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rules 1 and 2 on groups of GROUP columns, BLOCK of them a program: scales are [M, ceil(K / GROUP)]."""
    groups = tl.cdiv(K, GROUP)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = index // groups
    columns = (index % groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (row[:, None] < M) & (columns < K)
    value = tl.load(x + row[:, None] * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    scale, inverse, usable = int8_parameters(tl.max(magnitude_bits(value), axis=1))
    rounded = round_half_even(tl.where(usable[:, None], value, 0.0) * inverse[:, None])
    tl.store(q + row[:, None] * K + columns, rounded.to(tl.int8), mask=inside)
    tl.store(scales + index, scale, mask=row < M)


@triton.jit
def dequantize_weight_kernel(
    qweight,
    scales,
    zeros,
    out,
    N,
    K,
    row_bytes,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 out [N, K]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    value = load_weight(qweight, scales, zeros, rows, first, (N, K, row_bytes), BITS, GROUP, BLOCK_K)
    columns = first + tl.arange(0, BLOCK_K)
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(out + at, value, mask=(rows[:, None] < N) & (columns[None, :] < K))


@triton.jit
def column_scales_kernel(
    qweight,
    scales,
    zeros,
    out,
    N,
    K,
    row_bytes,
    chunk,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 out [chunks, K]: rule 1 on each column of the dequantized weight, for `chunk` rows of it each.

    `chunk` is a multiple of BLOCK_N unless there is but one.
    """
    first = tl.program_id(0) * BLOCK_K
    begin = tl.program_id(1) * chunk
    largest = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for row in range(begin, tl.minimum(N, begin + chunk), BLOCK_N):
        rows = row + tl.arange(0, BLOCK_N)
        value = load_weight(qweight, scales, zeros, rows, first, (N, K, row_bytes), BITS, GROUP, BLOCK_K)
        inside = tl.where(rows[:, None] < N, value, 0.0)
        largest = tl.maximum(largest, magnitude_bits(inside))
    scale = int8_parameters(tl.max(largest, axis=0))[0]
    columns = first + tl.arange(0, BLOCK_K)
    tl.store(out + tl.program_id(1) * K + columns, scale, mask=columns < K)


@triton.jit
def group_sums_kernel(
    q,
    scales,
    out,
    M,
    K,
    GROUP: tl.constexpr,
    A_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rule 16: float32 out [M, ceil(K / GROUP)] of the integers and scales of x: the sum of each group times its scale.

    GROUP 0: a row is a group, whose sum is made in steps of BLOCK; otherwise BLOCK is GROUP.
    """
    groups = tl.cdiv(K, GROUP) if GROUP > 0 else 1
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = index // groups
    begin = index % groups * BLOCK
    end = K
    if GROUP > 0:
        end = BLOCK
    total = tl.zeros((ROWS,), tl.int32)
    for step in range(0, end, BLOCK):
        columns = begin[:, None] + step + tl.arange(0, BLOCK)[None, :]
        value = tl.load(q + row[:, None] * K + columns, mask=(row[:, None] < M) & (columns < K), other=0)
        total += tl.sum(value.to(tl.int32), axis=1)
    at = row
    if A_GROUP > 0:
        at = row * tl.cdiv(K, A_GROUP) + begin // A_GROUP
    scale = tl.load(scales + at, mask=row < M, other=0.0)
    tl.store(out + index, total.to(tl.float32) * scale, mask=row < M)
