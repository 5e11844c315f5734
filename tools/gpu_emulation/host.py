"""CUDA C++ compiled for the host over the emulator: built by g++, called through ctypes."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpu_emulation.files import made_once

HERE = Path(__file__).parent
FLAGS = ["-x", "c++", "-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += [f"-I{HERE}"]
COUNTS = ("products", "matrices", "conflicts", "barriers", "switches")
MISSING = None
if platform.machine() != "x86_64" or shutil.which("g++") is None:
    MISSING = "the emulator switches the stacks of x86-64, and is built by g++"


class KernelError(Exception):
    """What the emulator does not let a kernel do."""


class Recorded(NamedTuple):
    """A launch that was noted instead of run: the mangled name of the kernel, and what it was launched with."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    arguments: bytes


def compile_source(source: Path, to: Path, flags: Sequence[str] = ()) -> Path:
    """Compile one file for the host.

    Raises:
        subprocess.CalledProcessError: if g++ refuses it; its messages are on stderr.
    """
    subprocess.run(["g++", *flags, *FLAGS, "-c", str(source), "-o", str(to)], check=True)
    return to


def link(objects: Sequence[Path], to: Path) -> Path:
    """A shared library of objects; those of the emulator must be among them."""
    subprocess.run(["g++", "-shared", *map(str, objects), "-ldl", "-o", str(to)], check=True)
    return to


def build(sources: Sequence[Path], to: Path, flags: Sequence[str] = ()) -> Path:
    """A shared library of kernels and the emulator, unless it exists.

    Args:
        sources: CUDA C++ that includes "emulator.h", with `extern "C"` functions that launch its kernels.
        to: the library.
        flags: of g++, such as -I.
    """

    def make(path: Path) -> None:
        objects = [
            compile_source(source, path.with_name(f"{path.name}.{number}.o"), flags)
            for number, source in enumerate([*sources, HERE / "emulator.cpp"])
        ]
        link(objects, path)

    return made_once(to, make)


def bytes_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))


class Host:
    """A library that `build` made.

    Attributes:
        library: for calling its functions; each returns 0, or an error that `check` raises.
    """

    def __init__(self, path: Path) -> None:
        # Not RTLD_GLOBAL, so that libraries with planted faults do not share functions.
        self.library = ctypes.CDLL(str(Path(path).resolve()))
        self.library.emulator_message.restype = ctypes.c_char_p
        self.library.emulator_allocate.restype = ctypes.c_void_p
        self.library.emulator_kernel.restype = ctypes.c_char_p
        self.library.emulator_arguments.restype = ctypes.c_void_p
        self.schedule(0)

    def schedule(self, seed: int, early_copies: bool = False) -> None:
        """The order of the warps, and when copies arrive, of the launches from now on."""
        self.library.emulator_schedule(ctypes.c_uint64(seed), int(early_copies))

    def check(self, error: int) -> None:
        """Raises:
        KernelError: unless a launch returned 0.
        """
        if error:
            raise KernelError(self.library.emulator_message().decode())

    def counts(self) -> dict[str, int]:
        """What kernels did since this was last called: see `Counts` in emulator.h."""
        out = (ctypes.c_uint64 * len(COUNTS))()
        self.library.emulator_counts(out)
        return dict(zip(COUNTS, out, strict=True))

    def place(self, array: np.ndarray) -> np.ndarray:
        """A copy that ends where memory ends: kernels that run over it are caught. `free` gives it back."""
        size = max(1, array.nbytes)
        memory = bytes_at(self.library.emulator_allocate(ctypes.c_size_t(size)), size)
        placed = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed

    def free(self, array: np.ndarray) -> None:
        """Give back what `place` returned; it must not be used any more."""
        self.library.emulator_free(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(max(1, array.nbytes)))

    def recorded(self) -> list[Recorded]:
        """The launches noted since emulator_record(1)."""
        launches = []
        for i in range(self.library.emulator_recorded()):
            shape = (ctypes.c_int64 * 6)()
            self.library.emulator_shape(i, shape)
            arguments = ctypes.string_at(self.library.emulator_arguments(i), shape[5])
            kernel = self.library.emulator_kernel(i).decode()
            launches.append(Recorded(kernel, tuple(shape[:3]), shape[3], shape[4], arguments))
        return launches
