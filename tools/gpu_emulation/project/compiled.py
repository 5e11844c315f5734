"""The CUDA kernels as nvcc compiles them: PTX for the oldest GPU, and its launches executed by the interpreter."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from torch import Tensor

from gpu_emulation.files import made_once
from gpu_emulation.project import emulated
from gpu_emulation.ptx import machine, program
from gpu_emulation.ptx.memory import NOBODY, GlobalMemory

MISSING = None if shutil.which("nvcc") else "nvcc is not installed, which compiles the CUDA kernels"
# Those of setup.py that change code.
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{emulated.ROOT / 'csrc'}"]
KERNEL_SOURCES = [source for source in emulated.SOURCES if "__global__" in source.read_text()]


@cache
def ptx_files() -> dict[str, Path]:
    """PTX for compute capability 8.0 of each source with kernels; its code for newer GPUs is assembled from it."""

    def compile_one(source: Path) -> Path:
        command = ["nvcc", *FLAGS, "-arch=compute_80", "-ptx", str(source), "-o"]
        to = emulated.FOLDER / f"{source.stem}.ptx"
        return made_once(to, lambda path: subprocess.run([*command, str(path)], check=True))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in KERNEL_SOURCES), pool.map(compile_one, KERNEL_SOURCES), strict=True))


@cache
def texts() -> dict[str, str]:
    """The text of each kernel, by its mangled name."""
    found = {}
    for path in ptx_files().values():
        head, *entries = path.read_text().split(".visible .entry ")
        found |= {entry[: entry.index("(")]: f"{head}.visible .entry {entry}" for entry in entries}
    return found


@cache
def parsed(text: str) -> program.Kernel:
    (kernel,) = program.parse(text).values()
    return kernel


def run(op: str, args: tuple, replaced: dict[str, str] | None = None) -> tuple[Tensor, ...]:
    """The results of an operator, whose kernels are executed as PTX, some of them with other text."""
    kernels = emulated.library()
    launches = kernels.record(op, *args)
    memory = GlobalMemory()
    for array, defined in kernels.buffers():
        memory.add_in_place(array, defined)
    for launch in launches:
        text = (replaced or {}).get(launch.kernel) or texts()[launch.kernel]
        for buffer in memory.buffers:
            buffer.writer[:] = NOBODY  # what an earlier launch wrote is there for all blocks
        arguments = [int.from_bytes(launch.arguments, "little")]
        machine.launch(parsed(text), launch.grid, launch.threads, arguments, launch.shared_bytes, memory=memory)
    return kernels.results()
