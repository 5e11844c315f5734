"""Memory that the C library keeps.

NOTE [heap]. Most blocks that torch asks for come from glibc's heap, and training all weights of a quantized model
breaks it into pieces: with BERT it grew by 50 MB a step, all of it free. (An aligned block that was freed serves no
other of its size in glibc before 2.38, unless its neighbours are free, too; whether that is all of it was not found
out.) The system takes free pages back when it is told to, but they then have to be mapped again, so it is told once for
some gigabytes of gradients.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

GRADIENTS_PER_TRIM = 4 << 30  # bytes; the heap grows by a tenth to a fifth of this meanwhile

_since_trim = 0


def trim() -> None:
    """Give freed memory back to the system where the C library (glibc) can."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def count_gradient(grad: Tensor) -> None:
    """To be called for each gradient of a weight; trims the heap now and then. Only tensors of the CPU count."""
    global _since_trim
    if grad.device.type != "cpu":
        return
    _since_trim += grad.numel() * grad.element_size()
    if _since_trim >= GRADIENTS_PER_TRIM:
        _since_trim = 0
        trim()
