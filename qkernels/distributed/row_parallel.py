"""Products with some columns of a weight [N, K]: each process has the columns of x that belong to them.

What has one scale for a whole row of K, activations or weights, must be rounded with the range of that row, which all
processes share; else the result depended on their number. The sums are added over the processes before anything is
rounded: as int32 where a weight has one scale a row, so that the result has the bits of one process.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..autograd.functions import (
    anchors,
    bias_gradient,
    needs_gradient,
    once_differentiable,
    over_leading_dimensions,
    save,
)
from ..autograd.int8_gradients import LinearWeight, input_gradient, weight_gradient
from ..formats.philox import draw_seed
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..kernels import ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Integers up to this magnitude are float32 numbers.
_EXACT = 2**24


class Columns(NamedTuple):
    """Some columns of a weight, and the processes that have the others.

    Attributes:
        stored: the canonical storage of these columns.
        scheme: of the weight.
        group: the processes.
        column_scales: `ops.column_scales` of these columns, for an integer gradient under `-g` schemes; else None.
        x_scale: float32 [1] under static activations (`a8s` schemes), else None.
    """

    stored: QuantizedWeight
    scheme: QuantScheme
    group: ProcessGroup
    column_scales: Tensor | None = None
    x_scale: Tensor | None = None


def all_reduce(tensor: Tensor, operation: str, group: ProcessGroup) -> Tensor:
    """The sum ("sum") or the extremes ("max", "min") of the tensor over the processes of the group."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(tensor.contiguous(), operation, group))


def whole_range(x: Tensor, group: ProcessGroup) -> Tensor:
    """[M, 1]: the largest magnitude of each whole row, of which x [M, k] is a part; NaN where the row holds one."""
    bits = x.abs().amax(dim=1, keepdim=True).to(torch.float32).view(torch.int32)  # ordered, with NaN above infinity
    return all_reduce(bits, "max", group).view(torch.float32)


