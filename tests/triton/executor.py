"""Runs launches by executing the PTX that Triton compiles them to."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from ptx import machine, program
from torch import Tensor

from qkernels.triton.aot import Compiled, compile_launch
from qkernels.triton.launch import Launch


@cache
def parsed(ptx: str) -> program.Kernel:
    (kernel,) = program.parse(ptx).values()
    return kernel


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def execute(launch: Launch, target: str, statistics: machine.Statistics | None = None) -> Compiled:
    """Fill the outputs of `launch` as `target` would."""
    compiled = compile_launch(launch, target)
    execute_ptx(launch, compiled, compiled.asm["ptx"], statistics)
    return compiled


def execute_ptx(launch: Launch, compiled: Compiled, ptx: str, statistics: machine.Statistics | None = None) -> None:
    """The same with other PTX than the compiler's."""
    if 0 in launch.grid:
        return
    arguments = [array(value) if isinstance(value, Tensor) else value for value in launch.args if value is not None]
    machine.launch(
        parsed(ptx), launch.grid, compiled.threads, arguments, compiled.shared, statistics=statistics
    )


def execute_all(launches: Sequence[Launch], target: str) -> None:
    for launch in launches:
        execute(launch, target)
