"""The compiled parts without which nothing works: `_C` (torch operators) and `_native` (the same core without torch).

If one does not load, there is one ImportError that says why and what mends it. `cuda_library.py` loads the optional
`_C_cuda`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
from types import ModuleType

import torch

OLDEST_TORCH = (2, 10)
BUILD = "pip install --no-build-isolation ."


def require(name: str) -> ModuleType:
    """Load a part.

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
