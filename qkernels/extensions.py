"""The compiled parts of the package: which of them load, why the others do not, and the command that mends it.

`_C` (torch operators) and `_native` (the same core without torch) are required: `import qkernels` fails with one clear
ImportError without them. `_C_cuda` is optional. It is loaded when a CUDA tensor first needs it, and only beside a CUDA
build of torch, whose libraries it names; whatever happens to it, the CPU kernels go on working.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

OLDEST_TORCH = (2, 10)
BUILD = "pip install --no-build-isolation ."
BUILD_CUDA = f"QKERNELS_CUDA=1 {BUILD}"


@dataclass(frozen=True)
class Status:
    """Whether a compiled part is loaded.

    Attributes:
        loaded: whether its operators can be called.
        reason: what it was built for, or why it is not loaded.
        remedy: the command or step that mends it; None if there is nothing to mend.
        targets: GPUs it has code for, such as "8.0;9.0;12.0+PTX"; "" where that does not apply.
    """

    loaded: bool
    reason: str
    remedy: str | None = None
    targets: str = ""


def require(name: str) -> ModuleType:
    """Load a part without which nothing works.

    Raises:
        ImportError: naming the part, the reason and the command that mends it.
    """
    try:
        return importlib.import_module(f"qkernels.{name}")
    except ImportError as error:
        raise ImportError(_explain(name, error)) from error


def _explain(name: str, error: ImportError) -> str:
    if importlib.util.find_spec(f"qkernels.{name}") is None:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        return f"qkernels.{name} is not built for this Python ({suffix}): in the checkout, run {BUILD}"
    oldest = ".".join(map(str, OLDEST_TORCH))
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        return f"qkernels needs torch >= {oldest}, got {torch.__version__}: pip install 'torch>={oldest}'"
    return f"qkernels.{name} does not load with torch {torch.__version__} ({error}): in the checkout, run {BUILD}"


@cache
def cuda() -> Status:
    """Load `_C_cuda` if this torch can use it; never raises."""
    if torch.version.hip:
        return Status(False, "this torch is built for ROCm, where Triton computes")
    if not torch.version.cuda:
        return Status(False, "this torch is built for the CPU", "install a CUDA build of torch from pytorch.org")
    if importlib.util.find_spec("qkernels._C_cuda") is None:
        return Status(False, "this qkernels was built without them", f"with nvcc, in the checkout: {BUILD_CUDA}")
    try:
        library = importlib.import_module("qkernels._C_cuda")
    except ImportError as error:
        return Status(False, f"_C_cuda does not load: {error}", f"with nvcc, in the checkout: {BUILD_CUDA}")
    return Status(True, f"built with CUDA {library.cuda_version} for {library.targets}", None, library.targets)


def covers(targets: str, capability: int) -> bool:
    """Whether code for `targets` runs on a device of this compute capability times ten.

    Machine code runs on later devices of the same major version, PTX on all later ones; both only on the very device if
    the target ends in "a".
    """
    for target in filter(None, targets.split(";")):
        code = target.removesuffix("+PTX")
        number = int(re.sub(r"\D", "", code))
        if code.endswith("a"):
            later = False
        else:
            later = number < capability and (code != target or number // 10 == capability // 10)
        if later or number == capability:
            return True
    return False
