"""The launches of the products of fused experts: the kernels of `linear`, with an expert for each tile of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.storage import StoredWeight
from . import matmul_kernels
from .launch import Arguments, Launch
from .matmul_plans import (
    Plan,
    contiguous,
    grad_tiles,
    group_sums,
    operand_of,
    power_of_two,
    quantize_activation,
    tile_sizes,
    weight_format,
)
from .target import Target
from .tiles import MatmulShape, Tile, choose

REASON = "tiles for the rows of an expert, if all had as many"


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
    *,
    device: Target,
) -> Plan:
    """[M, N]: for `a8` schemes the quantization of x, and the products of all experts in one launch."""
    weight, scheme = contiguous(weight), weight.scheme
    experts, n, k = len(weight.qweight), weight.out_features, x.shape[1]
    m = x.shape[0] if rows is None else len(rows)
    out = torch.empty((m, n), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0 or experts == 0:
        return Plan((out.zero_(),), [])
    activation: tuple[Tensor, ...] = (x.contiguous(),)
    launches: list[Launch] = []
    x_sums = None
    operand, group = operand_of(x), scheme.group_size or 0
    if scheme.int_activations:
        (q, x_scales), launches = quantize_activation(x, scheme, weight.x_scale, device=device)
        activation = (q, x_scales)
        if scheme.has_min:
            x_sums, launch = group_sums(activation, scheme)
            launches.append(launch)
        group = min((size for size in (scheme.group_size, scheme.act_group_size) if size), default=0)
        operand = "int8"
    config = choose(MatmulShape(-(-m // experts), n, k, operand, group), device)
    sizes = {**weight_format(scheme), "SLICE": 0, **tile_sizes(config)}
    kernel = matmul_kernels.linear_float_kernel
    if scheme.int_activations:
        kernel, sizes["A_GROUP"] = matmul_kernels.linear_int_kernel, scheme.act_group_size or 0
    shape = (m, n, k, weight.qweight.shape[2])
    bias, index = (None if tensor is None else tensor.contiguous() for tensor in (bias, rows))
    args = (*activation, *weight[:3], bias, out, *shape, offsets.contiguous(), index, experts, x.shape[0])
    if scheme.int_activations:
        args = (*args, x_sums)
    return Plan((out,), [*launches, _launch(kernel, args, sizes, config, (m, n, experts))])


def grouped_linear_grad_input(
    grad_out: Tensor,
    offsets: Tensor,
    weight: StoredWeight,
    seed: Tensor | None = None,
    column_scales: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    device: Target,
) -> Plan:
    """[M, in_features], in float: `dispatch` gives a gradient that is rounded to the reference."""
    weight, (m, n), experts = contiguous(weight), grad_out.shape, len(weight.qweight)
    in_features = weight.in_features
    out = torch.empty((m, in_features), dtype=out_dtype or grad_out.dtype, device=grad_out.device)
    if out.numel() == 0 or experts == 0:
        return Plan((out.zero_(),), [])
    shape = MatmulShape(-(-m // experts), in_features, n, operand_of(grad_out), converted=True)
    config = choose(shape, device)
    sizes = {**weight_format(weight.scheme), **grad_tiles(config)}
    row_bytes = weight.qweight.shape[2]
    args = (grad_out.contiguous(), *weight[:3], out, m, n, in_features, row_bytes, offsets.contiguous(), experts)
    kernel = matmul_kernels.grad_input_kernel
    return Plan((out,), [_launch(kernel, args, sizes, config, (m, in_features, experts))])


def _launch(kernel: Any, args: Arguments, sizes: dict[str, Any], config: Tile, shape: tuple[int, int, int]) -> Launch:
    """Of a product [m, columns]: `rows_of_expert` says how many tiles of rows there may be."""
    m, columns, experts = shape
    grid = ((m // config.rows + experts + 1) * -(-columns // config.columns),)
    constants = {**sizes, "EXPERTS": power_of_two(experts + 1)}
    return Launch(kernel, grid, args, constants, config.num_warps, config.num_stages, f"{config.reason}; {REASON}")
