"""Cross entropy of a head without its logits (docs/numerics.md, rule 7), for a part of the vocabulary at a time.

M rows, N classes, K features. Chunks of CHUNK classes share a scale of the gradient. Of each row and chunk, in arrays
[chunks, M]: maxima, the largest logit; sums, of exp(logit - maximum); totals, of the logits; picked, the target's logit
if the chunk has it, else 0; and grad_scales, of the quantized gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    LANES,
    exp_nonpositive,
    int8_parameters,
    load_integers,
    load_weight,
    magnitude_bits,
    requantized,
    round_up_or_down,
    sum_of_lanes,
    tile_of,
)

# No kernel is compiled anew for a number of rows or classes whose divisibility does not make its loads wider.
LOWEST = tl.constexpr(-3.4028234663852886e38)
RANGES = tl.constexpr(8)  # of the vocabulary that are summed apart
DITHER_STEP = tl.constexpr(0x9E3779B9)


@triton.jit
def row_factors_kernel(
    qweight,
    scales,
    zeros,
    out,
    N,
    K,
    row_bytes,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 out [N]: scales of an ungrouped weight, 0 for rows of zeros, whose scale of 1 would set all others."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        integers = load_integers(qweight, zeros, rows, first, (N, K, row_bytes), BITS, 0, BLOCK_K).to(tl.int32)
        largest = tl.maximum(largest, tl.where(columns[None, :] < K, tl.abs(integers), 0))
    scale = tl.load(scales + rows, mask=rows < N, other=0.0)
    tl.store(out + rows, tl.where(tl.max(largest, axis=1) > 0, scale, 0.0), mask=rows < N)


@triton.jit
def column_sums_kernel(
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
    BLOCK_K: tl.constexpr,
):
    """float64 out [chunks, K]: the sums of the columns of the dequantized weight, in order, over `chunk` rows each."""
    first = tl.program_id(0) * BLOCK_K
    begin = tl.program_id(1) * chunk
    total = tl.zeros((1, BLOCK_K), tl.float64)
    for row in range(begin, tl.minimum(N, begin + chunk)):
        rows = row + tl.arange(0, 1)
        value = load_weight(qweight, scales, zeros, rows, first, (N, K, row_bytes), BITS, GROUP, BLOCK_K)
        total = total + value.to(tl.float64)
    columns = first + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out + tl.program_id(1) * K + columns, total, mask=columns < K)


@triton.jit
def _capped(logit, CAP: tl.constexpr):
    """c * tanh(logit / c), or the logit itself for CAP 0."""
    if CAP > 0.0:
        cap = tl.full((1, 1), CAP, tl.float32)
        u = logit * tl.div_rn(tl.full((1, 1), 1.0, tl.float32), cap)
        z = u * u
        p = z * -5.70498872745e-3 + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        small = logit + logit * (z * p)
        t = exp_nonpositive(tl.abs(u) * -2.0)
        tanh = tl.div_rn(1.0 - t, 1.0 + t) * cap
        sign = u.to(tl.int32, bitcast=True) & -2147483648
        large = (tanh.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        logit = tl.where(tl.abs(u) < 0.625, small, large)
    return logit


@triton.jit
def _grad_logit(y, largest, factor, is_target, CAP: tl.constexpr):
    """The values to quantize: exp(y - largest) times the slope of the cap and the scale of the class, 0 at targets."""
    e = exp_nonpositive(y - largest)
    if CAP > 0.0:
        t = y * tl.div_rn(tl.full((1, 1), 1.0, tl.float32), tl.full((1, 1), CAP, tl.float32))
        slope = 1.0 - t * t
        e = tl.where(slope > 0.0, e * slope, 0.0)
    return tl.where(is_target, 0.0, e * factor)


@triton.jit(do_not_specialize=("M", "first"))
def softmax_chunk_kernel(
    logits,
    target,
    dither,
    row_factors,
    q,
    maxima,
    sums,
    totals,
    picked,
    grad_scales,
    M,
    width,
    first,
    CAP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The softmax of float32 logits [M, width] over each chunk, and int8 q [M, width], its gradient by them.

    The logits are those of the classes from `first`, the start of a chunk, on. dither None: no gradient.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * CHUNK
    end = tl.minimum(width, begin + CHUNK)
    start = rows.to(tl.int64)[:, None] * width
    inside = rows[:, None] < M
    goal = (tl.load(target + rows, mask=rows < M, other=-1) - first)[:, None]

    highest = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
    at_target = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for column in range(begin, end, BLOCK_N):
        columns = (column + tl.arange(0, BLOCK_N))[None, :]
        valid = inside & (columns < end)
        y = _capped(tl.load(logits + start + columns, mask=valid, other=0.0), CAP)
        highest = tl.where(valid & (y > highest), y, highest)  # which NaN never is
        at_target = tl.where(columns == goal, y, at_target)
    largest = tl.max(highest, axis=1)[:, None]

    exp_sums = tl.zeros((BLOCK_M, LANES), tl.float32)
    logit_sums = tl.zeros((BLOCK_M, LANES), tl.float32)
    for column in range(begin, end, LANES):
        columns = (column + tl.arange(0, LANES))[None, :]
        valid = inside & (columns < end)
        y = _capped(tl.load(logits + start + columns, mask=valid, other=0.0), CAP)
        logit_sums = logit_sums + tl.where(valid, y, 0.0)
        exp_sums = exp_sums + tl.where(valid, exp_nonpositive(y - largest), 0.0)
    at = tl.cast(first // CHUNK + tl.program_id(1), tl.int64) * M + rows
    tl.store(maxima + at, tl.max(highest, axis=1), mask=rows < M)
    tl.store(sums + at, sum_of_lanes(exp_sums), mask=rows < M)
    tl.store(totals + at, sum_of_lanes(logit_sums), mask=rows < M)
    has_target = (goal >= begin) & (goal < end)
    tl.store(picked + at, tl.sum(tl.where(has_target, at_target, 0.0), axis=1), mask=rows < M)

    if dither is not None:
        bits = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for column in range(begin, end, BLOCK_N):
            columns = (column + tl.arange(0, BLOCK_N))[None, :]
            valid = inside & (columns < end)
            y = _capped(tl.load(logits + start + columns, mask=valid, other=0.0), CAP)
            factor = _load_factors(row_factors, columns, first, end)
            value = _grad_logit(y, largest, factor, columns == goal, CAP)
            bits = tl.maximum(bits, tl.where(valid, magnitude_bits(value), 0))
        scale, inverse, usable = int8_parameters(tl.max(bits, axis=1))
        tl.store(grad_scales + at, scale, mask=rows < M)
        phase = tl.load(dither + rows, mask=rows < M, other=0).to(tl.uint32)[:, None]
        for column in range(begin, end, BLOCK_N):
            columns = (column + tl.arange(0, BLOCK_N))[None, :]
            valid = inside & (columns < end)
            y = _capped(tl.load(logits + start + columns, mask=valid, other=0.0), CAP)
            factor = _load_factors(row_factors, columns, first, end)
            value = _grad_logit(y, largest, factor, columns == goal, CAP)
            value = tl.where(usable[:, None], value, 0.0) * inverse[:, None]
            word = phase + (first + columns).to(tl.uint32) * DITHER_STEP
            uniform = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
            tl.store(q + start + columns, round_up_or_down(value, uniform), mask=valid)


@triton.jit
def _load_factors(row_factors, columns, first, end):
    """The scales of the classes [1, BLOCK_N], which the gradient is multiplied with; 1 for grouped weights (None)."""
    if row_factors is None:
        factors = 1.0
    else:
        factors = tl.load(row_factors + first + columns, mask=columns < end, other=0.0)
    return factors


@triton.jit
def _joined(before, part):
    """The larger of two maxima, and what each one's sums are multiplied with."""
    highest = tl.where(part > before, part, before)
    return highest, exp_nonpositive(before - highest), exp_nonpositive(part - highest)


