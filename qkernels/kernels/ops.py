"""The one Python door to `torch.ops.qkernels.*`: wrappers, fake kernels and the reference on every device.

The schemas and the CPU kernels live in `csrc/torch/ops.cpp`; they take a scheme as its `QuantScheme.code`, for torch
leaks the memory of each string that it hands to such a kernel. On GPUs `dispatch.py` chooses; devices without a kernel
of their own run `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme, scheme_code
from ..formats.storage import QuantizedWeight
from . import arguments, checks, dispatch, extensions, results
from .arguments import ConvGeometry

extensions.require("_C")  # registers the schemas and the CPU kernels
_ops = torch.ops.qkernels
_LIBRARY = torch.library.Library("qkernels", "IMPL")


def _call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator; where no gradient is wanted, past its autograd kernel, which is Python and only refuses."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return op(*args, **kwargs)
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args):
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def quantize_activation(x: Tensor, scheme: str | QuantScheme, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize float x [M, K] to int8 [M, K] with float32 scales [M, groups]; `x_scale` [1] is for `a8s` schemes.

    `formats.rules.quantize_activation` is the definition.
    """
    return _call(_ops.quantize_activation.default, x, scheme_code(scheme), x_scale)


def dequantize_weight(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str | QuantScheme
) -> Tensor:
    """float32 [N, in_features]: the weight as it is multiplied."""
    return _call(_ops.dequantize_weight.default, qweight, scales, zeros, in_features, scheme_code(scheme))


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` on the quantized weight, without a gradient (see `autograd.quant_linear`).

    Args:
        x: float32, bfloat16 or float16 [M, K].
        qweight, scales, zeros: the canonical storage of a weight [N, K] (`QuantScheme.storage_shapes`). Values are
            not looked at: with a zero point above 15 the result is unspecified.
        bias: float [N] or None.
        scheme: the scheme or its canonical name.
        out_dtype: dtype of the result; None: x.dtype.
        x_scale: float32 [1], the scale of the activations, for `a8s` schemes only.

    Returns:
        [M, N].

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    return _call(_ops.linear.default, x, qweight, scales, zeros, bias, scheme_code(scheme), out_dtype, x_scale)


def linear_with_saved_input(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear` of an `a8` scheme, and x as the gradient of the weight needs it.

    Args:
        As in `linear`.

    Returns:
        The result of `linear`, int8 [M, K] and float32 [M]: x with one scale a row. Under `-ag` its integers are made
        anew for the largest scale of the row.

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    args = (qweight, scales, zeros, bias, scheme_code(scheme), out_dtype, x_scale)
    return _call(_ops.linear_with_saved_input.default, x, *args)


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    out_dtype: torch.dtype | None = None,
    *,
    rows: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """The products of E fused experts, each of which multiplies its own rows as `linear` would, without a gradient.

    Row m of the result is `x[rows[m]] @ weight[e].T + bias[e]` for the expert e it belongs to: rows are sorted by
    expert, and those of expert e end before row `offsets[e]`. The bits are those of `linear` on the rows of each expert
    (of `a8` schemes; sums of floats may differ, for another number of rows may take another kernel). Every row of x is
    quantized once, however many experts take it; an expert without rows costs nothing, and its weight is not read. See
    `autograd.grouped_linear` for the gradients.

    Args:
        x: float32, bfloat16 or float16 [T, K].
        offsets: int64 [E], ascending, at most M: the running sum of the rows of each expert. Rows from `offsets[-1]`
            on belong to no expert and become 0.
        qweight, scales, zeros: the canonical storage of each expert's weight [N, K], one after the other: [E, N, ...].
        bias: float [E, N] or None.
        scheme: the scheme or its canonical name.
        out_dtype: dtype of the result; None: x.dtype.
        rows: int64 [M] in [0, T): the row of x that each row of the result multiplies, those of no expert included.
            None: the rows of x as they are, M = T.
        x_scale: float32 [1], the scale of the activations, for `a8s` schemes only.

    Returns:
        [M, N].

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    args = (qweight, scales, zeros, bias, scheme_code(scheme), out_dtype, rows, x_scale)
    return _call(_ops.grouped_linear.default, x, offsets, *args)


def grouped_linear_grad_input(
    grad_out: Tensor,
    offsets: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: str | QuantScheme,
    seed: Tensor | None = None,
    *,
    column_scales: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of `grouped_linear` with respect to the row of x that each row multiplied.

    Args:
        grad_out: float [M, N], rows sorted by expert.
        offsets, qweight, scales, zeros, scheme: as in `grouped_linear`.
        in_features: K.
        seed: int64 of shape []: `grad_out` is rounded stochastically to int8 (rule 12 of docs/numerics.md); None:
            floats are multiplied.
        column_scales: float32 [E, K], what `column_scales` returns for each expert; for `-g` schemes with a seed only.
        out_dtype: dtype of the result; None: grad_out.dtype.

    Returns:
        [M, in_features]; 0 in rows of no expert. Where several rows multiplied one row of x, their sum is its gradient.

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    weight = (qweight, scales, zeros, in_features, scheme_code(scheme))
    op = _ops.grouped_linear_grad_input.default
    return _call(op, grad_out, offsets, *weight, seed, column_scales, out_dtype=out_dtype)


def grouped_linear_grad_weight(
    grad_out: Tensor,
    offsets: Tensor,
    qx: Tensor,
    x_scales: Tensor,
    rows: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of `grouped_linear` with respect to the weights.

    Args:
        grad_out: float [M, N], rows sorted by expert.
        offsets: int64 [E], rows: int64 [M] or None, as in `grouped_linear`.
        qx, x_scales: int8 [T, K] and float32 [T]: x with one scale a row, as `linear_with_saved_input` returns it.
        seed: int64 of shape []: `grad_out` is rounded stochastically to int8 (rule 12 of docs/numerics.md); None:
            floats are multiplied.
        out_dtype: dtype of the result; None: grad_out.dtype.

    Returns:
        [E, N, K]; 0 for experts without rows.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    op = _ops.grouped_linear_grad_weight.default
    return _call(op, grad_out, offsets, qx, x_scales, rows, seed, out_dtype=out_dtype)


def grouped_outer(grad_out: Tensor, offsets: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """`grad_out.T @ x` of the rows of each expert: the gradient of the weights of products of floats.

    Args:
        grad_out: float [M, N], rows sorted by expert.
        offsets: int64 [E], rows: int64 [M] or None, as in `grouped_linear`.
        x: float [T, K]; the products are those of its dtype.

    Returns:
        [E, N, K] of x.dtype; 0 for experts without rows.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    return _call(_ops.grouped_outer.default, grad_out, offsets, x, rows)


