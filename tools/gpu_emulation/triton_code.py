"""Triton kernels compiled ahead of time for GPUs that need not be present, and their PTX executed on CPU tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_emulation.ptx import machine, program

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

Arguments = Mapping[str, Tensor | int | None]


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


def compile_kernel(
    kernel: Any,
    arguments: Arguments,
    constants: Mapping[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compile a kernel, specialized as triton does at run time: for arguments that are multiples of 16, and for
    integers that are 1, which are compiled in. Products and sums are not fused.

    Args:
        kernel: the `@triton.jit` function.
        arguments: tensors, integers and None, by the name of the parameter.
        constants: the `tl.constexpr` parameters by name.
        target: "sm_80", "sm_90", ... or a name of AMD's such as "gfx942".
        num_warps, num_stages: as triton takes them.

    Raises:
        triton.CompilationError: for what Triton cannot compile.
    """
    signature, divisible, constants = {}, [], dict(constants)
    for parameter in kernel.params:
        name = parameter.name
        if name not in arguments:
            continue
        value = arguments[name]
        if is_compiled_in(parameter, value):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if parameter.do_not_specialize:
            continue
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            divisible.append(name)
    ordered = tuple((name, signature.get(name, "constexpr")) for name in kernel.arg_names)
    return _compile(kernel, ordered, tuple(constants.items()), tuple(divisible), (num_warps, num_stages), target)


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
        capability = int(target.removeprefix("sm_"))
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = compiled.metadata
    return Compiled(metadata.name, compiled.asm, metadata.shared, metadata.num_warps * metadata.target.warp_size)


@cache
def _parsed(ptx: str) -> program.Kernel:
    (kernel,) = program.parse(ptx).values()
    return kernel


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory, from its first element to its last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
    return (flat.view(torch.int16) if tensor.dtype == torch.bfloat16 else flat).numpy()


def execute(
    kernel: Any,
    grid: Sequence[int],
    arguments: Arguments,
    compiled: Compiled,
    outputs: Sequence[str] = (),
    ptx: str | None = None,
    statistics: machine.Statistics | None = None,
) -> None:
    """Execute what `compile_kernel` made for these arguments; the tensors are read and written in place.

    Args:
        kernel, arguments: as in `compile_kernel`.
        grid: programs along each axis.
        compiled: the code, for an NVIDIA GPU.
        outputs: parameters whose memory holds nothing before: none of it may be read before it is written, and all of
            it must be written.
        ptx: executed in place of the text in `compiled`.
        statistics: what to count into.

    Raises:
        PtxError: for what the PTX ISA leaves undefined, and for outputs that are not written.
    """
    if 0 in grid:
        return
    passed, undefined = [], []
    for parameter in kernel.params:
        name = parameter.name
        if name not in arguments or is_compiled_in(parameter, arguments[name]):
            continue
        value = arguments[name]
        passed.append(_array(value) if isinstance(value, Tensor) else value)
        if name in outputs:
            undefined.append(passed[-1])
    text = ptx or compiled.asm["ptx"]
    memory = machine.launch(
        _parsed(text), grid, compiled.threads, passed, compiled.shared, undefined=undefined, statistics=statistics
    )
    for buffer in memory.buffers:
        if buffer.defined is not None and not buffer.defined.all():
            raise program.PtxError(f"{int((~buffer.defined).sum())} bytes of an output were not written")


def instructions(ptx: str) -> str:
    """The text of a kernel without its version, its target and what is for debuggers: all that is executed."""
    text = re.sub(r"^\s*(\.version|\.target|\.loc|\.file|//).*$", "", ptx, flags=re.MULTILINE)
    return text.split(".section")[0]
