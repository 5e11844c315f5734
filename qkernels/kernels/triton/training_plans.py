"""The launches of training's operators: random rounding, activations that are saved, weights quantized each step."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...formats.scheme import QuantScheme
from ...formats.storage import StoredWeight
from . import training_kernels
from .launch import Arguments, Launch
from .matmul_plans import (
    ELEMENTS,
    Plan,
    contiguous,
    power_of_two,
    product,
    quantize_activation,
    quantize_int8,
    row_major,
)
from .target import Target

_SLICE = 1024  # rows whose columns' ranges one program finds


def _words(seed: Tensor, rng_stream: int) -> tuple[int, int, int]:
    """Low and high half of the seed, and the `rng_stream`, as signed 32-bit integers."""
    value = int(seed)
    return _signed(value & 0xFFFFFFFF), _signed(value >> 32 & 0xFFFFFFFF), _signed(rng_stream)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def quantize_rows_stochastic(
    x: Tensor, column_factors: Tensor | None, seed: Tensor, rng_stream: int, *, device: Target
) -> Plan:
    """int8 [M, N] and float32 scales [M]."""
    x = row_major(x)
    m, n = x.shape
    q = torch.empty((m, n), dtype=torch.int8, device=x.device)
    scales = torch.empty((m,), dtype=torch.float32, device=x.device)
    block = min(max(4, power_of_two(n)), ELEMENTS)
    constants = {"BLOCK": block, "BLOCKS": -(-n // block)}
    factors = None if column_factors is None else column_factors.contiguous()
    args = (x, factors, q, scales, n, x.stride(0), *_words(seed, rng_stream))
    reason = "a row a program: read twice, the second time from the cache"
    return Plan((q, scales), [Launch(training_kernels.random_rows_kernel, (m,), args, constants, 4, 1, reason)])


def quantize_columns_stochastic(
    x: Tensor, row_factors: Tensor | None, seed: Tensor, rng_stream: int, *, device: Target
) -> Plan:
    """int8 [N, M] and float32 scales [N]."""
    x = row_major(x)
    m, n = x.shape
    count = max(1, -(-m // _SLICE))
    q = torch.empty((n, m), dtype=torch.int8, device=x.device)
    scales = torch.empty((n,), dtype=torch.float32, device=x.device)
    bits = torch.empty((count, n), dtype=torch.int32, device=x.device)
    factors = None if row_factors is None else row_factors.contiguous()
    shape = (m, n, x.stride(0))
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64}
    return Plan(
        (q, scales),
        [
            Launch(
                training_kernels.column_ranges_kernel,
                (-(-n // 64), count),
                (x, factors, bits, *shape),
                {"ROWS": _SLICE, "BLOCK_M": 32, "BLOCK_N": 64},
                4,
                1,
                "128 bytes of each row, in slices so that every processor has some",
            ),
            Launch(
                training_kernels.random_columns_kernel,
                (-(-n // 64), max(1, -(-m // 64))),
                (x, factors, bits, q, scales, *shape, count, *_words(seed, rng_stream)),
                tiles,
                4,
                1,
                "square tiles, turned over on the way: 64 bytes of each row of the result",
            ),
        ],
    )


def linear_with_saved_input(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None, *, device: Target
) -> Plan:
    """[M, N], int8 [M, K] and float32 [M]."""
    scheme, (m, k) = weight.scheme, x.shape
    activation, launches = quantize_activation(x, scheme, weight.x_scale, device=device)
    saved, row_scales = activation[0], activation[1].squeeze(1)
    if scheme.act_group_size is not None:
        saved = torch.empty_like(saved)
        row_scales = torch.empty((m,), dtype=torch.float32, device=x.device)
        constants = {"GROUP": scheme.act_group_size, "BLOCK": ELEMENTS // scheme.act_group_size}
        args: Arguments = (*activation, saved, row_scales, k)
        reason = "a row a program: its integers are read twice"
        launches.append(Launch(training_kernels.merge_groups_kernel, (m,), args, constants, 4, 1, reason))
    out = torch.empty((m, weight.out_features), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel():
        launches += product(activation, contiguous(weight), bias, out, device)
    return Plan((out, saved, row_scales), launches)


def quantize_weight(weight: Tensor, scheme: QuantScheme, *, device: Target) -> Plan:
    """qweight, scales and zeros ([N, 0] for symmetric schemes); a scale is NaN where no finite one exists."""
    n, k = weight.shape
    if scheme.weight_bits == 8:
        (q, scales), launches = quantize_int8(weight, scheme.group_size)
        return Plan((q, scales, scales.new_empty((n, 0), dtype=torch.uint8)), launches)
    weight = row_major(weight)
    (scales, inverses, zeros), launches = _int4_parameters(weight, scheme)
    packed = torch.empty((n, scheme.packed_features(k)), dtype=torch.uint8, device=weight.device)
    args = (weight, inverses, zeros, packed, n, k, weight.stride(0), packed.shape[1])
    launches.append(_by_tiles(training_kernels.int4_pack_kernel, args, scheme, (n, k)))
    return Plan((packed, scales, scales.new_empty((n, 0), dtype=torch.uint8) if zeros is None else zeros), launches)


def mask_clipped(grad: Tensor, weight: Tensor, scheme: QuantScheme, *, device: Target) -> Plan:
    """[N, K] of the dtype of grad."""
    grad, weight = row_major(grad), row_major(weight)
    (_, inverses, zeros), launches = _int4_parameters(weight, scheme)
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    args = (grad, weight, inverses, zeros, out, *grad.shape, grad.stride(0), weight.stride(0))
    launches.append(_by_tiles(training_kernels.int4_mask_kernel, args, scheme, grad.shape))
    return Plan((out,), launches)


def quantize_weight_scaled(weight: Tensor, scales: Tensor, scheme: QuantScheme, *, device: Target) -> Plan:
    """qweight for finite scales [N, groups] of a symmetric scheme."""
    n, k = weight.shape
    weight = row_major(weight)
    inverses, launches = _inverses(scales)
    if scheme.weight_bits == 8:
        out = torch.empty((n, k), dtype=torch.int8, device=weight.device)
        args: Arguments = (weight, inverses, out, n, k, weight.stride(0))
        launches.append(_by_tiles(training_kernels.int8_clamp_kernel, args, scheme, (n, k)))
    else:
        out = torch.empty((n, scheme.packed_features(k)), dtype=torch.uint8, device=weight.device)
        args = (weight, inverses, None, out, n, k, weight.stride(0), out.shape[1])
        launches.append(_by_tiles(training_kernels.int4_pack_kernel, args, scheme, (n, k)))
    return Plan((out,), launches)


def scale_gradient(grad: Tensor, weight: Tensor, scales: Tensor, scheme: QuantScheme, *, device: Target) -> Plan:
    """[N, K] of the dtype of grad, and float32 [N, groups]."""
    n, k = weight.shape
    grad, weight = row_major(grad), row_major(weight)
    inverses, launches = _inverses(scales)
    out = torch.empty((n, k), dtype=grad.dtype, device=grad.device)
    grad_scales = torch.empty(scales.shape, dtype=torch.float32, device=grad.device)
    low, high = scheme.weight_format.least, scheme.weight_format.greatest
    size = scheme.group_size or k
    last = k - size * (scales.shape[1] - 1)
    factors = (_float32_bits(1.0 / math.sqrt(count * high)) for count in (size, last))
    args: Arguments = (grad, weight, inverses, out, grad_scales, n, k, grad.stride(0), weight.stride(0), size, *factors)
    groups = 64 if scheme.group_size else 8
    constants = {"LOW": low, "HIGH": high, "GROUPS": groups}
    reason = "64 bytes of each group at a time: the sums of its 16 lanes are in order"
    grid = (-(-scales.numel() // groups),)
    launches.append(Launch(training_kernels.scale_gradient_kernel, grid, args, constants, 4, 1, reason))
    return Plan((out, grad_scales), launches)


def _float32_bits(value: float) -> int:
    """The bits of the nearest float32, as a signed integer: kernels take no floats."""
    return struct.unpack("i", struct.pack("f", value))[0]


def _inverses(scales: Tensor) -> tuple[Tensor, list[Launch]]:
    """float32, of the shape of the scales, and what fills them."""
    scales = scales.contiguous()
    inverses, block = torch.empty_like(scales), 1024
    args, grid = (scales, inverses, scales.numel()), (-(-scales.numel() // block),)
    reason = "each scale is read once"
    return inverses, [Launch(training_kernels.invert_scales_kernel, grid, args, {"BLOCK": block}, 4, 1, reason)]


def _int4_parameters(weight: Tensor, scheme: QuantScheme) -> tuple[tuple[Tensor, Tensor, Tensor | None], list[Launch]]:
    """float32 scales and their inverses and uint8 zero points (or None), each [N, groups], and what fills them."""
    n, k = weight.shape
    size = scheme.group_size or k
    shape = (n, scheme.weight_groups(k))
    scales, inverses = (torch.empty(shape, dtype=torch.float32, device=weight.device) for _ in range(2))
    zeros = None if scheme.symmetric else torch.empty(shape, dtype=torch.uint8, device=weight.device)
    block = min(power_of_two(size), ELEMENTS)
    groups = ELEMENTS // block if scheme.group_size else 1
    constants = {"GROUPS": groups, "BLOCK": block, "BLOCKS": -(-size // block)}
    args = (weight, scales, inverses, zeros, n, k, weight.stride(0), size)
    reason = "groups side by side, or a row a program"
    grid = (-(-scales.numel() // groups),)
    kernel = training_kernels.int4_parameters_kernel
    return (scales, inverses, zeros), [Launch(kernel, grid, args, constants, 4, 1, reason)]


def _by_tiles(kernel: Any, args: Arguments, scheme: QuantScheme, shape: Sequence[int]) -> Launch:
    constants = {"GROUP": scheme.group_size or 0, "BLOCK_N": 16, "BLOCK_K": 128}
    grid = (-(-shape[0] // 16), -(-shape[1] // 128))
    return Launch(kernel, grid, args, constants, 4, 1, "whole cache lines of each row")
