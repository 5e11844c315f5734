"""What the kernels share: rounding, loading weights of any format, and storing results (docs/numerics.md)."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding it to |v| < 2^22 leaves no fraction bits, and float32 addition rounds half to even.
ROUNDER = tl.constexpr(12582912.0)
INF_BITS = tl.constexpr(0x7F800000)
TINY_BITS = tl.constexpr(31 << 23)  # of 2^-96


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
    K (0: one group per row), zeros its zero points or None. What lies beyond the shape is any number from -15 to 127.
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
    """float32 [rows, COLUMNS]: `load_integers` times the scales, each product rounded once; 0 beyond the shape."""
    N = shape[0]
    K = shape[1]
    integers = load_integers(qweight, zeros, rows, first, shape, BITS, GROUP, COLUMNS)
    columns = first + tl.arange(0, COLUMNS)
    if GROUP == 0:
        scale = tl.load(scales + rows, mask=rows < N, other=0.0)[:, None]
    else:
        at = rows[:, None] * tl.cdiv(K, GROUP) + columns[None, :] // GROUP
        scale = tl.load(scales + at, mask=(rows[:, None] < N) & (columns[None, :] < K), other=0.0)
    return integers.to(tl.float32) * scale


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWATH: tl.constexpr):
    """Row and column of a program's tile: SWATH rows of tiles are walked column by column, for reuse in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    swath = program // (SWATH * tiles_n)
    height = tl.minimum(tiles_m - swath * SWATH, SWATH)
    inner = program % (SWATH * tiles_n)
    return swath * SWATH + inner % height, inner // height
