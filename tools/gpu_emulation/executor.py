"""Runs launches by executing the PTX that Triton compiles them to."""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gpu_emulation.aot import Compiled, compile_launch, is_compiled_in
from gpu_emulation.ptx import machine, program
from qkernels.kernels.triton.launch import Launch

# Parameters a kernel fills.
OUTPUTS = {
    **dict.fromkeys(
        ("quantize_rows_kernel", "quantize_groups_kernel", "random_rows_kernel", "random_columns_kernel"),
        ("q", "scales"),
    ),
    "column_ranges_kernel": ("bits",),
    "int4_parameters_kernel": ("scales", "inverses", "zeros"),
    "loss_rows_kernel": ("loss", "lse", "factors", "coefficients"),
    "merge_groups_kernel": ("out", "row_scales"),
    "scale_gradient_kernel": ("out", "grad_scales"),
    "softmax_chunk_kernel": ("q",),
}


@cache
def parsed(ptx: str) -> program.Kernel:
    (kernel,) = program.parse(ptx).values()
    return kernel


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory, from its first element to its last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
    return (flat.view(torch.int16) if tensor.dtype == torch.bfloat16 else flat).numpy()


def codes_of(launches: Sequence[Launch], target: str) -> tuple:
    """What executing the launches depends on besides their tensors; equal for targets that get the same code."""

    def code_of(launch: Launch) -> tuple:
        compiled = compile_launch(launch, target)
        numbers = tuple(value for value in launch.args if not isinstance(value, Tensor))
        return instructions(compiled.asm["ptx"]), tuple(launch.grid), compiled.threads, compiled.shared, numbers

    return tuple(map(code_of, launches))


def instructions(ptx: str) -> str:
    """The text of a kernel without its version, its target and what is for debuggers: all that is executed."""
    text = re.sub(r"^\s*(\.version|\.target|\.loc|\.file|//).*$", "", ptx, flags=re.MULTILINE)
    return text.split(".section")[0]


def execute(launch: Launch, target: str, statistics: machine.Statistics | None = None) -> None:
    """Fill the outputs of `launch` as `target` would."""
    compiled = compile_launch(launch, target)
    execute_ptx(launch, compiled, compiled.asm["ptx"], statistics)


def execute_ptx(launch: Launch, compiled: Compiled, ptx: str, statistics: machine.Statistics | None = None) -> None:
    """The same with any PTX. Every byte of the outputs must be written, and none read before."""
    if 0 in launch.grid:
        return
    arguments, outputs = [], []
    for parameter, value in launch.runtime_arguments():
        if is_compiled_in(parameter, value):
            continue
        arguments.append(array(value) if isinstance(value, Tensor) else value)
        if parameter.name in OUTPUTS.get(launch.kernel.__name__, ("out",)):
            outputs.append(arguments[-1])
    memory = machine.launch(
        parsed(ptx), launch.grid, compiled.threads, arguments, compiled.shared, undefined=outputs, statistics=statistics
    )
    for buffer in memory.buffers:
        if buffer.defined is not None and not buffer.defined.all():
            raise machine.PtxError(f"{int((~buffer.defined).sum())} bytes of an output were not written")


def execute_all(launches: Sequence[Launch], target: str) -> None:
    for launch in launches:
        execute(launch, target)
