"""The one Python door to `torch.ops.qkernels.*`: wrappers, fake kernels and the reference on every device.

The schemas and the CPU kernels live in `csrc/ops.cpp`; they take a scheme as its `QuantScheme.code`, for torch leaks
the memory of each string that it hands to such a kernel. On GPUs `dispatch.py` chooses; devices without a kernel of
their own run `reference.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks, dispatch, extensions
from .checks import check_weight as check_weight
from .quantize import FLOAT_DTYPES, MAX_REDUCTION
from .schemes import QuantScheme, scheme_code

extensions.require("_C")  # registers the schemas and the CPU kernels
_ops = torch.ops.qkernels
_LIBRARY = torch.library.Library("qkernels", "IMPL")


def quantize_activation(x: Tensor, scheme: str | QuantScheme) -> tuple[Tensor, Tensor]:
    """Quantize float x [M, K] to int8 [M, K] with float32 scales [M, groups]; see `quantize.quantize_activation`."""
    return _ops.quantize_activation.default(x, scheme_code(scheme))


def dequantize_weight(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str | QuantScheme
) -> Tensor:
    """float32 [N, in_features]: the weight as it is multiplied."""
    return _ops.dequantize_weight.default(qweight, scales, zeros, in_features, scheme_code(scheme))


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ weight.T + bias` on the quantized weight, without a gradient (see `autograd.quant_linear`).

    Args:
        x: float32, bfloat16 or float16 [M, K].
        qweight, scales, zeros: the canonical storage of a weight [N, K] (`QuantScheme.storage_shapes`).
        bias: float [N] or None.
        scheme: the scheme or its canonical name.
        out_dtype: dtype of the result; None: x.dtype.

    Returns:
        [M, N].

    Raises:
        RuntimeError: naming the argument that does not fit.
        ValueError: for an unknown scheme.
    """
    return _ops.linear.default(x, qweight, scales, zeros, bias, scheme_code(scheme), out_dtype)


