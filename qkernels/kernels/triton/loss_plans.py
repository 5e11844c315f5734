"""The launches of the cross entropy of a head: for each range of the vocabulary logits, their softmax, a product."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...formats.storage import StoredWeight
from .. import reference
from ..arguments import LossOptions
from . import loss_kernels
from .launch import Arguments, Launch
from .matmul_plans import (
    Plan,
    column_scales_of_chunks,
    contiguous,
    grad_tiles,
    product,
    quantize_activation,
    row_major,
    weight_format,
)
from .target import Target
from .tiles import MatmulShape, choose, tiles

_RANGES = 8
LOGITS_AT_ONCE = 1 << 24  # unless that were fewer rows than LEAST_ROWS, too few to multiply well
LEAST_ROWS = 64


class _Statistics(NamedTuple):
    """Sums of each chunk and row (see `loss_kernels`): float32 [chunks, M]; no grad_scales without a gradient."""

    maxima: Tensor
    sums: Tensor
    totals: Tensor
    picked: Tensor
    grad_scales: Tensor | None


class _Head(NamedTuple):
    """The weight [N, K] and what is derived from it once."""

    weight: StoredWeight
    bias: Tensor | None
    row_factors: Tensor | None  # [N], for weights with one scale a row
    column_scales: Tensor | None  # [chunks, K], for others
    column_sums: Tensor | None  # [chunks, K], with label smoothing


def linear_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    dither: Tensor | None = None,
    *,
    device: Target,
    **keywords: Any,
) -> Plan:
    """float32 loss [M], log-sum-exp [M], gradient [M, K] ([0, K] without dither).

    Ignored rows are worked on like the others, for their number is known on the device only. A target that is neither a
    class nor `ignore_index` makes its row NaN, for an error would have to wait for the device.
    """
    options = LossOptions(**keywords)
    cap = torch.tensor(options.softcap, dtype=torch.float32).item()
    options = options._replace(softcap=0.0 if math.isinf(cap) else cap)
    (m, k), n = hidden.shape, weight.out_features
    loss, lse = (torch.empty((m,), dtype=torch.float32, device=hidden.device) for _ in range(2))
    grad = torch.empty((0 if dither is None else m, k), dtype=torch.float32, device=hidden.device)
    if m == 0 or n == 0:
        return Plan((loss, lse, grad), [])
    head, launches = _derive(contiguous(weight), bias, options if dither is not None else None)
    chunks = -(-n // reference.LOSS_CHUNK)
    width = -(-chunks // _RANGES) * reference.LOSS_CHUNK
    step = max(LEAST_ROWS, LOGITS_AT_ONCE // width)
    for begin in range(0, m, step):
        rows = slice(begin, begin + step)
        x, rounded = row_major(hidden[rows]), None if dither is None else dither[rows].contiguous()
        results = (loss[rows], lse[rows], grad[rows])
        launches += _of_rows(x, target[rows].contiguous(), head, rounded, options, results, device)
    return Plan((loss, lse, grad), launches)


def _derive(weight: StoredWeight, bias: Tensor | None, gradient: LossOptions | None) -> tuple[_Head, list[Launch]]:
    head = _Head(weight, bias, None, None, None)
    launches: list[Launch] = []
    if gradient is None:
        return head, launches
    scheme, k, qweight = weight.scheme, weight.in_features, weight.qweight
    n, row_bytes = qweight.shape
    if not scheme.row_scaled:
        (columns,), launches = column_scales_of_chunks(weight, reference.LOSS_CHUNK)
        head = head._replace(column_scales=columns)
    else:
        factors = torch.empty((n,), dtype=torch.float32, device=qweight.device)
        constants = {"BITS": scheme.weight_bits, "BLOCK_N": 16, "BLOCK_K": 128}
        args: Arguments = (*weight[:3], factors, n, k, row_bytes)
        kernel, reason = loss_kernels.row_factors_kernel, "128 bytes of each row at a time"
        launches = [Launch(kernel, (-(-n // 16),), args, constants, 4, 1, reason)]
        head = head._replace(row_factors=factors)
    if gradient.label_smoothing != 0.0:
        chunks = -(-n // reference.LOSS_CHUNK)
        sums = torch.empty((chunks, k), dtype=torch.float64, device=qweight.device)
        constants = {"BITS": scheme.weight_bits, "GROUP": scheme.group_size or 0, "BLOCK_K": 128}
        args = (*weight[:3], sums, n, k, row_bytes, reference.LOSS_CHUNK)
        kernel, reason = loss_kernels.column_sums_kernel, "128 columns of a row at a time, rows in order"
        launches.append(Launch(kernel, (-(-k // 128), chunks), args, constants, 4, 1, reason))
        head = head._replace(column_sums=sums)
    return head, launches


def _of_rows(
    hidden: Tensor,
    target: Tensor,
    head: _Head,
    dither: Tensor | None,
    options: LossOptions,
    results: tuple[Tensor, Tensor, Tensor],
    device: Target,
) -> list[Launch]:
    """Loss, log-sum-exp and gradient of as many rows as the logits of a range may have."""
    m, n = hidden.shape[0], head.weight.out_features
    chunks = -(-n // reference.LOSS_CHUNK)
    empty = partial(torch.empty, dtype=torch.float32, device=hidden.device)
    maxima, sums, totals, picked = (empty((chunks, m)) for _ in range(4))
    statistics = _Statistics(maxima, sums, totals, picked, None if dither is None else empty((chunks, m)))
    activation: tuple[Tensor, ...] = (hidden,)
    launches: list[Launch] = []
    if head.weight.scheme.int_activations:
        scheme, x_scale = head.weight.scheme, head.weight.x_scale
        activation, launches = quantize_activation(hidden, scheme, x_scale, device=device)
    state = None
    for begin, end in pairwise(i * chunks // _RANGES for i in range(_RANGES + 1)):
        if begin == end:
            continue
        classes = slice(begin * reference.LOSS_CHUNK, min(end * reference.LOSS_CHUNK, n))
        weight = head.weight.rows(classes)
        bias = None if head.bias is None else head.bias[classes]
        logits = empty((m, weight.out_features))
        launches += product(activation, weight, bias, logits, device)
        q = None if dither is None else torch.empty(logits.shape, dtype=torch.int8, device=hidden.device)
        launches.append(_softmax(logits, target, dither, head, q, statistics, classes.start, options))
        if q is not None:
            joined = empty(hidden.shape)
            launches.append(_product(q, statistics, weight, head, state, joined, begin, device))
            state = joined
    return launches + _finish(statistics, target, head, state, options, results)


def _softmax(
    logits: Tensor,
    target: Tensor,
    dither: Tensor | None,
    head: _Head,
    q: Tensor | None,
    statistics: _Statistics,
    first: int,
    options: LossOptions,
) -> Launch:
    m, width = logits.shape
    *sums, grad_scales = statistics
    args = (logits, target, dither, head.row_factors, q, *sums, grad_scales, m, width, first)
    constants = {"CAP": float(options.softcap), "CHUNK": reference.LOSS_CHUNK, "BLOCK_M": 8, "BLOCK_N": 64}
    grid = (-(-m // 8), -(-width // reference.LOSS_CHUNK))
    return Launch(loss_kernels.softmax_chunk_kernel, grid, args, constants, 4, 1, "a chunk of few rows stays in L1")


def _product(
    q: Tensor,
    statistics: _Statistics,
    weight: StoredWeight,
    head: _Head,
    state: Tensor | None,
    out: Tensor,
    first: int,
    device: Target,
) -> Launch:
    (m, n), k = q.shape, out.shape[1]
    shape = MatmulShape(m, k, reference.LOSS_CHUNK, "int8", converted=True)
    config = choose(shape, device)
    if head.column_scales is not None:  # the weight is also held as floats
        config = replace(config, columns=min(config.columns, 64))
    args = (
        q,
        statistics.maxima,
        statistics.grad_scales,
        *weight[:3],
        head.column_scales,
        state,
        out,
        m,
        n,
        k,
        weight.qweight.shape[1],
        first,
    )
    sizes = {**weight_format(weight.scheme), "CHUNK": reference.LOSS_CHUNK, **grad_tiles(config)}
    kernel, grid = loss_kernels.loss_product_kernel, (tiles(shape, config),)
    return Launch(kernel, grid, args, sizes, config.num_warps, config.num_stages, config.reason)


def _finish(
    statistics: _Statistics,
    target: Tensor,
    head: _Head,
    state: Tensor | None,
    options: LossOptions,
    results: tuple[Tensor, Tensor, Tensor],
) -> list[Launch]:
    loss, lse, grad = results
    m, (n, row_bytes) = len(target), head.weight.qweight.shape
    chunks = statistics.maxima.shape[0]
    factors = coefficients = None
    if state is not None:
        factors, coefficients = (torch.empty_like(loss) for _ in range(2))
    smoothing = {"SMOOTHING": float(options.label_smoothing), "IGNORE": options.ignore_index}
    constants = {"CAP": float(options.softcap), "Z_LOSS": float(options.z_loss), **smoothing, "BLOCK": 32}
    args: Arguments = (*statistics[:4], target, loss, lse, factors, coefficients, m, n, chunks)
    kernel, reason = loss_kernels.loss_rows_kernel, "a warp of rows a program"
    launches = [Launch(kernel, (-(-m // 32),), args, constants, 1, 1, reason)]
    if state is None:
        return launches
    k = state.shape[1]
    args = (state, factors, coefficients, target, *head.weight[:3], head.column_sums, grad, m, n, k, row_bytes, chunks)
    constants = {**weight_format(head.weight.scheme), **smoothing, "BLOCK_M": 16, "BLOCK_K": 128}
    kernel, reason = loss_kernels.loss_gradient_kernel, "512 bytes of each row"
    return [*launches, Launch(kernel, (-(-m // 16), -(-k // 128)), args, constants, 4, 1, reason)]