@triton.jit(do_not_specialize=("M", "first"))
def loss_product_kernel(
    q,
    maxima,
    grad_scales,
    qweight,
    scales,
    zeros,
    column_scales,
    state,
    out,
    M,
    N,
    K,
    row_bytes,
    first,
    BITS: tl.constexpr,
    W_GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
):
    """out [M, K]: `state`, the product of the earlier ranges (None: the first), joined with that of a range.

    q [M, N] and the weight [N, K] are those of the range, whose first chunk has number `first`; column_scales
    [chunks, K] those of the whole vocabulary, for weights that are requantized. The sums of each chunk are exact.
    """
    tile_m, tile_k = tile_of(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, SWATH)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tile_k * BLOCK_K
    columns = begin + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for chunk in range(0, tl.cdiv(N, CHUNK)):
        if column_scales is not None:
            column_at = tl.cast(first + chunk, tl.int64) * K + columns
            column_scale = tl.load(column_scales + column_at, mask=columns < K, other=1.0)
            inverse = tl.div_rn(1.0, column_scale)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
        for start in range(chunk * CHUNK, tl.minimum(N, (chunk + 1) * CHUNK), BLOCK_N):
            ns = start + tl.arange(0, BLOCK_N)
            grad_at = rows.to(tl.int64)[:, None] * N + ns[None, :]
            grad = tl.load(q + grad_at, mask=(rows[:, None] < M) & (ns[None, :] < N), other=0)
            if column_scales is None:
                w = load_integers(qweight, zeros, ns, begin, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K)
            else:
                w = requantized(
                    load_weight(qweight, scales, zeros, ns, begin, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K), inverse
                )
            acc = tl.dot(grad, w, acc, out_dtype=tl.int32)
        at = tl.cast(first + chunk, tl.int64) * M + rows
        maximum = tl.load(maxima + at, mask=rows < M, other=LOWEST)
        largest, before, own = _joined(largest, maximum)
        scale = (tl.load(grad_scales + at, mask=rows < M, other=0.0) * own)[:, None]
        if column_scales is not None:
            scale = scale * column_scale[None, :]
        total = total * before[:, None] + acc.to(tl.float32) * scale
    earlier = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for chunk in range(0, first):
        maximum = tl.load(maxima + tl.cast(chunk, tl.int64) * M + rows, mask=rows < M, other=LOWEST)
        earlier = tl.where(maximum > earlier, maximum, earlier)
    _, before, own = _joined(earlier, largest)
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    joined = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if state is not None:
        joined = tl.load(state + at, mask=inside, other=0.0)
    joined = joined * before[:, None] + total * own[:, None]
    tl.store(out + at, joined, mask=inside)


