"""The backend that computes an operator on a device, chosen by a pure function of facts about the device."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from . import arguments, cuda_library, reference

# Below this compute capability (times ten) there is no int8 tensor-core product that Triton compiles to.
LEAST_CAPABILITY = 80
# From here on an ungrouped int8 product is faster through Triton on Hopper, where it compiles to warpgroup products,
# which the CUDA C++ kernel has not: 0.18 against 0.39 ms at 2048 x 4096 x 11008 on an H100. Smaller ones take less time
# than Triton's launch does on the host: 0.14 against 0.08 ms at 256 x 4096 x 11008 (docs/gpu.md).
WARPGROUP_MULTIPLY_ADDS = 2**36

WITHOUT_GPU_KERNEL = (
    "conv",
    "grouped_linear_grad_weight",
    "grouped_outer",
)


@dataclass(frozen=True)
class Facts:
    """The facts that the choice of a backend depends on.

    Attributes:
        device: "cpu", "cuda", "hip", or another device type of torch.
        capability: compute capability times ten of a CUDA device, else 0.
        triton: True if triton is installed.
        cuda: True if the CUDA C++ operators are loaded and have code for the device.
    """

    device: str
    capability: int = 0
    triton: bool = False
    cuda: bool = False


@dataclass(frozen=True)
class Choice:
    """`backend` is "cpu", "cuda", "triton" or "reference"."""

    backend: str
    reason: str


def select(facts: Facts, call: cuda_library.Call | None = None) -> Choice:
    """The backend for a call on a device with these facts; without a call, the one that has most of them."""
    if facts.device == "cpu":
        return Choice("cpu", "the compiled kernels of this package")
    if facts.device not in ("cuda", "hip"):
        return Choice("reference", f"there are no kernels for {facts.device} devices")
    if call is not None and (call.operator in WITHOUT_GPU_KERNEL or call.rounds):
        rounded = " with a gradient that is rounded to int8" if call.rounds else ""
        return Choice("reference", f"there is no GPU kernel of {call.operator}{rounded}")
    if call is not None and call.scheme is not None and call.scheme.has_min and call.operator == "quantize_weight":
        return Choice("reference", f"there is no GPU kernel that finds minima ({call.scheme})")
    if facts.triton and call is not None and _pays_warpgroups(facts, call):
        return Choice("triton", "large int8 product on Hopper, for which Triton uses warpgroup instructions")
    if (
        facts.cuda
        and facts.capability >= cuda_library.LEAST_CAPABILITY
        and (call is None or cuda_library.supports(call))
    ):
        return Choice("cuda", "the compiled CUDA kernels of this package")
    if not facts.triton:
        return Choice("reference", "triton is not installed: pip install 'qkernels[triton]'")
    if facts.device == "cuda" and facts.capability < LEAST_CAPABILITY:
        found, needed = (f"{number // 10}.{number % 10}" for number in (facts.capability, LEAST_CAPABILITY))
        return Choice("reference", f"compute capability {found} is below {needed}, which int8 products need")
    return Choice("triton", "triton is installed and compiles for this device")


def _pays_warpgroups(facts: Facts, call: cuda_library.Call) -> bool:
    """True for a large product of ungrouped int8 weights and activations on compute capability 9.0."""
    scheme = call.scheme
    return (
        scheme is not None
        and (facts.device, facts.capability) == ("cuda", 90)
        and call.operator == "linear"
        and call.multiply_adds >= WARPGROUP_MULTIPLY_ADDS
        and scheme.weight_bits == 8
        and scheme.int_activations
        and scheme.group_size is None
        and scheme.act_group_size is None
    )


def triton_installed() -> bool:
    """True if triton can be imported; this does not import it."""
    return importlib.util.find_spec("triton") is not None


@cache
def facts_of(device: torch.device) -> Facts:
    """The facts of a device that is present."""
    if device.type != "cuda":
        return Facts(device.type)
    if torch.version.hip:
        return Facts("hip", 0, triton_installed())
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    return Facts("cuda", capability, triton_installed(), cuda_library.library().covers(capability))


def call_of(name: str, args: tuple[Any, ...]) -> cuda_library.Call:
    """The facts about a call of the operator `name`, with arguments of its schema, that decide who computes it."""
    scheme = arguments.scheme_of(name, args)
    multiply_adds = args[0].numel() * len(args[1]) if name == "linear" else 0
    given = dict(zip(arguments.names(name), args, strict=False))  # torch leaves out what has its default
    rounds = name == "grouped_linear_grad_input" and given.get("seed") is not None
    return cuda_library.Call(name, scheme, args[0].dtype, multiply_adds, rounds)


def run(
    name: str, choice: Choice, args: tuple[Any, ...], keywords: dict[str, Any], bundled: tuple[Any, ...] | None = None
) -> Any:
    """Compute the operator `name` with the chosen backend.

    Args:
        args, keywords: as the schema has them: the scheme is a code.
        bundled: `arguments.bundle(name, args)`, if the caller has made it.

    Raises:
        ValueError: unless the backend is "cuda", "triton" or "reference".
    """
    if choice.backend == "cuda":
        return getattr(torch.ops.qkernels_cuda, name)(*args, **keywords)
    if choice.backend not in ("triton", "reference"):
        raise ValueError(f"backend must be 'cuda', 'triton' or 'reference', got {choice.backend!r}")
    bundled = arguments.bundle(name, args) if bundled is None else bundled
    if choice.backend == "triton":
        from .triton import ops

        return ops.run(name, bundled, keywords)
    return getattr(reference, name)(*bundled, **keywords)
