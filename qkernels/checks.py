"""Checks of the operators' arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import FLOAT_DTYPES
from .schemes import QuantScheme


def check_weight(qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: QuantScheme) -> None:
    """Raise RuntimeError, naming the tensor, unless the three are the canonical storage of `scheme`."""
    torch._check(in_features >= 1, lambda: f"in_features must be at least 1, got {in_features}")
    torch._check(qweight.dim() == 2, lambda: f"qweight must be a matrix, got shape {list(qweight.shape)}")
    expected = scheme.storage_shapes(in_features, qweight.shape[0])
    integer = torch.int8 if scheme.weight_bits == 8 else torch.uint8
    for name, tensor, dtype in (
        ("qweight", qweight, integer),
        ("scales", scales, torch.float32),
        ("zeros", zeros, torch.uint8),
    ):
        if name in expected:
            torch._check(tensor is not None, lambda name=name: f"{name} is required for scheme {scheme}")
            message = (
                f"{name} must be {dtype} of shape {list(expected[name])} for scheme {scheme} with "
                f"{in_features} input features, got {tensor.dtype} of shape {list(tensor.shape)}"
            )
            torch._check(tensor.shape == expected[name] and tensor.dtype == dtype, lambda message=message: message)
            check_device(name, tensor, qweight.device)
        else:
            torch._check(tensor is None, lambda: f"zeros must be None for scheme {scheme}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    torch._check(tensor.device == device, lambda: f"{name} must be on {device}, got {tensor.device}")


def check_matrix(name: str, x: Tensor, columns: int | None = None) -> None:
    torch._check(x.dtype in FLOAT_DTYPES, lambda: f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    torch._check(x.dim() == 2, lambda: f"{name} must be a matrix, got shape {list(x.shape)}")
    if columns is not None:
        torch._check(x.shape[1] == columns, lambda: f"{name} must have {columns} columns, got shape {list(x.shape)}")


def check_vector(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    torch._check(
        tensor.dtype == torch.float32 and tensor.shape == (size,),
        lambda: f"{name} must be torch.float32 of shape [{size}], got {tensor.dtype} of shape {list(tensor.shape)}",
    )
    check_device(name, tensor, device)


def check_out_dtype(out_dtype: torch.dtype | None) -> None:
    torch._check(
        out_dtype is None or out_dtype in FLOAT_DTYPES,
        lambda: f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}",
    )
