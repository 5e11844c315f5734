"""Functions that the kernels share: rounding, loading weights of any format, and storing results (docs/numerics.md)."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding it to |v| < 2^22 leaves no fraction bits, and float32 addition rounds half to even.
ROUNDER = tl.constexpr(12582912.0)
INF_BITS = tl.constexpr(0x7F800000)
TINY_BITS = tl.constexpr(31 << 23)  # of 2^-96
LANES = tl.constexpr(16)  # of sums whose order is given (rules 7 and 11)


@triton.jit
def round_half_even(v):
    """The nearest integer of float32 |v| < 2^22, as a float."""
    return (v + ROUNDER) - ROUNDER


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, whose order as integers is that of the magnitudes, Inf and NaN at the top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def int8_parameters(bits):
    """Rule 1: scale, inverse and whether the range is usable, from the bits of the largest magnitude."""
    usable = (bits < INF_BITS) & (bits >= TINY_BITS)
    safe = tl.where(usable, bits, 0x3F800000).to(tl.float32, bitcast=True)
    scale = tl.where(usable, tl.div_rn(safe, 127.0), tl.where(bits < INF_BITS, 1.0, float("nan")))
    inverse = tl.where(usable, tl.div_rn(127.0, safe), 0.0)
    return scale, inverse, usable


@triton.jit
def inverse_of(scale):
    """Rule 11: what values are multiplied with to be rounded to a given scale; 0 where that counts as 0."""
    usable = tl.abs(scale) >= 2.0**-96
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def floor_of(v):
    """floor(v) of float32 |v| < 2^22."""
    nearest = round_half_even(v)
    return tl.where(nearest > v, nearest - 1.0, nearest)


@triton.jit
def round_up_or_down(v, uniform):
    """Rule 8: int8 of float32 v, |v| < 128, rounded up where its fraction exceeds `uniform`."""
    floor = floor_of(v)
    q = tl.where(uniform < v - floor, floor + 1.0, floor)
    return tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int8)


@triton.jit
def uniforms(rows, first, seed_low, seed_high, rng_stream, COLUMNS: tl.constexpr):
    """Rule 8: float32 [rows, COLUMNS] in [0, 1) from column `first` (a multiple of 4) on, multiples of 2^-24."""
    blocks = first // 4 + tl.arange(0, COLUMNS // 4)
    zero = tl.zeros((rows.shape[0], COLUMNS // 4), tl.int32)
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    w0, w1, w2, w3 = tl.philox(seed, zero + blocks[None, :], zero + rows.to(tl.int32)[:, None], zero + rng_stream, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], COLUMNS))
    return (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def exp_nonpositive(x):
    """exp of float32 x <= 0 as rule 7 computes it: within 2^-22, 0 below -87, NaN kept."""
    shifted = x * 1.44269504088896341 + ROUNDER
    n = shifted - ROUNDER
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = (shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)
    return tl.where(x < -87.0, 0.0, ((r * r * p + r) + 1.0) * power.to(tl.float32, bitcast=True))


@triton.jit
def sum_of_lanes(lanes):
    """[rows] from [rows, LANES], by halves: each reduction below is of two numbers, whose order does not matter."""
    half = tl.sum(tl.reshape(lanes, (lanes.shape[0], 2, 8)), axis=1)
    half = tl.sum(tl.reshape(half, (lanes.shape[0], 2, 4)), axis=1)
    half = tl.sum(tl.reshape(half, (lanes.shape[0], 2, 2)), axis=1)
    return tl.sum(half, axis=1)


@triton.jit
def store_float(pointers, value, mask):
    """Rule 5: round float32 once, half to even, to what the pointers point to. Integers do it for bfloat16."""
    if pointers.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > INF_BITS
        half = tl.where(is_nan, (bits >> 16) | 0x40, rounded).to(tl.uint16)
        tl.store(pointers, half.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_integers(
    qweight,
    zeros,
    rows,
    first,
    shape,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """int8 [rows, COLUMNS] from column `first` (a multiple of COLUMNS) on: the integers a weight is multiplied as.

    qweight is the canonical storage of a weight of `shape` = (N, K, bytes of a stored row), GROUP its group size along
    K (0: one group per row), zeros its zero points, its minima (float32) or None. What lies beyond the shape is any
    number from -15 to 127.
    """
    N = shape[0]
    K = shape[1]
    inside = rows[:, None] < N
    columns = first + tl.arange(0, COLUMNS)
    start = rows.to(tl.int64)[:, None] * shape[2]
    if BITS == 8:
        result = tl.load(qweight + start + columns[None, :], mask=inside & (columns[None, :] < K), other=0)
    else:
        places = first // 2 + tl.arange(0, COLUMNS // 2)
        pairs = tl.load(qweight + start + places[None, :], mask=inside & (places[None, :] < shape[2]), other=0)
        nibbles = tl.reshape(tl.join(pairs & 15, pairs >> 4), (rows.shape[0], COLUMNS)).to(tl.int8)
        if zeros is None:
            result = nibbles - 8
        elif zeros.dtype.element_ty == tl.float32:
            result = nibbles
        elif GROUP == 0:
            result = nibbles - tl.load(zeros + rows, mask=rows < N, other=0).to(tl.int8)[:, None]
        elif COLUMNS <= GROUP:
            at = rows * tl.cdiv(K, GROUP) + first // GROUP
            result = nibbles - tl.load(zeros + at, mask=rows < N, other=0).to(tl.int8)[:, None]
        else:
            at = rows[:, None] * tl.cdiv(K, GROUP) + columns[None, :] // GROUP
            result = nibbles - tl.load(zeros + at, mask=inside & (columns[None, :] < K), other=0).to(tl.int8)
    return result


@triton.jit
def load_weight(
    qweight,
    scales,
    zeros,
    rows,
    first,
    shape,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """float32 [rows, COLUMNS]: `load_integers` times the scales, plus the minima if there are any, each product and sum
    rounded once; 0 beyond the shape.
    """
    N = shape[0]
    K = shape[1]
    integers = load_integers(qweight, zeros, rows, first, shape, BITS, GROUP, COLUMNS)
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    if GROUP == 0:
        at = rows[:, None]
        there = rows[:, None] < N
    else:
        at = rows[:, None] * tl.cdiv(K, GROUP) + columns[None, :] // GROUP
        there = inside
    value = integers.to(tl.float32) * tl.load(scales + at, mask=there, other=0.0)
    if zeros is not None:
        if zeros.dtype.element_ty == tl.float32:
            value = tl.where(inside, value + tl.load(zeros + at, mask=there, other=0.0), 0.0)
    return value


@triton.jit
def requantized(weight, inverse):
    """Rule 6: int8 of a dequantized weight [rows, columns], for the inverse scales of its columns."""
    scaled = weight * inverse[None, :]
    scaled = tl.where(scaled < 127.0, scaled, 127.0)
    return round_half_even(tl.where(scaled > -127.0, scaled, -127.0)).to(tl.int8)


@triton.jit
def tiled_rows(M, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many rows the tiles of M rows cover, for `tile_of`."""
    if EXPERTS == 0:
        return M
    else:
        return (M // BLOCK + experts + 1) * BLOCK


@triton.jit
def rows_of_expert(tile, offsets, M, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """The expert of a tile of BLOCK rows (`experts`: none of them), its rows, and which of these there are.

    The tiles of expert e are those from `begin // BLOCK + e` on, which are enough: from `begin` to `end` there are at
    most `end // BLOCK - begin // BLOCK + 1` of them. EXPERTS is a power of two above `experts`.
    """
    every = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + every, mask=every < experts, other=M)
    ends = tl.minimum(tl.maximum(ends, 0), M)
    expert = tl.sum((ends // BLOCK + every + 1 <= tile).to(tl.int32))
    begin = tl.sum(tl.where(every == expert - 1, ends, 0))
    end = tl.sum(tl.where(every == expert, ends, 0))
    rows = begin + (tile - begin // BLOCK - expert) * BLOCK + tl.arange(0, BLOCK)
    return expert, rows, (rows >= begin) & (rows < end)


@triton.jit
def source_rows(rows, inside, index, sources):
    """The row of x, of `sources` rows, that each row multiplies; one that x has not is taken for the first."""
    if index is None:
        return rows
    else:
        found = tl.load(index + rows, mask=inside, other=0)
        return tl.where((found >= 0) & (found < sources), found, 0)


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWATH: tl.constexpr):
    """Row and column of a program's tile: SWATH rows of tiles are walked column by column, for reuse in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    swath = program // (SWATH * tiles_n)
    height = tl.minimum(tiles_m - swath * SWATH, SWATH)
    inner = program % (SWATH * tiles_n)
    return swath * SWATH + inner % height, inner // height
