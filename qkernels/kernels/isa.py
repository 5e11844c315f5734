"""The instruction set of the CPU kernels: which there are, which is in use and why, and how to force one.

`QKERNELS_ISA=scalar` in the environment forces one for a process, `with isa.force("scalar"):` for a block. All
instruction sets give the same bits for `a8` schemes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import extensions

native = extensions.require("_native")


def compiled() -> tuple[str, ...]:
    """Instruction sets in this build, in ascending order of preference."""
    return tuple(native.compiled_isas())


def supported() -> tuple[str, ...]:
    """Those of them that this CPU and its operating system can run."""
    return tuple(native.supported_isas())


def current() -> str:
    """The instruction set in use.

    Raises:
        ValueError: if QKERNELS_ISA names one that is unknown or that this CPU lacks.
    """
    return native.current_isa()


def reason() -> str:
    """Why `current()` is in use, in a sentence."""
    name = current()
    if os.environ.get("QKERNELS_ISA") == name:
        return f"{name}: forced by QKERNELS_ISA"
    if name == supported()[-1]:
        return f"{name}: the best this CPU supports"
    return f"{name}: forced by qkernels.isa.force"


class _Forced:
    """The blocks of `force` that are open, in the order in which they began, and what was in use before them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[object, str]] = []
        self._before = ""

    def begin(self, block: object, name: str) -> None:
        with self._lock:
            before = current()
            native.force_isa(name)
            if not self._open:
                self._before = before
            self._open.append((block, name))

    def end(self, block: object) -> None:
        with self._lock:
            self._open = [entry for entry in self._open if entry[0] is not block]
            native.force_isa(self._open[-1][1] if self._open else self._before)


_forced = _Forced()


@contextmanager
def force(name: str) -> Iterator[None]:
    """Use the instruction set `name` inside the block, in all threads.

    A call of an operator that runs in another thread meanwhile goes on with the one it began with. Where blocks of
    several threads overlap, the one that began last and has not ended counts.

    Raises:
        ValueError: if it is unknown or this CPU lacks it.
    """
    block = object()
    _forced.begin(block, name)
    try:
        yield
    finally:
        _forced.end(block)
