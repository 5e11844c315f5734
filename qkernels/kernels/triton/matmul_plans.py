"""The launches of each operator: outputs, kernels, grids and constants, decided without running anything.

Arguments are those that `arguments.bundle` makes, checked before; `device` is what to configure for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...formats.scheme import QuantScheme
from ...formats.storage import QuantizedRows, StoredWeight
from . import matmul_kernels, row_kernels
from .launch import Arguments, Launch
from .target import Target
from .tiles import MatmulShape, Tile, choose, slices, tiles

NO_EXPERTS = (None, None, 1, 1)  # of a kernel that can take experts: offsets, index, experts, sources
ELEMENTS = 2048  # of a program that touches each element once


class Plan(NamedTuple):
    """The results of an operator, and the launches that fill them, in order."""

    results: tuple[Tensor, ...]
    launches: list[Launch]


def operand_of(x: Tensor) -> str:
    return "float32" if x.dtype == torch.float32 else "float16"


def contiguous(weight: StoredWeight) -> StoredWeight:
    """The weight with each tensor in one piece."""
    return weight.map(Tensor.contiguous)


def row_major(x: Tensor) -> Tensor:
    """x [M, K] with its rows apart by any stride."""
    return x if x.stride(1) == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def quantize_activation(x: Tensor, scheme: QuantScheme, x_scale: Tensor | None = None, *, device: Target) -> Plan:
    """int8 [M, K] and float32 scales [M, groups]."""
    return quantize_int8(x, scheme.act_group_size, x_scale)


def quantize_int8(x: Tensor, group: int | None, x_scale: Tensor | None = None) -> Plan:
    """int8 [M, K] and float32 scales [M, groups] of float x [M, K], whose groups are `group` columns or a row.

    With `x_scale` [1] that is the scale of all rows.
    """
    x = row_major(x)
    m, k = x.shape
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, -(-k // group) if group else 1), dtype=torch.float32, device=x.device)
    if group is None:
        block = min(power_of_two(k), 4096)
        constants, warps = {"BLOCK": block}, 8 if block > 2048 else 4
        if x_scale is not None:
            static_args = (x, x_scale.contiguous(), q, scales, k, x.stride(0))
            reason = "a row a program: read once, for the scale is given"
            launch = Launch(row_kernels.quantize_rows_static_kernel, (m,), static_args, constants, warps, 1, reason)
            return Plan((q, scales), [launch])
        reason = "a row a program: read twice, the second time from the cache"
        row_args = (x, q, scales, k, x.stride(0))
        launch = Launch(row_kernels.quantize_rows_kernel, (m,), row_args, constants, warps, 1, reason)
        return Plan((q, scales), [launch])
    block = ELEMENTS // group
    constants = {"GROUP": group, "BLOCK": block}
    grid = (-(-scales.numel() // block),)
    args = (x, q, scales, m, k, x.stride(0))
    reason = "groups side by side, each within a warp"
    return Plan((q, scales), [Launch(row_kernels.quantize_groups_kernel, grid, args, constants, 4, 1, reason)])


def group_sums(activation: tuple[Tensor, Tensor], scheme: QuantScheme) -> tuple[Tensor, Launch]:
    """Rule 16: float32 [M, groups], the sums of int8 x over the finer groups, times their scales; and what fills it."""
    (q, scales), (m, k) = activation, activation[0].shape
    group = min((size for size in (scheme.group_size, scheme.act_group_size) if size), default=0)
    out = torch.empty((m, -(-k // group) if group else 1), dtype=torch.float32, device=q.device)
    block = group or min(power_of_two(k), ELEMENTS)
    rows = max(1, ELEMENTS // block)
    constants = {"GROUP": group, "A_GROUP": scheme.act_group_size or 0, "ROWS": rows, "BLOCK": block}
    kernel, reason = row_kernels.group_sums_kernel, "groups side by side"
    return out, Launch(kernel, (-(-out.numel() // rows),), (q, scales, out, m, k), constants, 4, 1, reason)


def weight_format(scheme: QuantScheme) -> dict[str, int]:
    """The constants that say how a weight is stored."""
    return {"BITS": scheme.weight_bits, "W_GROUP": scheme.group_size or 0}


def dequantize_weight(weight: StoredWeight, *, device: Target) -> Plan:
    """float32 [N, in_features]."""
    weight, scheme = contiguous(weight), weight.scheme
    n, row_bytes = weight.qweight.shape
    out = torch.empty((n, weight.in_features), dtype=torch.float32, device=weight.qweight.device)
    constants = {"BITS": scheme.weight_bits, "GROUP": scheme.group_size or 0, "BLOCK_N": 16, "BLOCK_K": 128}
    grid = (-(-n // 16), -(-weight.in_features // 128))
    args = (*weight[:3], out, n, weight.in_features, row_bytes)
    reason = "512 bytes of each row of the result"
    return Plan((out,), [Launch(row_kernels.dequantize_weight_kernel, grid, args, constants, 4, 1, reason)])


def column_scales(weight: StoredWeight, *, device: Target) -> Plan:
    """float32 [in_features]."""
    (out,), launches = column_scales_of_chunks(contiguous(weight), max(1, weight.out_features))
    return Plan((out[0],), launches)


def column_scales_of_chunks(weight: StoredWeight, chunk: int) -> Plan:
    """float32 [chunks, in_features]: `column_scales` of each `chunk` rows of the weight (a multiple of 64, or all)."""
    scheme, in_features, (n, row_bytes) = weight.scheme, weight.in_features, weight.qweight.shape
    chunks = max(1, -(-n // chunk))
    out = torch.empty((chunks, in_features), dtype=torch.float32, device=weight.qweight.device)
    constants = {"BITS": scheme.weight_bits, "GROUP": scheme.group_size or 0, "BLOCK_N": 64, "BLOCK_K": 32}
    grid = (-(-in_features // 32), chunks)
    args = (*weight[:3], out, n, in_features, row_bytes, chunk)
    reason = "a sector of each row, so that as many programs as possible run"
    return Plan((out,), [Launch(row_kernels.column_scales_kernel, grid, args, constants, 8, 1, reason)])


def tile_sizes(config: Tile) -> dict[str, int]:
    return {"BLOCK_M": config.rows, "BLOCK_N": config.columns, "BLOCK_K": config.depth, "SWATH": config.swath}


def linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None, *, device: Target
) -> Plan:
    """[M, N]: for `a8` schemes the quantization, the product, and what split-K needs after it."""
    out = torch.empty((x.shape[0], weight.out_features), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return Plan((out,), [])
    activation: tuple[Tensor, ...] = (x,)
    launches: list[Launch] = []
    if weight.scheme.int_activations:
        activation, launches = quantize_activation(x, weight.scheme, weight.x_scale, device=device)
    return Plan((out,), launches + product(activation, contiguous(weight), bias, out, device))


def product(
    activation: tuple[Tensor, ...], weight: StoredWeight, bias: Tensor | None, out: Tensor, device: Target
) -> list[Launch]:
    """Launches that fill `out` [M, N]; an activation is int8 and its scales, or one float tensor."""
    scheme, bias = weight.scheme, None if bias is None else bias.contiguous()
    x, (m, n) = activation[0].contiguous(), out.shape
    if scheme.int_activations:
        group = min((size for size in (scheme.group_size, scheme.act_group_size) if size), default=0)
        shape = MatmulShape(m, n, x.shape[1], "int8", group, splittable=True)
        return _linear_int((x, activation[1]), weight, bias, out, (shape, choose(shape, device)))
    shape = MatmulShape(m, n, x.shape[1], operand_of(x), scheme.group_size or 0, splittable=True)
    return _linear_float(x, weight, bias, out, (shape, choose(shape, device)))


def _linear_int(
    activation: tuple[Tensor, Tensor],
    weight: StoredWeight,
    bias: Tensor | None,
    out: Tensor,
    chosen: tuple[MatmulShape, Tile],
) -> list[Launch]:
    (shape, config), scheme = chosen, weight.scheme
    sizes = {
        **weight_format(scheme),
        "A_GROUP": scheme.act_group_size or 0,
        "SLICE": config.slice_depth,
        "EXPERTS": 0,
        **tile_sizes(config),
    }
    parts, launches, x_sums = out, [], None
    if scheme.has_min:
        x_sums, launch = group_sums(activation, scheme)
        launches.append(launch)
    if config.slice_depth:
        count = -(-shape.depth // shape.group) if shape.group else slices(shape, config)
        dtype = torch.float32 if shape.group else torch.int32
        parts = torch.empty((count, *out.shape), dtype=dtype, device=out.device)
    args = (
        *activation,
        *weight[:3],
        bias,
        parts,
        *out.shape,
        shape.depth,
        weight.qweight.shape[1],
        *NO_EXPERTS,
        x_sums,
    )
    launches.append(_launch(matmul_kernels.linear_int_kernel, args, sizes, shape, config))
    if config.slice_depth:
        x_scales = activation[1] if scheme.act_group_size is None else None
        scales = weight.scales if scheme.group_size is None else None
        groups = {name: sizes[name] for name in ("W_GROUP", "A_GROUP")}
        minima = (x_sums, weight.zeros if scheme.has_min else None, shape.depth)
        launches.append(_reduce(parts, x_scales, scales, bias, out, minima, groups))
    return launches


def _linear_float(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, out: Tensor, chosen: tuple[MatmulShape, Tile]
) -> list[Launch]:
    (shape, config), scheme = chosen, weight.scheme
    sizes = {**weight_format(scheme), "SLICE": config.slice_depth, "EXPERTS": 0, **tile_sizes(config)}
    parts = out
    if config.slice_depth:
        parts = torch.empty((slices(shape, config), *out.shape), dtype=torch.float32, device=out.device)
    args = (x, *weight[:3], bias, parts, *out.shape, shape.depth, weight.qweight.shape[1], *NO_EXPERTS)
    launches = [_launch(matmul_kernels.linear_float_kernel, args, sizes, shape, config)]
    if config.slice_depth:
        launches.append(_reduce(parts, None, weight.scales if scheme.row_scaled else None, bias, out))
    return launches


def _launch(kernel: Any, args: Arguments, constants: dict[str, Any], shape: MatmulShape, config: Tile) -> Launch:
    grid = (tiles(shape, config), slices(shape, config))
    return Launch(kernel, grid, args, constants, config.num_warps, config.num_stages, config.reason, shape)


def _reduce(
    parts: Tensor,
    x_scales: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    minima: tuple[Tensor | None, Tensor | None, int] = (None, None, 1),
    groups: dict[str, int] | None = None,
) -> Launch:
    """minima: `x_sums`, the minima and K, of integer products; groups: of weight and activations."""
    m, n = out.shape
    constants: dict[str, int] = {"SCALE_ROWS": x_scales is not None, "SCALE_COLUMNS": scales is not None}
    constants = {**constants, **(groups or {"W_GROUP": 0, "A_GROUP": 0}), "BLOCK_M": 1, "BLOCK_N": 128}
    args = (parts, x_scales, scales, bias, out, m, n, parts.shape[0], *minima)
    reason = "adds the slices in ascending order"
    return Launch(matmul_kernels.reduce_slices_kernel, (m, -(-n // 128)), args, constants, 4, 1, reason)


def grad_tiles(config: Tile) -> dict[str, int]:
    """The reduction of an input gradient runs over N, its columns are K."""
    return {"BLOCK_M": config.rows, "BLOCK_N": config.depth, "BLOCK_K": config.columns, "SWATH": config.swath}


def linear_grad_input(
    grad_out: Tensor, weight: StoredWeight, out_dtype: torch.dtype | None = None, *, device: Target
) -> Plan:
    """[M, in_features]."""
    weight, (m, n), in_features = contiguous(weight), grad_out.shape, weight.in_features
    out = torch.empty((m, in_features), dtype=out_dtype or grad_out.dtype, device=grad_out.device)
    shape = MatmulShape(m, in_features, n, operand_of(grad_out), converted=True)
    config = choose(shape, device)
    args = (grad_out.contiguous(), *weight[:3], out, m, n, in_features, weight.qweight.shape[1], None, 1)
    sizes = {**weight_format(weight.scheme), "EXPERTS": 0, **grad_tiles(config)}
    return Plan((out,), [_launch(matmul_kernels.grad_input_kernel, args, sizes, shape, config)])


def int_grad_input(
    grad: QuantizedRows,
    weight: StoredWeight,
    column_scales: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    device: Target,
) -> Plan:
    """[M, in_features]; also the gradient of a weight, whose factors come from
    `quantize_columns_stochastic` and `linear_with_saved_input`.
    """
    weight, (m, n), in_features = contiguous(weight), grad.integers.shape, weight.in_features
    out = torch.empty((m, in_features), dtype=out_dtype or torch.float32, device=weight.device)
    shape = MatmulShape(m, in_features, n, "int8", converted=True)
    config = choose(shape, device)
    gradient = (tensor.contiguous() for tensor in grad)
    factors = None if column_scales is None else column_scales.contiguous()
    args = (*gradient, *weight[:3], factors, out, m, n, in_features, weight.qweight.shape[1])
    sizes = {**weight_format(weight.scheme), **grad_tiles(config)}
    return Plan((out,), [_launch(matmul_kernels.int_grad_input_kernel, args, sizes, shape, config)])
