"""Float -> quantized by the kernels: the bits that `formats/rules.py` defines, in a fraction of the time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import rules
from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, QuantizedWeight
from ..formats.validate import storage_problems, x_scale_problem
from . import ops


def _float_matrix(name: str, x: Tensor) -> Tensor:
    """x, in a dtype that the kernels read."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    rules.check_float_matrix(name, x)
    x = x.detach()
    return x if x.dtype in FLOAT_DTYPES else x.to(torch.float32)


def quantize_activation(x: Tensor, scheme: str | QuantScheme, x_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize activations per token, or per group of K, or with a given scale (docs/numerics.md, rules 1, 2 and 13).

    Args:
        x: float [M, K].
        scheme: an `a8` scheme.
        x_scale: float32 [1], the scale of all rows, for `a8s` schemes only. What is larger than 127 of it is clamped.

    Returns:
        int8 [M, K] and float32 scales [M, groups]. A group that holds Inf or NaN has q = 0 and scale NaN.

    Raises:
        TypeError: if x is not a tensor.
        ValueError: if x is not a float matrix with K >= 1, the scheme leaves activations in float, or x_scale does not
            fit the scheme.

    Example:
        >>> qk.quantize_activation(torch.tensor([[0.5, 3.0]]), "w8a8s", x_scale=torch.tensor([0.01]))[0]
        tensor([[ 50, 127]], dtype=torch.int8)
    """
    scheme = QuantScheme.parse(scheme)
    if not scheme.int_activations:
        raise ValueError(f"scheme must be an a8 scheme, got {scheme}")
    if (problem := x_scale_problem(x_scale, scheme, values=False)) is not None:
        raise ValueError(f"x_scale {problem}")
    return ops.quantize_activation(_float_matrix("x", x), scheme, x_scale)


def quantize_weight(weight: Tensor, scheme: str | QuantScheme) -> QuantizedWeight:
    """Quantize a weight (rules 1 to 3 of docs/numerics.md).

    Args:
        weight: float [N, K], any float dtype.
        scheme: the format.

    Returns:
        `QuantizedWeight`: qweight int8 [N, K] or uint8 [N, ceil(K / 2)], scales float32 [N, groups], and zeros uint8
        [N, groups], or None for a symmetric scheme.

    Raises:
        TypeError: if the weight is not a tensor.
        ValueError: if the weight is not a float matrix with K >= 1, or holds NaN or Inf, or the range of an
            asymmetric group is more than float32 can hold.

    Example:
        >>> qweight, scales, zeros = qk.quantize_weight(torch.randn(8, 64), "w4a8-g32")
        >>> qweight.shape, scales.shape, zeros
        (torch.Size([8, 32]), torch.Size([8, 2]), None)
    """
    scheme = QuantScheme.parse(scheme)
    weight = _float_matrix("weight", weight)
    try:
        return ops.quantize_weight(weight, scheme)
    except RuntimeError as error:
        if "must be finite" not in str(error):
            raise
        if bool(weight.isfinite().all()):
            raise ValueError("weight range of a group must be finite in float32, got max - min = Inf") from error
        raise ValueError("weight must be finite, got NaN or Inf values") from error


def dequantize_weight(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str | QuantScheme
) -> Tensor:
    """The weight as it is multiplied: each integer times its group's scale, rounded once.

    Args:
        qweight, scales, zeros: the canonical storage of a weight [N, in_features].

    Returns:
        float32 [N, in_features].

    Raises:
        ValueError: naming the tensor that does not fit the scheme.
    """
    scheme = QuantScheme.parse(scheme)
    if not isinstance(qweight, Tensor) or qweight.dim() != 2:
        raise ValueError(f"qweight must be a matrix, got {getattr(qweight, 'shape', type(qweight).__name__)}")
    weight = {"qweight": qweight, "scales": scales, "zeros": zeros}
    for name, problem in storage_problems(weight, in_features, len(qweight), scheme, values=False).items():
        raise ValueError(f"{name} {problem}")
    return ops.dequantize_weight(qweight, scales, zeros, in_features, scheme)
