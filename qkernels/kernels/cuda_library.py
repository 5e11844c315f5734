"""The CUDA C++ operators (`csrc/cuda`): loading them, and the calls that they compute."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

from ..formats.scheme import QuantScheme
from .extensions import BUILD

LEAST_CAPABILITY = 80  # of cp.async and of the integer product of 16 x 8 x 32
_MODULE = "qkernels._C_cuda"
BUILD_CUDA = f"QKERNELS_CUDA=1 {BUILD}"


@dataclass(frozen=True)
class Library:
    """The state of `_C_cuda`: whether it is loaded, and for which GPUs.

    Attributes:
        loaded: True if `qkernels_cuda::*` can be called.
        reason: what it was built for, or why it is not loaded.
        remedy: what mends that; None if there is nothing to mend.
        targets: the GPUs it has code for, such as "8.0;9.0;12.0+PTX".
    """

    loaded: bool
    reason: str
    remedy: str | None = None
    targets: str = ""

    def covers(self, capability: int) -> bool:
        """True if the library runs on a device of this compute capability times ten.

        Machine code runs on devices of the same major version that are not older, PTX on all that are not older; both
        on that very device only if the target ends in "a".
        """
        return self.loaded and any(_runs_on(target, capability) for target in self.targets.split(";"))


@dataclass(frozen=True)
class Call:
    """The facts about a call that decide which kernel computes it.

    Attributes:
        operator: its name.
        scheme: None for an operator without one.
        dtype: of its input.
        multiply_adds: M * N * K of a `linear`, 0 otherwise.
        rounds: True for experts' gradient that is rounded to int8 on the way.
    """

    operator: str
    scheme: QuantScheme | None = None
    dtype: torch.dtype = torch.bfloat16
    multiply_adds: int = 0
    rounds: bool = False


def _runs_on(target: str, capability: int) -> bool:
    code = target.removesuffix("+PTX")
    compiled_for = int(code.rstrip("a").replace(".", ""))
    if code.endswith("a"):
        return capability == compiled_for
    return capability >= compiled_for and (code != target or capability // 10 == compiled_for // 10)


@cache
def library() -> Library:
    """Load the operators `qkernels_cuda::*` if torch has CUDA and the package was built with them; never raises.

    This happens when a CUDA tensor first needs one. Whatever comes of it, the CPU kernels go on working.
    """
    if torch.version.hip:
        return Library(False, "this torch is built for ROCm, where Triton computes")
    if torch.version.cuda is None:
        return Library(False, "this torch is built without CUDA", "install a CUDA build of torch from pytorch.org")
    if importlib.util.find_spec(_MODULE) is None:
        return Library(False, "this package was built without them", f"{BUILD_CUDA} in the checkout, with nvcc")
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        return Library(False, f"they do not load: {error}", f"{BUILD_CUDA} in the checkout, with nvcc")
    built, driver = module.runtime_version, module.driver_version()
    if 0 < driver // 1000 < built // 1000:  # 0: there is no driver, and no device either
        reason = f"they were built with CUDA {_dotted(built)}, and the driver supports only {_dotted(driver)}"
        return Library(False, reason, f"update the NVIDIA driver, or {BUILD_CUDA} with an nvcc as old as the driver")
    return Library(True, f"built with CUDA {_dotted(built)} for {module.targets}", None, module.targets)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def supports(call: Call) -> bool:
    """True if `qkernels_cuda` has a kernel for this call; a pure function."""
    if call.scheme is not None and call.operator != "quantize_activation":
        if call.scheme.group_size == 16 or call.scheme.has_min:
            return False  # such a group is half as deep as a product on tensor cores; minima would be added apart
    reads_activations = call.operator in ("quantize_activation", "linear", "linear_with_saved_input")
    if call.scheme is not None and call.scheme.static_activations and reads_activations:
        return False
    if call.scheme is not None and call.operator == "linear":
        return call.scheme.int_activations or call.dtype != torch.float32
    if call.scheme is not None and call.operator == "linear_with_saved_input":
        return call.scheme.act_group_size is None
    return call.operator in ("int_grad_input", "quantize_activation", "quantize_rows_stochastic")
