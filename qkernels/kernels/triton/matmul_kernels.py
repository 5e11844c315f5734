"""Matrix products with fused epilogues: the forward of every scheme and both gradients.

Names: x [M, K], weight [N, K] in the canonical storage, of row_bytes bytes a row, out [M, N]. BITS is 8 or 4; W_GROUP
and A_GROUP are the group sizes of weight and activations, 0 for one group per row. Where there are groups, BLOCK_K is
the finer one for integers, and divides it for floats, so that a tile of the loop lies in one group of each. The least
depth of an integer product on tensor cores is 32: a tile holds two groups of 16, and is multiplied once for each.

EXPERTS is 0, or a power of two above the number of fused experts. Then the rows are sorted by expert, those of expert e
end before row offsets[e], the weights [experts, N, K] lie one after the other, and a tile of rows belongs to one expert
(`rows_of_expert`) or to none. `index` tells the row of x, of `sources` rows, that each row multiplies; None: its own.

`zeros` of a weight with minima are float32 (rule 16). `x_sums` [rows of x, groups] is what they are multiplied with,
for the finer groups of weight and activations; None for other weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import (
    INF_BITS,
    load_integers,
    load_weight,
    magnitude_bits,
    requantized,
    rows_of_expert,
    source_rows,
    store_float,
    tile_of,
    tiled_rows,
)


@triton.jit
def linear_int_kernel(
    qx,
    x_scales,
    qweight,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    row_bytes,
    offsets,
    index,
    experts,
    sources,
    x_sums,
    BITS: tl.constexpr,
    W_GROUP: tl.constexpr,
    A_GROUP: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Rules 4 and 5 on int8 qx [M, K].

    SLICE 0: the whole product. Otherwise program axis 1 counts slices of SLICE columns, and out holds what
    `reduce_slices_kernel` adds: int32 sums [slices, M, N], or, with groups, float32 scaled sums [groups, M, N].
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tiled_rows(M, experts, EXPERTS, BLOCK_M), N, BLOCK_M, BLOCK_N, SWATH)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_rows = rows < M
    x_rows = rows
    begin = 0
    end = K
    if EXPERTS > 0:
        expert, rows, inside_rows = rows_of_expert(tile_m, offsets, M, experts, EXPERTS, BLOCK_M)
        x_rows = source_rows(rows, inside_rows, index, sources)
        first_row = tl.minimum(expert, experts - 1).to(tl.int64) * N  # of its weight
        qweight += first_row * row_bytes
        scales += first_row * (tl.cdiv(K, W_GROUP) if W_GROUP > 0 else 1)
        if zeros is not None:
            zeros += first_row * (tl.cdiv(K, W_GROUP) if W_GROUP > 0 else 1)
        if bias is not None:
            bias += first_row
        end = tl.where(expert < experts, K, 0)
    inside = inside_rows[:, None] & (cols[None, :] < N)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if SLICE > 0:
        begin = tl.program_id(1) * SLICE
        end = tl.minimum(K, begin + SLICE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        x_at = x_rows.to(tl.int64)[:, None] * K + ks[None, :]
        x = tl.load(qx + x_at, mask=inside_rows[:, None] & (ks[None, :] < K), other=0)
        w = tl.trans(load_integers(qweight, zeros, cols, first, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K))
        if W_GROUP == 0 and A_GROUP == 0:
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        else:
            if A_GROUP > 0:
                group = x_rows * tl.cdiv(K, A_GROUP) + first // A_GROUP
                x_scale = tl.load(x_scales + group, mask=inside_rows, other=0.0)[:, None]
            HALVES: tl.constexpr = BLOCK_K // W_GROUP if W_GROUP > 0 and W_GROUP < BLOCK_K else 1
            for half in tl.static_range(HALVES):
                of_group = x
                if HALVES > 1:
                    place = tl.arange(0, BLOCK_K)[None, :] // W_GROUP
                    of_group = tl.where(place == half, x, 0).to(tl.int8)
                part = tl.dot(of_group, w, out_dtype=tl.int32).to(tl.float32)
                there = tl.zeros_like(cols) + first + half * W_GROUP < K
                if W_GROUP > 0:
                    group = cols * tl.cdiv(K, W_GROUP) + first // W_GROUP + half
                    w_scale = tl.load(scales + group, mask=(cols < N) & there, other=0.0)[None, :]
                if A_GROUP == 0:
                    part = part * w_scale
                elif W_GROUP == 0:
                    part = part * x_scale
                else:
                    part = part * (x_scale * w_scale)
                if SLICE > 0:
                    group_at = tl.cast(first // BLOCK_K * HALVES + half, tl.int64) * M * N
                    tl.store(out + group_at + at, part, mask=inside & there[None, :])
                else:
                    total = total + part
    if SLICE > 0:
        if W_GROUP == 0 and A_GROUP == 0:
            tl.store(out + tl.program_id(1).to(tl.int64) * M * N + at, acc, mask=inside)
    else:
        if W_GROUP == 0 and A_GROUP == 0:
            total = acc.to(tl.float32)
        if EXPERTS > 0:
            owner = tl.zeros_like(rows) + expert
            store_float(out + at, tl.zeros_like(total), inside & (owner[:, None] == experts))
            inside_rows = inside_rows & (owner < experts)
        of_rows = (rows, x_rows, inside_rows)
        scaled = _scaled(total, x_scales, scales, of_rows, cols, N, A_GROUP == 0, W_GROUP == 0)
        if x_sums is not None:
            scaled = scaled + _minima(scaled, x_sums, zeros, of_rows, cols, N, K, W_GROUP, A_GROUP)
        _store(scaled, bias, out, of_rows, cols, N)


@triton.jit
def _minima(like, x_sums, minima, of_rows, cols, N, K, W_GROUP: tl.constexpr, A_GROUP: tl.constexpr):
    """Rule 16: what the minima add to a tile, which is like `like`."""
    FINER: tl.constexpr = A_GROUP if W_GROUP == 0 or (A_GROUP > 0 and A_GROUP < W_GROUP) else W_GROUP
    groups = tl.cdiv(K, FINER) if FINER > 0 else 1
    w_groups = tl.cdiv(K, W_GROUP) if W_GROUP > 0 else 1
    total = tl.zeros_like(like)
    for group in range(0, groups):
        w_group = group * FINER // W_GROUP if W_GROUP > 0 else 0
        minimum = tl.load(minima + cols * w_groups + w_group, mask=cols < N, other=0.0)
        x_sum = tl.load(x_sums + of_rows[1] * groups + group, mask=of_rows[2], other=0.0)
        total = total + x_sum[:, None] * minimum[None, :]
    return total


@triton.jit
def _scaled(total, x_scales, scales, of_rows, cols, N, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr):
    """A tile of sums times the scales that are not grouped.

    of_rows: the rows of out, those of x, and which of them there are.
    """
    x_rows = of_rows[1]
    inside_rows = of_rows[2]
    if SCALE_ROWS:
        x_scale = tl.load(x_scales + x_rows, mask=inside_rows, other=0.0)[:, None]
    if SCALE_COLUMNS:
        w_scale = tl.load(scales + cols, mask=cols < N, other=0.0)[None, :]
    if SCALE_ROWS and SCALE_COLUMNS:
        total = total * (x_scale * w_scale)
    elif SCALE_ROWS:
        total = total * x_scale
    elif SCALE_COLUMNS:
        total = total * w_scale
    return total


@triton.jit
def _store(total, bias, out, of_rows, cols, N):
    """The bias, and one rounding."""
    if bias is not None:
        total = total + tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    at = of_rows[0].to(tl.int64)[:, None] * N + cols[None, :]
    store_float(out + at, total, of_rows[2][:, None] & (cols[None, :] < N))


@triton.jit
def reduce_slices_kernel(
    parts,
    x_scales,
    scales,
    bias,
    out,
    M,
    N,
    slices,
    x_sums,
    minima,
    K,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    W_GROUP: tl.constexpr,
    A_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the parts [slices, M, N] in ascending order, which makes split-K deterministic, and finishes the product."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    total = tl.zeros((BLOCK_M, BLOCK_N), parts.dtype.element_ty)
    for _ in range(0, slices):
        total = total + tl.load(parts + at, mask=inside, other=0)
        at += tl.cast(M, tl.int64) * N  # M and N of 1 are constants
    of_rows = (rows, rows, rows < M)
    scaled = _scaled(total.to(tl.float32), x_scales, scales, of_rows, cols, N, SCALE_ROWS, SCALE_COLUMNS)
    if x_sums is not None:
        scaled = scaled + _minima(scaled, x_sums, minima, of_rows, cols, N, K, W_GROUP, A_GROUP)
    _store(scaled, bias, out, of_rows, cols, N)


@triton.jit
def linear_float_kernel(
    x,
    qweight,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    row_bytes,
    offsets,
    index,
    experts,
    sources,
    BITS: tl.constexpr,
    W_GROUP: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The forward of `a16` schemes: float x [M, K] times the weight's integers, which any float dtype holds exactly.

    The sum of each group is scaled in float32. SLICE as in `linear_int_kernel`, except that out holds one float32 sum a
    slice, groups scaled. Minima are multiplied with the sum of x; then all scales are applied here, and rows that hold
    Inf or NaN are multiplied once more, for Inf times a code and Inf times a minimum may cancel: those values with the
    signs of the weight.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tiled_rows(M, experts, EXPERTS, BLOCK_M), N, BLOCK_M, BLOCK_N, SWATH)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_rows = rows < M
    x_rows = rows
    begin = 0
    end = K
    if EXPERTS > 0:
        expert, rows, inside_rows = rows_of_expert(tile_m, offsets, M, experts, EXPERTS, BLOCK_M)
        x_rows = source_rows(rows, inside_rows, index, sources)
        first_row = tl.minimum(expert, experts - 1).to(tl.int64) * N  # of its weight
        qweight += first_row * row_bytes
        scales += first_row * (tl.cdiv(K, W_GROUP) if W_GROUP > 0 else 1)
        if zeros is not None:
            zeros += first_row * (tl.cdiv(K, W_GROUP) if W_GROUP > 0 else 1)
        if bias is not None:
            bias += first_row
        end = tl.where(expert < experts, K, 0)
    if SLICE > 0:
        begin = tl.program_id(1) * SLICE
        end = tl.minimum(K, begin + SLICE)
    HAS_MIN: tl.constexpr = zeros is not None and zeros.dtype.element_ty == tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row_sums = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(begin, end, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        x_at = x_rows.to(tl.int64)[:, None] * K + ks[None, :]
        value = tl.load(x + x_at, mask=inside_rows[:, None] & (ks[None, :] < K), other=0.0)
        integers = load_integers(qweight, zeros, cols, first, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K)
        w = tl.trans(integers.to(value.dtype))
        if W_GROUP == 0:
            total = tl.dot(value, w, total, input_precision="ieee")
        else:
            group = cols * tl.cdiv(K, W_GROUP) + first // W_GROUP
            scale = tl.load(scales + group, mask=cols < N, other=0.0)
            total = total + tl.dot(value, w, input_precision="ieee") * scale[None, :]
        if HAS_MIN:
            floats = value.to(tl.float32)
            row_sums = row_sums + tl.sum(floats, axis=1)
            largest = tl.maximum(largest, tl.max(magnitude_bits(floats), axis=1))
            if W_GROUP > 0:
                total = total + row_sums[:, None] * tl.load(zeros + group, mask=cols < N, other=0.0)[None, :]
                row_sums = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_MIN:
        if W_GROUP == 0:
            total = total * tl.load(scales + cols, mask=cols < N, other=0.0)[None, :]
            total = total + row_sums[:, None] * tl.load(zeros + cols, mask=cols < N, other=0.0)[None, :]
        if tl.max(largest, axis=0) >= INF_BITS:
            infinite = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for first in tl.range(begin, end, BLOCK_K, num_stages=1):  # rare: it must not take shared memory
                ks = first + tl.arange(0, BLOCK_K)
                x_at = x_rows.to(tl.int64)[:, None] * K + ks[None, :]
                value = tl.load(x + x_at, mask=inside_rows[:, None] & (ks[None, :] < K), other=0.0)
                value = tl.where(magnitude_bits(value.to(tl.float32)) >= INF_BITS, value, 0.0).to(value.dtype)
                w = load_weight(qweight, scales, zeros, cols, first, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K)
                signs = tl.where(w > 0.0, 1.0, tl.where(w < 0.0, -1.0, 0.0))
                infinite = tl.dot(value, tl.trans(signs.to(value.dtype)), infinite, input_precision="ieee")
            total = tl.where((largest >= INF_BITS)[:, None], infinite, total)
    inside = inside_rows[:, None] & (cols[None, :] < N)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if SLICE > 0:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + at, total, mask=inside)
    else:
        if EXPERTS > 0:
            owner = tl.zeros_like(rows) + expert
            store_float(out + at, tl.zeros_like(total), inside & (owner[:, None] == experts))
            inside_rows = inside_rows & (owner < experts)
        of_rows = (rows, x_rows, inside_rows)
        scaled = _scaled(total, None, scales, of_rows, cols, N, False, W_GROUP == 0 and not HAS_MIN)
        _store(scaled, bias, out, of_rows, cols, N)


@triton.jit
def grad_input_kernel(
    grad_out,
    qweight,
    scales,
    zeros,
    out,
    M,
    N,
    K,
    row_bytes,
    offsets,
    experts,
    BITS: tl.constexpr,
    W_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """out [M, K] = float grad_out [M, N] times the dequantized weight, which is rounded to the dtype of grad_out."""
    tile_m, tile_k = tile_of(tl.program_id(0), tiled_rows(M, experts, EXPERTS, BLOCK_M), K, BLOCK_M, BLOCK_K, SWATH)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_rows = rows < M
    end = N
    if EXPERTS > 0:
        expert, rows, inside_rows = rows_of_expert(tile_m, offsets, M, experts, EXPERTS, BLOCK_M)
        first_row = tl.minimum(expert, experts - 1).to(tl.int64) * N  # of its weight
        qweight += first_row * row_bytes
        scales += first_row * (tl.cdiv(K, W_GROUP) if W_GROUP > 0 else 1)
        if zeros is not None:
            zeros += first_row * (tl.cdiv(K, W_GROUP) if W_GROUP > 0 else 1)
        end = tl.where(expert < experts, N, 0)
    first = tile_k * BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, end, BLOCK_N):
        ns = start + tl.arange(0, BLOCK_N)
        grad_at = rows.to(tl.int64)[:, None] * N + ns[None, :]
        grad = tl.load(grad_out + grad_at, mask=inside_rows[:, None] & (ns[None, :] < N), other=0.0)
        w = load_weight(qweight, scales, zeros, ns, first, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K)
        total = tl.dot(grad, w.to(grad.dtype), total, input_precision="ieee")
    columns = first + tl.arange(0, BLOCK_K)
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    store_float(out + at, total, inside_rows[:, None] & (columns[None, :] < K))


@triton.jit
def int_grad_input_kernel(
    q_grad,
    grad_scales,
    qweight,
    scales,
    zeros,
    column_scales,
    out,
    M,
    N,
    K,
    row_bytes,
    BITS: tl.constexpr,
    W_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
):
    """Rule 6: out [M, K] from int8 q_grad [M, N]; with column_scales the weight is requantized by column on the way.

    The gradient of a weight is the same product: then q_grad is transposed, and x stands in for the weight.
    """
    tile_m, tile_k = tile_of(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, SWATH)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_k * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    if column_scales is not None:
        column_scale = tl.load(column_scales + columns, mask=columns < K, other=1.0)
        inverse = tl.div_rn(1.0, column_scale)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for start in range(0, N, BLOCK_N):
        ns = start + tl.arange(0, BLOCK_N)
        grad_at = rows.to(tl.int64)[:, None] * N + ns[None, :]
        grad = tl.load(q_grad + grad_at, mask=(rows[:, None] < M) & (ns[None, :] < N), other=0)
        if column_scales is None:
            w = load_integers(qweight, zeros, ns, first, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K)
        else:
            w = requantized(
                load_weight(qweight, scales, zeros, ns, first, (N, K, row_bytes), BITS, W_GROUP, BLOCK_K), inverse
            )
        acc = tl.dot(grad, w, acc, out_dtype=tl.int32)
    scale = tl.load(grad_scales + rows, mask=rows < M, other=0.0)[:, None]
    if column_scales is not None:
        scale = scale * column_scale[None, :]
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    store_float(out + at, acc.to(tl.float32) * scale, (rows[:, None] < M) & (columns[None, :] < K))
