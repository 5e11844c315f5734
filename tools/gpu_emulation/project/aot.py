"""The GPUs that launches are compiled for, present or not: what CI inspects and executes."""

from __future__ import annotations

from gpu_emulation.triton_code import Compiled, compile_kernel
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


def arguments_of(launch: Launch) -> dict:
    """The arguments of a launch by name."""
    return {parameter.name: value for parameter, value in launch.runtime_arguments()}


def compile_launch(launch: Launch, target: str) -> Compiled:
    """The kernel of `launch` for the target of this name."""
    return compile_kernel(
        launch.kernel, arguments_of(launch), launch.constants, target, launch.num_warps, launch.num_stages
    )