@triton.jit
def _natural_log(x):
    """log of float64 x >= 0 in operations that are each rounded: 2^e * f, log f = 2 artanh((f - 1) / (f + 1))."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - 1022
    f = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)  # in [0.5, 1)
    low = f < 0.70710678118654752
    f = tl.where(low, f * 2.0, f)
    s = (f - 1.0) / (f + 1.0)
    series = s * 0.0
    for i in tl.static_range(0, 10):
        series = series * (s * s) + tl.full((1,), 1.0 / (19 - 2 * i), tl.float64)
    e = (exponent - low.to(tl.int64)).to(tl.float64)
    log = 2.0 * (s * series) + e * tl.full((1,), 0.69314718055994531, tl.float64)
    log = tl.where(x == 0.0, float("-inf"), log)
    return tl.where((x > 0.0) & (x < float("inf")) | (x == 0.0), log, x)  # Inf and NaN


@triton.jit(do_not_specialize=("M", "N", "chunks"))
def loss_rows_kernel(
    maxima,
    sums,
    totals,
    picked,
    target,
    loss,
    lse,
    factors,
    coefficients,
    M,
    N,
    chunks,
    CAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss and lse [M]; what the gradient's product and the target's row of the weight are multiplied with, each [M].

    A target that is no class makes them NaN.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    logits = tl.zeros((BLOCK,), tl.float64)
    logit = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, RANGES):
        part_largest = tl.full((BLOCK,), LOWEST, tl.float32)
        part_total = tl.zeros((BLOCK,), tl.float32)
        part_logits = tl.zeros((BLOCK,), tl.float64)
        for chunk in range(part * chunks // RANGES, (part + 1) * chunks // RANGES):
            at = tl.cast(chunk, tl.int64) * M + rows
            part_largest, before, own = _joined(part_largest, tl.load(maxima + at, mask=rows < M, other=0.0))
            part_total = part_total * before + tl.load(sums + at, mask=rows < M, other=0.0) * own
            part_logits = part_logits + tl.load(totals + at, mask=rows < M, other=0.0).to(tl.float64)
            logit = logit + tl.load(picked + at, mask=rows < M, other=0.0)
        largest, before, own = _joined(largest, part_largest)
        total = total * before + part_total * own
        logits = logits + part_logits
    goal = tl.load(target + rows, mask=rows < M, other=0)
    log_sum = largest.to(tl.float64) + _natural_log(total.to(tl.float64))
    share = tl.full((1,), SMOOTHING, tl.float64)
    weight = tl.full((1,), Z_LOSS, tl.float64)
    expected = (1.0 - share) * logit.to(tl.float64)
    if SMOOTHING != 0.0:
        expected = expected + share * (logits / tl.cast(N, tl.float64))
    result = ((log_sum - expected) + weight * (log_sum * log_sum)).to(tl.float32)
    wrong = (goal < 0) | (goal >= N)
    result = tl.where(wrong, float("nan"), result)
    ignored = goal == IGNORE
    tl.store(loss + rows, tl.where(ignored, 0.0, result), mask=rows < M)
    tl.store(lse + rows, tl.where(ignored, 0.0, log_sum.to(tl.float32)), mask=rows < M)
    if factors is not None:
        slope = 1.0 + (2.0 * weight) * log_sum
        probability = exp_nonpositive(logit - largest).to(tl.float64)
        at_target = slope * (probability / total.to(tl.float64)) - (1.0 - share)
        if CAP != 0.0:
            t = logit.to(tl.float64) / tl.full((1,), CAP, tl.float64)
            at_target = at_target * (1.0 - t * t)
        factor = (slope / total.to(tl.float64)).to(tl.float32)
        tl.store(factors + rows, tl.where(wrong, float("nan"), factor), mask=rows < M)
        tl.store(coefficients + rows, at_target.to(tl.float32), mask=rows < M)


@triton.jit(do_not_specialize=("M", "N", "chunks"))
def loss_gradient_kernel(
    product,
    factors,
    coefficients,
    target,
    qweight,
    scales,
    zeros,
    column_sums,
    out,
    M,
    N,
    K,
    row_bytes,
    chunks,
    BITS: tl.constexpr,
    W_GROUP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 out [M, K]: the product times its factor, plus the row of the target times its coefficient.

    column_sums, float64 [chunks, K], are for label smoothing; else None.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    goal = tl.load(target + rows, mask=rows < M, other=-1)
    classes = tl.where((goal >= 0) & (goal < N), goal, N).to(tl.int32)  # beyond the weight's rows nothing is read
    weight = load_weight(qweight, scales, zeros, classes, first, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K)
    factor = tl.load(factors + rows, mask=rows < M, other=0.0)[:, None]
    coefficient = tl.load(coefficients + rows, mask=rows < M, other=0.0)[:, None]
    result = tl.load(product + at, mask=inside, other=0.0) * factor + weight * coefficient
    if column_sums is not None:
        total = tl.zeros((1, BLOCK_K), tl.float64)
        for chunk in range(0, chunks):
            here = tl.cast(chunk, tl.int64) * K + columns[None, :]
            total = total + tl.load(column_sums + here, mask=columns[None, :] < K, other=0.0)
        share = tl.full((1, 1), SMOOTHING, tl.float64) / tl.cast(N, tl.float64)
        result = (result.to(tl.float64) - share * total).to(tl.float32)
    tl.store(out + at, tl.where(goal[:, None] == IGNORE, 0.0, result), mask=inside)
