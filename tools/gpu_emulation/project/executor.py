"""Runs launches by executing the PTX that Triton compiles them to."""

from collections.abc import Sequence

from torch import Tensor

from gpu_emulation.project.aot import arguments_of, compile_launch
from gpu_emulation.ptx import machine
from gpu_emulation.triton_code import Compiled, instructions
from gpu_emulation.triton_code import execute as execute_kernel
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


def codes_of(launches: Sequence[Launch], target: str) -> tuple:
    """What executing the launches depends on besides their tensors; equal for targets that get the same code."""

    def code_of(launch: Launch) -> tuple:
        compiled = compile_launch(launch, target)
        numbers = tuple(value for value in launch.args if not isinstance(value, Tensor))
        return instructions(compiled.asm["ptx"]), tuple(launch.grid), compiled.threads, compiled.shared, numbers

    return tuple(map(code_of, launches))


def execute(launch: Launch, target: str, statistics: machine.Statistics | None = None) -> None:
    """Fill the outputs of `launch` as `target` would."""
    compiled = compile_launch(launch, target)
    execute_ptx(launch, compiled, compiled.asm["ptx"], statistics)


def execute_ptx(launch: Launch, compiled: Compiled, ptx: str, statistics: machine.Statistics | None = None) -> None:
    """The same with any PTX. Every byte of the outputs must be written, and none read before."""
    outputs = OUTPUTS.get(launch.kernel.__name__, ("out",))
    execute_kernel(launch.kernel, launch.grid, arguments_of(launch), compiled, outputs, ptx, statistics)


def execute_all(launches: Sequence[Launch], target: str) -> None:
    for launch in launches:
        execute(launch, target)
