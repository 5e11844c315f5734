"""Compile launches ahead of time, for targets that need not be present: what CI inspects and executes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkernels.kernels.triton.launch import Launch
from qkernels.kernels.triton.target import Target

KILOBYTE = 1024
# Processors of one common device, and the shared memory of one program, per target.
TARGETS = {
    "sm_80": Target("cuda", 80, 108, 163 * KILOBYTE),
    "sm_89": Target("cuda", 89, 128, 99 * KILOBYTE),
    "sm_90": Target("cuda", 90, 132, 227 * KILOBYTE),
    "sm_100": Target("cuda", 100, 148, 227 * KILOBYTE),
    "sm_120": Target("cuda", 120, 170, 99 * KILOBYTE),
    "gfx942": Target("hip", 0, 304, 64 * KILOBYTE),
}
_POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target.

    Attributes:
        name: of the entry.
        asm: text or bytes by stage: "ptx" and "cubin", or "amdgcn" and "hsaco".
        shared: bytes of dynamic shared memory of one program.
        threads: of one program.
    """

    name: str
    asm: dict[str, Any]
    shared: int
    threads: int


def is_compiled_in(parameter: Any, value: Tensor | int | None) -> bool:
    """Whether code for these arguments has no parameter for this one."""
    return value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)


def compile_launch(launch: Launch, target: str) -> Compiled:
    """The kernel of `launch` for the target of this name, specialized as triton does at run time: for arguments that
    are multiples of 16, and for integers that are 1, which are compiled in.
    """
    names = launch.kernel.arg_names
    signature, divisible = {}, []
    constants = dict(launch.constants)
    for parameter, value in launch.runtime_arguments():
        name = parameter.name
        if is_compiled_in(parameter, value):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if parameter.do_not_specialize:
            continue
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            divisible.append(name)
    ordered = tuple((name, signature.get(name, "constexpr")) for name in names)
    return _compile(
        launch.kernel,
        ordered,
        tuple(constants.items()),
        tuple(divisible),
        (launch.num_warps, launch.num_stages),
        target,
    )


@cache
def _compile(
    kernel: Any, signature: tuple, constants: tuple, divisible: tuple, sizes: tuple[int, int], target: str
) -> Compiled:
    at = kernel.arg_names.index
    attributes = {(at(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, dict(signature), {(at(name),): value for name, value in constants}, attributes)
    options = {"num_warps": sizes[0], "num_stages": sizes[1], "enable_fp_fusion": False}
    if target.startswith("gfx"):
        compiled = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
    else:
        compiled = triton.compile(source, target=GPUTarget("cuda", TARGETS[target].capability, 32), options=options)
    metadata = compiled.metadata
    return Compiled(metadata.name, compiled.asm, metadata.shared, metadata.num_warps * metadata.target.warp_size)