def conv(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    geometry: ConvGeometry,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """Convolution of images with a quantized weight, without a gradient (see `autograd.quant_conv`).

    Args:
        x: float32, bfloat16 or float16 [N, H, W, C], of any strides: a permuted [N, C, H, W] is read as it lies.
        qweight, scales, zeros: the canonical storage of a weight [O, K], whose columns are the taps of the kernel, row
            by row, and of each tap the C / groups channels.
        bias: float [O] or None.
        scheme: the scheme or its canonical name, without activation groups.
        geometry: how the kernel moves.
        out_dtype: dtype of the result; None: x.dtype.
        x_scale: float32 [1], the scale of all images, for `a8s` schemes only.

    Returns:
        [N, H_out, W_out, O], contiguous.

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    args = (qweight, scales, zeros, bias, scheme_code(scheme), geometry, out_dtype, x_scale)
    return _call(_ops.conv.default, x, *args)


def quantize_weight(weight: Tensor, scheme: str | QuantScheme) -> QuantizedWeight:
    """The canonical storage of a float weight [N, K] (rules 1 to 3 of docs/numerics.md).

    The operator below returns zeros as uint8 [N, 0] for symmetric schemes, because an operator cannot return None.

    Raises:
        RuntimeError: if the weight is not a float matrix with K >= 1, or holds NaN or Inf.
        ValueError: for an unknown scheme.
    """
    qweight, scales, zeros = _call(_ops.quantize_weight.default, weight, scheme_code(scheme))
    return QuantizedWeight(qweight, scales, None if QuantScheme.parse(scheme).symmetric else zeros)


def mask_clipped(grad: Tensor, weight: Tensor, scheme: str | QuantScheme) -> Tensor:
    """Straight-through gradient of quantizing a weight to 4 bits.

    Args:
        grad: float [N, K] with respect to the quantized weight.
        weight: float [N, K] that was quantized.
        scheme: a `w4` scheme.

    Returns:
        grad where the rounded integer was in range, and 0 where clamping changed it.

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    return _call(_ops.mask_clipped.default, grad, weight, scheme_code(scheme))


def quantize_weight_scaled(weight: Tensor, scales: Tensor, scheme: str | QuantScheme) -> Tensor:
    """`qweight` of the canonical storage of float `weight [N, K]` for given float32 `scales [N, groups]`.

    Raises:
        RuntimeError: naming the argument that does not fit; for an asymmetric scheme; for NaN or Inf in either.
        ValueError: for an unknown scheme.
    """
    return _call(_ops.quantize_weight_scaled.default, weight, scales, scheme_code(scheme))


def scale_gradient(grad: Tensor, weight: Tensor, scales: Tensor, scheme: str | QuantScheme) -> tuple[Tensor, Tensor]:
    """Straight-through gradient of `dequantize(quantize_weight_scaled(weight, scales))`: learned step size.

    Args:
        grad: float [N, K] with respect to that weight.
        weight, scales, scheme: as in `quantize_weight_scaled`.

    Returns:
        grad where nothing was clamped, else 0, of its dtype; and float32 [N, groups] (rule 11 of docs/numerics.md).
    """
    return _call(_ops.scale_gradient.default, grad, weight, scales, scheme_code(scheme))


def linear_grad_input(
    grad_out: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: str | QuantScheme,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of `linear` with respect to x: float `grad_out [M, N]` -> [M, in_features]."""
    return _call(
        _ops.linear_grad_input.default, grad_out, qweight, scales, zeros, in_features, scheme_code(scheme), out_dtype
    )


def column_scales(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str | QuantScheme
) -> Tensor:
    """float32 [in_features]: the largest magnitude of each column of the weight / 127, for `int_grad_input`."""
    return _call(_ops.column_scales.default, qweight, scales, zeros, in_features, scheme_code(scheme))


def int_grad_input(
    q_grad: Tensor,
    grad_scales: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: str | QuantScheme,
    column_scales: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient with respect to x from a gradient that is quantized already: an exact integer product.

    Args:
        q_grad: int8 [M, N], N at most 131072.
        grad_scales: float32 [M]. If the weight has one scale per row, that scale was multiplied into the gradient
            before it was quantized.
        qweight, scales, zeros: the canonical storage of a weight [N, in_features].
        scheme: the scheme or its canonical name; only the format of the weight matters.
        column_scales: what the function of this name returns for the weight; for `-g` schemes only, whose weight is
            requantized with it.
        out_dtype: dtype of the result; None: float32.

    Returns:
        [M, in_features].

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    return _call(
        _ops.int_grad_input.default,
        q_grad,
        grad_scales,
        qweight,
        scales,
        zeros,
        in_features,
        scheme_code(scheme),
        column_scales,
        out_dtype=out_dtype,
    )


def linear_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    dither: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cross entropy of each row of `linear(hidden)`, and its gradient to that row, without holding the logits.

    Args:
        hidden: float32, bfloat16 or float16 [M, K].
        target: int64 [M], in [0, N) or `ignore_index`.
        qweight, scales, zeros: the canonical storage of a weight [N, K].
        bias: float [N] or None.
        scheme: the scheme or its canonical name.
        dither: int64 [M], taken modulo 2^32, where the gradient's rounding starts in each row (docs/numerics.md,
            rule 7); uniform random numbers make the rounding unbiased. None: no gradient.
        x_scale: float32 [1], the scale of the hidden states, for `a8s` schemes only.
        softcap: c of `c * tanh(logit / c)`, at least 2^-126; it is rounded to float32. 0 and what rounds to infinity:
            none. Not together with `label_smoothing`.
        z_loss: weight of the squared log-sum-exp.
        label_smoothing: share of the target that is spread over all classes.
        ignore_index: rows with this target have loss 0 and gradient 0.

    Returns:
        float32: loss [M], log-sum-exp [M] (0 in ignored rows), gradient [M, K] of each row's loss ([0, K] without
        dither).

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    options = {"softcap": softcap, "z_loss": z_loss, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    return _call(
        _ops.linear_cross_entropy.default,
        hidden,
        target,
        qweight,
        scales,
        zeros,
        bias,
        scheme_code(scheme),
        dither,
        x_scale,
        **options,
    )


def quantize_rows_stochastic(
    x: Tensor, column_factors: Tensor | None, seed: Tensor, rng_stream: int
) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 with stochastic rounding: the mean over seeds is what is quantized.

    Args:
        x: float [M, N].
        column_factors: float32 [N] that the columns are multiplied with before; None: ones.
        seed: int64 of shape [], see `formats.philox.draw_seed`.
        rng_stream: which of the seed's independent random numbers, see `stochastic`.

    Returns:
        int8 [M, N] and float32 scales [M]. A row that holds Inf or NaN has q = 0 and scale NaN.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    return _call(_ops.quantize_rows_stochastic.default, x, column_factors, seed, rng_stream)


def quantize_columns_stochastic(
    x: Tensor, row_factors: Tensor | None, seed: Tensor, rng_stream: int
) -> tuple[Tensor, Tensor]:
    """Quantize each column to int8 with stochastic rounding, transposed; see `quantize_rows_stochastic`.

    Args:
        x: float [M, N].
        row_factors: float32 [M] that the rows are multiplied with before; None: ones.
        seed, rng_stream: as in `quantize_rows_stochastic`.

    Returns:
        int8 [N, M] and float32 scales [N].

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    return _call(_ops.quantize_columns_stochastic.default, x, row_factors, seed, rng_stream)


def _register(name: str) -> None:
    """The kernels of an operator that are written in Python, all of which check the arguments alike.

    Fake tensors get results without values; devices that have no kernel of their own, and tensors of other layouts,
    which are refused, come to the reference; CUDA and ROCm tensors to what `dispatch.select` chooses.
    """
    check, result = getattr(checks, name), getattr(results, name)
    on_reference = dispatch.Choice("reference", "")

    def fake(*args: Any, **kwargs: Any) -> Any:
        args = arguments.bundle(name, args)
        check(*args, **kwargs)
        return result(*args, **kwargs)

    def run_reference(*args: Any, **kwargs: Any) -> Any:
        checks.check_strided(arguments.names(name), args)
        bundled = arguments.bundle(name, args)
        check(*bundled, **kwargs)
        return dispatch.run(name, on_reference, args, kwargs, bundled)

    def run_gpu(*args: Any, **kwargs: Any) -> Any:
        bundled = arguments.bundle(name, args)
        check(*bundled, **kwargs)
        choice = dispatch.select(dispatch.facts_of(args[0].device), dispatch.call_of(name, args))
        return dispatch.run(name, choice, args, kwargs, bundled)

    def backward(ctx: Any, *grads: Tensor | None) -> None:
        instead = _DIFFERENTIABLE.get(name, "qkernels.autograd.trained_linear, or a layer")
        raise RuntimeError(f"qkernels::{name} has no gradient of its own; use {instead}")

    torch.library.register_fake(f"qkernels::{name}", fake)
    torch.library.register_autograd(f"qkernels::{name}", backward, lib=_LIBRARY)
    _LIBRARY.impl(name, run_reference, "CompositeExplicitAutograd")
    for key in ("AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA"):
        _LIBRARY.impl(name, run_reference, key)
    _LIBRARY.impl(name, run_gpu, "CUDA")


# The function to use, for its gradient, in place of an operator that was called by itself.
_DIFFERENTIABLE = {
    "linear": "qkernels.autograd.quant_linear, or a QuantLinear",
    "grouped_linear": "qkernels.autograd.experts.grouped_linear",
    "conv": "qkernels.autograd.quant_conv, or a QuantConv2d",
    "linear_with_saved_input": "qkernels.autograd.trained_linear, or a QuantLinear of mode 'qat' or 'int8'",
    "linear_cross_entropy": "qkernels.linear_cross_entropy",
}

for _name in (
    "quantize_activation",
    "dequantize_weight",
    "linear",
    "linear_grad_input",
    "grouped_linear",
    "grouped_linear_grad_input",
    "grouped_linear_grad_weight",
    "grouped_outer",
    "column_scales",
    "conv",
    "int_grad_input",
    "linear_cross_entropy",
    "linear_with_saved_input",
    "mask_clipped",
    "quantize_weight",
    "quantize_weight_scaled",
    "scale_gradient",
    "quantize_rows_stochastic",
    "quantize_columns_stochastic",
):
    _register(_name)
