"""The CUDA C++ operators (`csrc/cuda`): whether they are here, and which calls they compute."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

from .schemes import QuantScheme

LEAST_CAPABILITY = 80  # of cp.async and of the integer product of 16 x 8 x 32
_MODULE = f"{__package__}._C_cuda"


@dataclass(frozen=True)
class Library:
    """Whether `_C_cuda` is loaded, and otherwise why not and what would mend it."""

    loaded: bool
    reason: str


@dataclass(frozen=True)
class Call:
    """What of a call decides whether there is a kernel for it: operator, scheme ("" without) and dtype of its input."""

    operator: str
    scheme: str = ""
    dtype: torch.dtype = torch.bfloat16


@cache
def library() -> Library:
    """Load the operators `qkernels_cuda::*`, if torch has CUDA and the package was built with them."""
    if importlib.util.find_spec(_MODULE) is None:
        return Library(False, "this package was built without CUDA kernels: QKERNELS_CUDA=1 pip install . (needs nvcc)")
    if torch.version.cuda is None:
        return Library(False, "this torch is built without CUDA: install a CUDA build from pytorch.org")
    try:
        importlib.import_module(_MODULE)
    except ImportError as error:
        return Library(False, f"the CUDA kernels do not load: {error}; rebuild them with QKERNELS_CUDA=1 pip install .")
    return Library(True, "the compiled CUDA kernels of this package")


def supports(call: Call) -> bool:
    """Whether `qkernels_cuda` has a kernel for this call; a pure function."""
    if call.operator == "linear":
        return QuantScheme.parse(call.scheme).int_activations or call.dtype != torch.float32
    if call.operator == "linear_saving":
        return QuantScheme.parse(call.scheme).act_group_size is None
    return call.operator in ("int_grad_input", "quantize_activation", "quantize_rows")