def linear_saving(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str | QuantScheme,
    out_dtype: torch.dtype | None = None,
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
    return _ops.linear_saving.default(x, qweight, scales, zeros, bias, scheme_code(scheme), out_dtype)


def quantize_weight(weight: Tensor, scheme: str | QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize.quantize_weight` by the kernels; zeros is uint8 [N, 0] for symmetric schemes.

    Raises:
        RuntimeError: if the weight is not a float matrix with K >= 1, or holds NaN or Inf.
        ValueError: for an unknown scheme.
    """
    return _ops.quantize_weight.default(weight, scheme_code(scheme))


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
    return _ops.mask_clipped.default(grad, weight, scheme_code(scheme))


def quantize_weight_scaled(weight: Tensor, scales: Tensor, scheme: str | QuantScheme) -> Tensor:
    """`qweight` of the canonical storage of float `weight [N, K]` for given float32 `scales [N, groups]`.

    Raises:
        RuntimeError: naming the argument that does not fit; for an asymmetric scheme; for NaN or Inf in either.
        ValueError: for an unknown scheme.
    """
    return _ops.quantize_weight_scaled.default(weight, scales, scheme_code(scheme))


def scale_gradient(grad: Tensor, weight: Tensor, scales: Tensor, scheme: str | QuantScheme) -> tuple[Tensor, Tensor]:
    """Straight-through gradient of `dequantize(quantize_weight_scaled(weight, scales))`: learned step size.

    Args:
        grad: float [N, K] with respect to that weight.
        weight, scales, scheme: as in `quantize_weight_scaled`.

    Returns:
        grad where nothing was clamped, else 0, of its dtype; and float32 [N, groups] (rule 11 of docs/numerics.md).
    """
    return _ops.scale_gradient.default(grad, weight, scales, scheme_code(scheme))


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
    return _ops.linear_grad_input.default(grad_out, qweight, scales, zeros, in_features, scheme_code(scheme), out_dtype)


def column_scales(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str | QuantScheme
) -> Tensor:
    """float32 [in_features]: the largest magnitude of each column of the weight / 127, for `int_grad_input`."""
    return _ops.column_scales.default(qweight, scales, zeros, in_features, scheme_code(scheme))


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
    return _ops.int_grad_input.default(
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
    return _ops.linear_cross_entropy.default(
        hidden, target, qweight, scales, zeros, bias, scheme_code(scheme), dither, **options
    )


def quantize_rows(x: Tensor, column_factors: Tensor | None, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 with stochastic rounding: the mean over seeds is what is quantized.

    Args:
        x: float [M, N].
        column_factors: float32 [N] that the columns are multiplied with before; None: ones.
        seed: int64 of shape [], see `stochastic.draw_seed`.
        stream: which of the seed's independent random numbers, see `stochastic`.

    Returns:
        int8 [M, N] and float32 scales [M]. A row that holds Inf or NaN has q = 0 and scale NaN.

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    return _ops.quantize_rows.default(x, column_factors, seed, stream)


def quantize_columns(x: Tensor, row_factors: Tensor | None, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Quantize each column to int8 with stochastic rounding, transposed; see `quantize_rows`.

    Args:
        x: float [M, N].
        row_factors: float32 [M] that the rows are multiplied with before; None: ones.
        seed, stream: as in `quantize_rows`.

    Returns:
        int8 [N, M] and float32 scales [N].

    Raises:
        RuntimeError: naming the argument that does not fit.
    """
    return _ops.quantize_columns.default(x, row_factors, seed, stream)


@torch.library.register_fake("qkernels::quantize_activation")
def _quantize_activation_fake(x: Tensor, scheme: int) -> tuple[Tensor, Tensor]:
    parsed = QuantScheme.from_code(scheme)
    torch._check(parsed.int_activations, lambda: f"scheme must be an a8 scheme, got {parsed}")
    checks.check_matrix("x", x)
    rows, columns = x.shape
    torch._check(columns >= 1, lambda: f"x must have at least 1 column, got shape {list(x.shape)}")
    scales = x.new_empty((rows, parsed.act_groups(columns)), dtype=torch.float32)
    return x.new_empty((rows, columns), dtype=torch.int8), scales


@torch.library.register_fake("qkernels::dequantize_weight")
def _dequantize_weight_fake(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: int
) -> Tensor:
    checks.check_weight(qweight, scales, zeros, in_features, QuantScheme.from_code(scheme))
    return scales.new_empty((qweight.shape[0], in_features), dtype=torch.float32)


@torch.library.register_fake("qkernels::linear")
def _linear_fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    checks.check_matrix("x", x)
    checks.check_out_dtype(out_dtype)
    parsed = QuantScheme.from_code(scheme)
    checks.check_weight(qweight, scales, zeros, x.shape[1], parsed)
    checks.check_device("qweight", qweight, x.device)
    torch._check(
        not parsed.int_activations or x.shape[1] <= MAX_REDUCTION,
        lambda: f"in_features must be at most {MAX_REDUCTION} for exact int32 sums, got {x.shape[1]}",
    )
    out_features = qweight.shape[0]
    if bias is not None:
        torch._check(
            bias.shape == (out_features,) and bias.dtype in FLOAT_DTYPES,
            lambda: f"bias must be a float vector of {out_features}, got {bias.dtype} of shape {list(bias.shape)}",
        )
        checks.check_device("bias", bias, x.device)
    return x.new_empty((x.shape[0], out_features), dtype=out_dtype or x.dtype)


@torch.library.register_fake("qkernels::linear_saving")
def _linear_saving_fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: int,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _linear_fake(x, qweight, scales, zeros, bias, scheme, out_dtype)
    parsed = QuantScheme.from_code(scheme)
    torch._check(parsed.int_activations, lambda: f"scheme must be an a8 scheme, got {parsed}")
    return out, x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("qkernels::quantize_weight")
def _quantize_weight_fake(weight: Tensor, scheme: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_matrix("weight", weight)
    rows, columns = weight.shape
    torch._check(columns >= 1, lambda: f"weight must have at least 1 column, got shape {list(weight.shape)}")
    parsed = QuantScheme.from_code(scheme)
    shapes = parsed.storage_shapes(columns, rows)
    qweight = weight.new_empty(shapes["qweight"], dtype=torch.int8 if parsed.weight_bits == 8 else torch.uint8)
    zeros = weight.new_empty(shapes.get("zeros", (rows, 0)), dtype=torch.uint8)
    return qweight, weight.new_empty(shapes["scales"], dtype=torch.float32), zeros


@torch.library.register_fake("qkernels::mask_clipped")
def _mask_clipped_fake(grad: Tensor, weight: Tensor, scheme: int) -> Tensor:
    parsed = QuantScheme.from_code(scheme)
    torch._check(parsed.weight_bits == 4, lambda: f"scheme must be a w4 scheme, got {parsed}")
    checks.check_matrix("weight", weight)
    checks.check_matrix("grad", grad, columns=weight.shape[1])
    torch._check(
        grad.shape[0] == weight.shape[0],
        lambda: f"grad must have {weight.shape[0]} rows, got shape {list(grad.shape)}",
    )
    checks.check_device("weight", weight, grad.device)
    return grad.new_empty(grad.shape)


def _check_scaled(weight: Tensor, scales: Tensor, scheme: int) -> QuantScheme:
    checks.check_matrix("weight", weight)
    parsed = QuantScheme.from_code(scheme)
    torch._check(parsed.symmetric, lambda: f"scheme must be symmetric, got {parsed}")
    expected = (weight.shape[0], parsed.weight_groups(weight.shape[1]))
    torch._check(weight.shape[1] > 0, lambda: f"weight must have at least one column, got {list(weight.shape)}")
    torch._check(
        scales.dtype == torch.float32 and scales.shape == expected,
        lambda: f"scales must be torch.float32 of shape {list(expected)}, got {scales.dtype} of {list(scales.shape)}",
    )
    checks.check_device("scales", scales, weight.device)
    return parsed


@torch.library.register_fake("qkernels::quantize_weight_scaled")
def _quantize_weight_scaled_fake(weight: Tensor, scales: Tensor, scheme: int) -> Tensor:
    parsed = _check_scaled(weight, scales, scheme)
    dtype = torch.int8 if parsed.weight_bits == 8 else torch.uint8
    return weight.new_empty((weight.shape[0], parsed.packed_features(weight.shape[1])), dtype=dtype)


@torch.library.register_fake("qkernels::scale_gradient")
def _scale_gradient_fake(grad: Tensor, weight: Tensor, scales: Tensor, scheme: int) -> tuple[Tensor, Tensor]:
    _check_scaled(weight, scales, scheme)
    checks.check_matrix("grad", grad, columns=weight.shape[1])
    torch._check(
        grad.shape[0] == weight.shape[0],
        lambda: f"grad must have {weight.shape[0]} rows, got shape {list(grad.shape)}",
    )
    checks.check_device("weight", weight, grad.device)
    return grad.new_empty(grad.shape), torch.empty_like(scales, memory_format=torch.contiguous_format)


@torch.library.register_fake("qkernels::linear_grad_input")
def _linear_grad_input_fake(
    grad_out: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    checks.check_weight(qweight, scales, zeros, in_features, QuantScheme.from_code(scheme))
    checks.check_matrix("grad_out", grad_out, columns=qweight.shape[0])
    checks.check_out_dtype(out_dtype)
    checks.check_device("qweight", qweight, grad_out.device)
    return grad_out.new_empty((grad_out.shape[0], in_features), dtype=out_dtype or grad_out.dtype)


@torch.library.register_fake("qkernels::column_scales")
def _column_scales_fake(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: int) -> Tensor:
    checks.check_weight(qweight, scales, zeros, in_features, QuantScheme.from_code(scheme))
    return scales.new_empty((in_features,), dtype=torch.float32)


@torch.library.register_fake("qkernels::int_grad_input")
def _int_grad_input_fake(
    q_grad: Tensor,
    grad_scales: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    scheme: int,
    column_scales: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    parsed = QuantScheme.from_code(scheme)
    checks.check_weight(qweight, scales, zeros, in_features, parsed)
    out_features = qweight.shape[0]
    torch._check(
        out_features <= MAX_REDUCTION,
        lambda: f"qweight must have at most {MAX_REDUCTION} rows for exact int32 sums, got {list(qweight.shape)}",
    )
    torch._check(
        q_grad.dtype == torch.int8 and q_grad.dim() == 2 and q_grad.shape[1] == out_features,
        lambda: (
            f"q_grad must be torch.int8 with {out_features} columns, got {q_grad.dtype} of shape {list(q_grad.shape)}"
        ),
    )
    checks.check_device("qweight", qweight, q_grad.device)
    checks.check_vector("grad_scales", grad_scales, q_grad.shape[0], q_grad.device)
    if parsed.group_size is None:
        torch._check(column_scales is None, lambda: f"column_scales must be None for scheme {parsed}")
    else:
        torch._check(column_scales is not None, lambda: f"column_scales is required for scheme {parsed}")
        checks.check_vector("column_scales", column_scales, in_features, q_grad.device)
    checks.check_out_dtype(out_dtype)
    return q_grad.new_empty((q_grad.shape[0], in_features), dtype=out_dtype or torch.float32)


@torch.library.register_fake("qkernels::linear_cross_entropy")
def _linear_cross_entropy_fake(
    hidden: Tensor,
    target: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: int,
    dither: Tensor | None = None,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    _linear_fake(hidden, qweight, scales, zeros, bias, scheme)
    rows, columns = hidden.shape
    for name, tensor in (("target", target), ("dither", dither)):
        if tensor is not None:
            torch._check(
                tensor.dtype == torch.int64 and tensor.shape == (rows,),
                lambda name=name, tensor=tensor: (
                    f"{name} must be torch.int64 of shape [{rows}], got {tensor.dtype} of shape {list(tensor.shape)}"
                ),
            )
            checks.check_device(name, tensor, hidden.device)
    torch._check(
        softcap == 0 or label_smoothing == 0,
        lambda: f"softcap must be 0 with label_smoothing, got {softcap} and {label_smoothing}",
    )
    torch._check(softcap == 0 or softcap >= 2.0**-126, lambda: f"softcap must be 0 or at least 2^-126, got {softcap}")
    torch._check(0 <= label_smoothing <= 1, lambda: f"label_smoothing must be in [0, 1], got {label_smoothing}")
    torch._check(math.isfinite(z_loss), lambda: f"z_loss must be finite, got {z_loss}")
    float32 = {"dtype": torch.float32}
    grad = hidden.new_empty((0 if dither is None else rows, columns), **float32)
    return hidden.new_empty((rows,), **float32), hidden.new_empty((rows,), **float32), grad


def _check_random(x: Tensor, name: str, factors: Tensor | None, dim: int, seed: Tensor, stream: int) -> None:
    checks.check_matrix("x", x)
    torch._check(x.shape[1] >= 1, lambda: f"x must have at least 1 column, got shape {list(x.shape)}")
    if factors is not None:
        checks.check_vector(name, factors, x.shape[dim], x.device)
    torch._check(
        seed.dtype == torch.int64 and seed.dim() == 0,
        lambda: f"seed must be torch.int64 of shape [], got {seed.dtype} of shape {list(seed.shape)}",
    )
    torch._check(0 <= stream < 2**32, lambda: f"stream must be between 0 and 2^32 - 1, got {stream}")


@torch.library.register_fake("qkernels::quantize_rows")
def _quantize_rows_fake(x: Tensor, column_factors: Tensor | None, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    _check_random(x, "column_factors", column_factors, 1, seed, stream)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("qkernels::quantize_columns")
def _quantize_columns_fake(x: Tensor, row_factors: Tensor | None, seed: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    _check_random(x, "row_factors", row_factors, 0, seed, stream)
    rows, columns = x.shape
    return x.new_empty((columns, rows), dtype=torch.int8), x.new_empty(columns, dtype=torch.float32)


def _register_reference(name: str) -> None:
    """Run `reference.<name>` on devices that have no kernel of their own, after the fake kernel's checks."""
    check, choice = globals()[f"_{name}_fake"], dispatch.Choice("reference", "")

    def run(*args, **kwargs):
        check(*args, **kwargs)
        return dispatch.run(name, choice, args, kwargs)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")


def _register_gpu(name: str) -> None:
    """On CUDA and ROCm tensors run what `dispatch.select` chooses, after the fake kernel's checks."""
    check = globals()[f"_{name}_fake"]

    def run(*args, **kwargs):
        check(*args, **kwargs)
        choice = dispatch.select(dispatch.facts_of(args[0].device), dispatch.call_of(name, args))
        return dispatch.run(name, choice, args, kwargs)

    _LIBRARY.impl(name, run, "CUDA")


for _name in (
    "quantize_activation",
    "dequantize_weight",
    "linear",
    "linear_grad_input",
    "column_scales",
    "int_grad_input",
    "linear_cross_entropy",
    "linear_saving",
    "mask_clipped",
    "quantize_weight",
    "quantize_weight_scaled",
    "scale_gradient",
    "quantize_rows",
    "quantize_columns",
):
    _register_reference(_name)
    _register_gpu(_name)
