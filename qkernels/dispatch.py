"""Which backend computes an operator on a device, and why. The choice is a pure function of facts about the device."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from . import reference

# Below this compute capability (times ten) there is no int8 tensor-core product that Triton compiles to.
LEAST_CAPABILITY = 80


@dataclass(frozen=True)
class Facts:
    """What the choice of a backend depends on.

    Attributes:
        device: "cpu", "cuda", "hip", or another device type of torch.
        capability: compute capability times ten of a CUDA device, else 0.
        triton: whether triton is installed.
    """

    device: str
    capability: int = 0
    triton: bool = False


@dataclass(frozen=True)
class Choice:
    """`backend` is "cpu", "triton" or "reference"."""

    backend: str
    reason: str


def select(facts: Facts) -> Choice:
    """The backend for a device with these facts."""
    if facts.device == "cpu":
        return Choice("cpu", "the compiled kernels of this package")
    if facts.device not in ("cuda", "hip"):
        return Choice("reference", f"there are no kernels for {facts.device} devices")
    if not facts.triton:
        return Choice("reference", "triton is not installed: pip install 'qkernels[triton]'")
    if facts.device == "cuda" and facts.capability < LEAST_CAPABILITY:
        found, needed = (f"{number // 10}.{number % 10}" for number in (facts.capability, LEAST_CAPABILITY))
        return Choice("reference", f"compute capability {found} is below {needed}, which int8 products need")
    return Choice("triton", "triton is installed and compiles for this device")


def triton_installed() -> bool:
    """Without importing it."""
    return importlib.util.find_spec("triton") is not None


@cache
def facts_of(device: torch.device) -> Facts:
    """The facts of a device that is present."""
    if device.type != "cuda":
        return Facts(device.type)
    if torch.version.hip:
        return Facts("hip", 0, triton_installed())
    major, minor = torch.cuda.get_device_capability(device)
    return Facts("cuda", 10 * major + minor, triton_installed())


def run(name: str, choice: Choice, args: tuple, keywords: dict[str, Any]) -> Any:
    """Compute the operator `name` with the chosen backend, "triton" or "reference"."""
    if choice.backend == "triton":
        from .triton import ops

        return ops.run(name, args, keywords)
    return getattr(reference, name)(*args, **keywords)
