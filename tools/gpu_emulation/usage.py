"""What a kernel compiled ahead of time is made of: registers, spills, tensor-core instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

from gpu_emulation.triton_code import Compiled

# Tensor-core instructions by target: integers, floats.
_MATRIX = {
    "int": re.compile(r"\b(IMMA|IGMMA|UTCIMMA|UTCOMMA|v_mfma_i32)[\w.]*"),
    "float": re.compile(r"\b(HMMA|HGMMA|UTCHMMA|v_mfma_f32)[\w.]*"),
}


@dataclass(frozen=True)
class Usage:
    """Of one kernel.

    Attributes:
        registers: of one thread.
        spilled: bytes of local memory of one thread.
        int_products, float_products: tensor-core instructions in the code.
    """

    registers: int
    spilled: int
    int_products: int
    float_products: int


def _run_tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def _inspect_cubin(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = _run_tool("cuobjdump", "-res-usage", path)
        code = _run_tool("nvdisasm", "-c", path)
    fields = dict(re.findall(r"(\w+):(\d+)", usage))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"]), code


def usage(compiled: Compiled) -> Usage:
    """Usage of a kernel for an NVIDIA or an AMD target."""
    if "cubin" in compiled.asm:
        registers, spilled, code = _inspect_cubin(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
        spilled += int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)[1])
    return Usage(registers, spilled, *(len(_MATRIX[kind].findall(code)) for kind in ("int", "float")))
