"""Small PTX programs around one instruction, or around a few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import machine
from .machine import DTYPES, bits_of

HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<40>; .reg .b16 %rs<40>; .reg .b32 %r<80>; .reg .b64 %rd<40>;
"""


def kernel(body: str, parameters: int, shared: int = 0) -> str:
    """A kernel of `parameters` 64-bit parameters p0, p1, ... with %rd30.. their values and %r70 the thread."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %rd{30 + i}, [p{i}];\n" for i in range(parameters))
    memory = f".shared .align 16 .b8 buffer[{shared}];\n" if shared else ""
    code = f"{REGISTERS}{memory}{loads}mov.u32 %r70, %tid.x;\n{body}\nret;\n"
    return f"{HEADER}.visible .entry test({declared})\n{{\n{code}}}\n"


def run(body: str, arrays: Sequence[np.ndarray], threads: int = 32, shared: int = 0, grid=(1,), **keywords) -> None:
    """Execute `body` with the arrays as p0, p1, ..."""
    machine.launch(kernel(body, len(arrays), shared), grid, threads, arrays, **keywords)


def _storage(kind: str) -> np.dtype:
    """Of a value in memory: predicates take four bytes."""
    return np.dtype(np.uint32) if kind == "pred" else DTYPES[f"b{bits_of(kind)}"]


def _register(kind: str, number: int) -> str:
    prefix = "p" if kind == "pred" else {8: "rs", 16: "rs", 32: "r", 64: "rd"}[bits_of(kind)]
    return f"%{prefix}{number}"


def apply(instruction: str, inputs: Sequence[tuple[str, np.ndarray]], output: str) -> np.ndarray:
    """What `instruction`, with {0} for the result and {1}, {2}, ... for its operands, gives for each thread.

    Args:
        instruction: text without the semicolon.
        inputs: type and values, one a thread, for each operand; a predicate is true where its value is not 0.
        output: type of the result.

    Returns:
        The bits of the results; of a predicate 0 or 1.
    """
    threads = len(inputs[0][1])
    arrays = [np.ascontiguousarray(values).view(_storage(kind)).copy() for kind, values in inputs]
    arrays.append(np.zeros(threads, _storage(output)))
    lines = []
    for number, (kind, _) in enumerate(inputs):
        size = _storage(kind).itemsize
        lines.append(f"mad.wide.u32 %rd1, %r70, {size}, %rd{30 + number};")
        if kind == "pred":
            lines.append(f"ld.global.b32 %r60, [%rd1]; setp.ne.s32 %p{number + 1}, %r60, 0;")
        else:
            lines.append(f"ld.global.b{8 * size} {_register(kind, number + 2)}, [%rd1];")
    names = [_register(output, 20)]
    names += [_register(kind, number + (1 if kind == "pred" else 2)) for number, (kind, _) in enumerate(inputs)]
    lines.append(instruction.format(*names) + ";")
    size = _storage(output).itemsize
    lines.append(f"mad.wide.u32 %rd1, %r70, {size}, %rd{30 + len(inputs)};")
    if output == "pred":
        lines.append(f"selp.b32 %r60, 1, 0, {names[0]}; st.global.b32 [%rd1], %r60;")
    else:
        lines.append(f"st.global.b{8 * size} [%rd1], {names[0]};")
    run("\n".join(lines), arrays, threads)
    return arrays[-1]
