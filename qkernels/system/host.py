"""The abilities of this machine and this torch, asked without importing anything of ours."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cpu_features() -> Mapping[str, Any]:
    """The facts that torch knows about the CPU; empty if this torch cannot tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def fast_bf16() -> bool:
    """True if torch multiplies bfloat16 by instructions for it; elsewhere it is several times slower than float32."""
    has_instructions = any(cpu_features().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return has_instructions and torch.backends.mkldnn.is_available()


def device() -> torch.device:
    """Where models run: the GPU if torch has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str) -> torch.dtype:
    """The dtype called "float32", "bfloat16" or "auto" (bfloat16 where the hardware multiplies it).

    >>> pick_dtype("float32")
    torch.float32

    Raises:
        KeyError: if `name` is none of these.
    """
    if name == "auto":
        return torch.bfloat16 if device().type == "cuda" or fast_bf16() else torch.float32
    return DTYPES[name]


def package_version(name: str) -> str | None:
    """The installed version of a package, without importing it; None if it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
