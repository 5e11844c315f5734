"""Memory that the C library keeps.

NOTE [heap]. Most blocks that torch asks for come from glibc's heap, and training all weights of a quantized model
breaks it into pieces: with BERT it grew by 50 MB a step, all of it free. (An aligned block that was freed serves no
other of its size in glibc before 2.38, unless its neighbours are free, too; the cause is not fully understood.) The
system takes free pages back when it is told to, but they then have to be mapped again, so it is told once for some
gigabytes of gradients.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from torch import Tensor

GRADIENTS_PER_TRIM = 4 << 30  # bytes; the heap grows by a tenth to a fifth of this meanwhile


def trim() -> None:
    """Give freed memory back to the system where the C library (glibc) can."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


class Trimmer:
    """Trims the heap now and then during a training of all weights.

    `qkernels finetune` has one; a loop of one's own calls `step` after each backward.

    >>> layer = torch.nn.Linear(4, 2)
    >>> trimmer = Trimmer()
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> trimmer.step(layer.parameters())
    """

    def __init__(self) -> None:
        self.since_trim = 0  # bytes of gradients

    def step(self, parameters: Iterable[Tensor]) -> None:
        """Count the trained matrices on the CPU; after `GRADIENTS_PER_TRIM` bytes of their gradients, trim.

        Args:
            parameters: of the model, any shapes and dtypes; what is frozen is left out.
        """
        for tensor in parameters:
            if tensor.requires_grad and tensor.dim() > 1 and tensor.device.type == "cpu":
                self.since_trim += tensor.numel() * tensor.element_size()
        if self.since_trim >= GRADIENTS_PER_TRIM:
            self.since_trim = 0
            trim()
