"""What each operator launches: outputs, kernels, grids and constants, decided without running anything.

Arguments are those of the operators in `ops.py`, checked there; `target` is what to configure for. Each function
returns the results and the launches that fill them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schemes import QuantScheme
from . import matmul_kernels, row_kernels
from .configs import Config, Product, choose, slices, tiles
from .launch import Launch, Target

# Rows of a block of the weight gradient, a multiple of any tile's: 65536 * 127 * 127 < 2^31.
TOKENS = 65536
_ELEMENTS = 2048  # of a program that touches each element once

Plan = tuple[Tensor, list[Launch]]


def _operand(x: Tensor) -> str:
    return "float32" if x.dtype == torch.float32 else "float16"


def _stored(qweight: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def quantize_activation(x: Tensor, scheme: str) -> tuple[Tensor, Tensor, list[Launch]]:
    """int8 [M, K], float32 scales [M, groups], launches."""
    group = QuantScheme.parse(scheme).act_group_size
    x = x if x.stride(1) == 1 else x.contiguous()
    m, k = x.shape
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, -(-k // group) if group else 1), dtype=torch.float32, device=x.device)
    if group is None:
        block = min(_power_of_two(k), 4096)
        reason = "a row a program: read twice, the second time from the cache"
        constants, warps = {"BLOCK": block}, 8 if block > 2048 else 4
        args = (x, q, scales, k, x.stride(0))
        return q, scales, [Launch(row_kernels.quantize_rows_kernel, (m,), args, constants, warps, 1, reason)]
    block = _ELEMENTS // group
    constants = {"GROUP": group, "BLOCK": block}
    grid = (-(-scales.numel() // block),)
    args = (x, q, scales, m, k, x.stride(0))
    reason = "groups side by side, each within a warp"
    return q, scales, [Launch(row_kernels.quantize_groups_kernel, grid, args, constants, 4, 1, reason)]


def _format(scheme: QuantScheme) -> dict[str, int]:
    return {"BITS": scheme.weight_bits, "W_GROUP": scheme.group_size or 0}


def dequantize_weight(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str) -> Plan:
    """float32 [N, in_features] and launches."""
    parsed = QuantScheme.parse(scheme)
    n = qweight.shape[0]
    out = torch.empty((n, in_features), dtype=torch.float32, device=qweight.device)
    constants = {"BITS": parsed.weight_bits, "GROUP": parsed.group_size or 0, "BLOCK_N": 16, "BLOCK_K": 128}
    grid = (-(-n // 16), -(-in_features // 128))
    args = (*_stored(qweight, scales, zeros), out, n, in_features, qweight.shape[1])
    reason = "512 bytes of each row of the result"
    return out, [Launch(row_kernels.dequantize_weight_kernel, grid, args, constants, 4, 1, reason)]


def column_scales(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str) -> Plan:
    """float32 [in_features] and launches."""
    parsed = QuantScheme.parse(scheme)
    out = torch.empty((in_features,), dtype=torch.float32, device=qweight.device)
    constants = {"BITS": parsed.weight_bits, "GROUP": parsed.group_size or 0, "BLOCK_N": 64, "BLOCK_K": 32}
    args = (*_stored(qweight, scales, zeros), out, qweight.shape[0], in_features, qweight.shape[1])
    grid = (-(-in_features // 32),)
    reason = "a sector of each row, so that as many programs as possible run"
    return out, [Launch(row_kernels.column_scales_kernel, grid, args, constants, 8, 1, reason)]


def _tiles(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.rows, "BLOCK_N": config.columns, "BLOCK_K": config.depth, "SWATH": config.swath}


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_dtype: torch.dtype | None,
    target: Target,
) -> Plan:
    """[M, N] and launches: for `a8` schemes the quantization, the product, and what split-K needs after it."""
    parsed = QuantScheme.parse(scheme)
    k = x.shape[1]
    out = torch.empty((x.shape[0], qweight.shape[0]), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out, []
    weight = _stored(qweight, scales, zeros)
    bias = None if bias is None else bias.contiguous()
    if not parsed.int_activations:
        product = Product(*out.shape, k, _operand(x), parsed.group_size or 0, splittable=True)
        return out, _linear_float(x.contiguous(), weight, bias, parsed, out, (product, choose(product, target)))
    qx, x_scales, launches = quantize_activation(x, scheme)
    group = min((size for size in (parsed.group_size, parsed.act_group_size) if size), default=0)
    product = Product(*out.shape, k, "int8", group, splittable=True)
    chosen = (product, choose(product, target))
    return out, launches + _linear_int((qx, x_scales), weight, bias, parsed, out, chosen)


def _linear_int(
    activation: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    scheme: QuantScheme,
    out: Tensor,
    chosen: tuple[Product, Config],
) -> list[Launch]:
    product, config = chosen
    x_scales, scales = activation[1], weight[1]
    sizes = {**_format(scheme), "A_GROUP": scheme.act_group_size or 0, "SLICE": config.slice_depth, **_tiles(config)}
    parts = out
    if config.slice_depth:
        count = -(-product.depth // product.group) if product.group else slices(product, config)
        dtype = torch.float32 if product.group else torch.int32
        parts = torch.empty((count, *out.shape), dtype=dtype, device=out.device)
    args = (*activation, *weight, bias, parts, *out.shape, product.depth, weight[0].shape[1])
    launches = [_launch(matmul_kernels.linear_int_kernel, args, sizes, product, config)]
    if config.slice_depth:
        launches.append(
            _reduce(
                parts,
                x_scales if scheme.act_group_size is None else None,
                scales if scheme.group_size is None else None,
                bias,
                out,
            )
        )
    return launches


def _linear_float(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    scheme: QuantScheme,
    out: Tensor,
    chosen: tuple[Product, Config],
) -> list[Launch]:
    product, config = chosen
    sizes = {**_format(scheme), "SLICE": config.slice_depth, **_tiles(config)}
    parts = out
    if config.slice_depth:
        parts = torch.empty((slices(product, config), *out.shape), dtype=torch.float32, device=out.device)
    args = (x, *weight, bias, parts, *out.shape, product.depth, weight[0].shape[1])
    launches = [_launch(matmul_kernels.linear_float_kernel, args, sizes, product, config)]
    if config.slice_depth:
        launches.append(_reduce(parts, None, weight[1] if scheme.group_size is None else None, bias, out))
    return launches


def _launch(kernel, args: tuple, constants: dict, product: Product, config: Config) -> Launch:
    grid = (tiles(product, config), slices(product, config))
    return Launch(kernel, grid, args, constants, config.num_warps, config.num_stages, config.reason)


def _reduce(parts: Tensor, x_scales: Tensor | None, scales: Tensor | None, bias: Tensor | None, out: Tensor) -> Launch:
    m, n = out.shape
    constants = {"SCALE_ROWS": x_scales is not None, "SCALE_COLUMNS": scales is not None, "BLOCK_M": 1, "BLOCK_N": 128}
    args = (parts, x_scales, scales, bias, out, m, n, parts.shape[0])
    reason = "adds the slices in ascending order"
    return Launch(matmul_kernels.reduce_slices_kernel, (m, -(-n // 128)), args, constants, 4, 1, reason)


def _grad_tiles(config: Config) -> dict[str, int]:
    """The reduction of an input gradient runs over N, its columns are K."""
    return {"BLOCK_M": config.rows, "BLOCK_N": config.depth, "BLOCK_K": config.columns, "SWATH": config.swath}


def linear_grad_input(
    grad_out: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: str,
    out_dtype: torch.dtype | None,
    target: Target,
) -> Plan:
    """[M, in_features] and launches."""
    parsed = QuantScheme.parse(scheme)
    m, n = grad_out.shape
    out = torch.empty((m, in_features), dtype=out_dtype or grad_out.dtype, device=grad_out.device)
    product = Product(m, in_features, n, _operand(grad_out), converted=True)
    config = choose(product, target)
    args = (grad_out.contiguous(), *_stored(qweight, scales, zeros), out, m, n, in_features, qweight.shape[1])
    sizes = {**_format(parsed), **_grad_tiles(config)}
    return out, [_launch(matmul_kernels.grad_input_kernel, args, sizes, product, config)]


def int_grad_input(
    q_grad: Tensor,
    grad_scales: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    in_features: int,
    scheme: str,
    column_scales: Tensor | None,
    out_dtype: torch.dtype | None,
    target: Target,
) -> Plan:
    """[M, in_features] and launches; `weight` is (qweight, scales, zeros)."""
    parsed = QuantScheme.parse(scheme)
    m, n = q_grad.shape
    out = torch.empty((m, in_features), dtype=out_dtype or torch.float32, device=q_grad.device)
    product = Product(m, in_features, n, "int8", converted=True)
    config = choose(product, target)
    columns = None if column_scales is None else column_scales.contiguous()
    args = (
        q_grad.contiguous(),
        grad_scales.contiguous(),
        *_stored(*weight),
        columns,
        out,
        m,
        n,
        in_features,
        weight[0].shape[1],
    )
    sizes = {**_format(parsed), **_grad_tiles(config)}
    return out, [_launch(matmul_kernels.int_grad_input_kernel, args, sizes, product, config)]


def int_grad_weight(
    q_grad: Tensor, grad_scales: Tensor, qx: Tensor, out_dtype: torch.dtype | None, target: Target
) -> Plan:
    """Weight gradient [N, K] from int8 q_grad [M, N], its scales [N] by column, and int8 qx [M, K]; and launches.

    The scales of the activations were multiplied into the gradient before it was quantized.
    """
    (m, n), k = q_grad.shape, qx.shape[1]
    out = torch.empty((n, k), dtype=out_dtype or torch.float32, device=q_grad.device)
    product = Product(n, k, m, "int8", converted=True)
    config = choose(product, target)
    sizes = {
        "TOKENS": TOKENS,
        "BLOCK_M": config.depth,
        "BLOCK_N": config.rows,
        "BLOCK_K": config.columns,
        "SWATH": config.swath,
    }
    args = (q_grad.contiguous(), grad_scales.contiguous(), qx.contiguous(), out, m, n, k)
    return out, [_launch(matmul_kernels.int_grad_weight_kernel, args, sizes, product, config)]