def quantize_activation(
    x: Tensor, scheme: QuantScheme, group: ProcessGroup, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """These columns of `ops.quantize_activation` of the whole rows: int8 [M, k] and float32 [M, 1].

    Args:
        x: float [M, k], some columns of [M, K].
        scheme: an `a8` scheme with one scale a row.
        x_scale: float32 [1] under static activations, else None.
    """
    if x_scale is not None:
        q, scales = ops.quantize_activation(x, scheme, x_scale)
        not_finite = all_reduce(scales.isnan().to(torch.int32), "max", group)  # in another part of the row, perhaps
        return q, torch.where(not_finite > 0, torch.nan, scales)
    with_range = torch.cat([x, whole_range(x, group).to(x.dtype)], dim=1)
    q, scales = ops.quantize_activation(with_range, scheme)
    return q[:, :-1], scales


def with_weight_range(weight: Tensor, group: ProcessGroup) -> Tensor:
    """[N, k + 2]: columns of a float weight, then the least and the greatest value of each whole row."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    return torch.cat([weight, all_reduce(low, "min", group), all_reduce(high, "max", group)], dim=1)


def quantize_weight(weight: Tensor, scheme: QuantScheme, group: ProcessGroup) -> QuantizedWeight:
    """These columns of `ops.quantize_weight` of the whole rows, for float weight [N, k]."""
    if scheme.group_size is not None:
        return ops.quantize_weight(weight, scheme.name)
    stored = ops.quantize_weight(with_weight_range(weight, group), scheme.name)
    return stored._replace(qweight=stored.qweight[:, : scheme.packed_features(weight.shape[1])].contiguous())


def _mask_clipped(grad: Tensor, weight: Tensor, scheme: QuantScheme, group: ProcessGroup) -> Tensor:
    if scheme.group_size is not None:
        return ops.mask_clipped(grad, weight, scheme.name)
    with_columns = torch.nn.functional.pad(grad, (0, 2))
    return ops.mask_clipped(with_columns, with_weight_range(weight, group), scheme.name)[:, : weight.shape[1]]


def product(
    x: Tensor, weight: Columns, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`ops.linear` of the whole rows, [M, N] on every process; and, for the gradient of the weight, x quantized.

    Under schemes with one scale a row, for weight and activations, the result has the bits of one process. Under others
    the float32 sums of the processes are added, in an order that their number decides.

    Args:
        x: float [M, k].
        weight: the columns [N, k].
        bias: float [N] or None, the same on every process.
        out_dtype: of the result.

    Returns:
        [M, N], and of `a8` schemes int8 [M, k] and float32 [M], as `ops.linear_with_saved_input` returns them.
    """
    stored, scheme, group, _, x_scale = weight
    if not scheme.int_activations:
        sums = all_reduce(ops.linear(x, *stored, None, scheme.name, torch.float32), "sum", group)
        return _finish(sums, bias, out_dtype), None, None
    if scheme.act_group_size is not None:
        part, q, x_scales = ops.linear_with_saved_input(x, *stored, None, scheme.name, torch.float32)
        return _finish(all_reduce(part, "sum", group), bias, out_dtype), q, x_scales
    q, x_scales = quantize_activation(x, scheme, group, x_scale)
    if scheme.row_scaled:
        sums = all_reduce(integer_sums(q, stored, scheme), "sum", group).to(torch.float32)
        out = sums * (x_scales * stored.scales.t())
    else:
        out = all_reduce(_of_integers(q, stored, scheme), "sum", group) * x_scales
    return _finish(out, bias, out_dtype), q, x_scales.flatten()


def _finish(sums: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Rule 5 of docs/numerics.md."""
    return (sums if bias is None else sums + bias.to(torch.float32)).to(out_dtype)


def _of_integers(q: Tensor, weight: QuantizedWeight, scheme: QuantScheme) -> Tensor:
    """float32 [M, N]: `ops.linear` of int8 q [M, k] whose scale is 1."""
    one = torch.ones(1, dtype=torch.float32, device=q.device)
    given_scale = dataclasses.replace(scheme, static_activations=True)
    return ops.linear(q.to(torch.float32), *weight, None, given_scale, x_scale=one)


def integer_sums(q: Tensor, weight: QuantizedWeight, scheme: QuantScheme) -> Tensor:
    """int32 [M, N]: the sums of the products of int8 q [M, k] and the integers of a weight with one scale a row.

    The kernels return float32. So that no sum exceeds 2^24, q is multiplied as 16 * high + low where k is large, with
    so many columns at a time that those sums (|high|, |low| <= 8) do not either.
    """
    weight_format = scheme.weight_format
    unscaled = weight._replace(scales=torch.ones_like(weight.scales))
    if q.shape[1] * 127 * weight_format.largest <= _EXACT:
        return _of_integers(q, unscaled, scheme).to(torch.int32)
    high = (q.to(torch.int16) + 8 >> 4).to(torch.int8)
    parts = torch.cat([high, q - 16 * high])
    sums = torch.zeros(len(parts), len(weight.qweight), dtype=torch.int32, device=q.device)
    step = _EXACT // (8 * weight_format.largest) // weight_format.per_byte * weight_format.per_byte
    for start in range(0, q.shape[1], step):
        packed = slice(start // weight_format.per_byte, (start + step) // weight_format.per_byte)
        block = unscaled._replace(qweight=weight.qweight[:, packed].contiguous())
        sums += _of_integers(parts[:, start : start + step], block, scheme).to(torch.int32)
    high_sums, low_sums = sums.chunk(2)
    return 16 * high_sums + low_sums


class _RowParallelLinear(torch.autograd.Function):
    """`product` with gradients to x, bias and, if it is trained, the weight: those of one process, of these columns.

    No gradient is exchanged: that of the output is the same on every process, and each has the columns of x and of the
    weight that its own products need.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        scales: Tensor | None,
        bias: Tensor | None,
        columns: Columns,
        out_dtype: torch.dtype,
        seed: Tensor | None,
        *graphs: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return product(x, columns, bias, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, scales, bias, columns, _, seed, *graphs = inputs
        _, q, x_scales = output
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        stored, ctx.scheme, ctx.group, column_scales, _ = columns
        trained = weight is not None
        clips = trained and (ctx.scheme.weight_bits == 4 or scales is not None)
        saved_x = (x if q is None else q) if trained else None
        save(ctx, *stored, column_scales, saved_x, x_scales, weight if clips else None, scales, seed, *graphs)
        ctx.in_features, ctx.x_dtype = x.shape[1], x.dtype
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        *stored, column_scales, saved_x, x_scales, master, scales, seed, _, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_scales, needs_bias = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_scales = grad_bias = None
        if needs_x:
            weight = LinearWeight(QuantizedWeight(*stored), ctx.in_features, ctx.scheme.name, column_scales)
            grad_x = input_gradient(grad_out, weight, seed, ctx.x_dtype)
        if needs_weight or needs_scales:
            grad_weight = weight_gradient(grad_out, saved_x, x_scales, seed, ctx.weight_dtype)
            if scales is not None:
                grad_weight, grad_scales = ops.scale_gradient(grad_weight, master, scales, ctx.scheme.name)
            elif master is not None:
                grad_weight = _mask_clipped(grad_weight, master, ctx.scheme, ctx.group)
        if needs_bias:
            grad_bias = bias_gradient(grad_out, ctx.bias_dtype)
        return grad_x, grad_weight, grad_scales, grad_bias, None, None, None, None, None


def row_parallel_linear(
    x: Tensor,
    columns: Columns,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
    grad_dtype: str = "float",
    trained: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """The output of a layer whose columns are shared out, with straight-through gradients.

    Args:
        x: float [..., k], the columns of the input that belong to the weight's.
        columns: of the weight.
        bias: float [N] or None, the same on every process.
        out_dtype: of the result; None: x.dtype.
        grad_dtype: "float" or "int8", as in `QuantLinear`.
        trained: the float weight [N, k] that `columns` was made of, if it is trained, and its scales, if they are.

    Returns:
        [..., N], the same on every process of the group.
    """
    weight, scales = trained or (None, None)
    dtype = out_dtype or x.dtype
    needs_x, needs_weight, needs_scales, needs_bias = needs_gradient(x, weight, scales, bias)
    out_features = columns.stored.qweight.shape[0]
    if not (needs_x or needs_weight or needs_scales or needs_bias):
        return over_leading_dimensions(_without_gradient, x, out_features, columns, bias, dtype)
    seed = draw_seed() if grad_dtype == "int8" and (needs_x or needs_weight) else None
    graphs = anchors(x if needs_x else None, weight if needs_weight else None)
    return over_leading_dimensions(_with_gradient, x, out_features, weight, scales, bias, columns, dtype, seed, *graphs)


def _with_gradient(*args: Any) -> Tensor:
    return _RowParallelLinear.apply(*args)[0]


def _without_gradient(x: Tensor, columns: Columns, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return product(x, columns, bias, out_dtype)[0]
