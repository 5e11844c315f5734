"""Errors about values on a GPU that are told without waiting for it: by a later call, once the device has got there."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class _Pending(NamedTuple):
    reached: torch.cuda.Event
    broken: Tensor  # bool of shape [], in pinned memory
    message: str


class LateErrors:
    """Errors of calls on GPUs that are still to be told, in the order of the calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[_Pending] = deque()

    def watch(self, broken: Tensor, message: str) -> None:
        """Have `message` raised if the bool `broken` of shape [] on a GPU turns out to be true.

        While a CUDA graph is captured nothing is watched: its replays run no Python that could raise.
        """
        if torch.cuda.is_current_stream_capturing():
            return
        on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
        on_host.copy_(broken, non_blocking=True)
        reached = torch.cuda.Event()
        reached.record()
        with self._lock:
            self._pending.append(_Pending(reached, on_host, message))

    def tell(self) -> None:
        """Raise what has been found out since this was last called; does not wait.

        Raises:
            RuntimeError: the message of the first call that was broken.
        """
        if not self._pending or torch.cuda.is_current_stream_capturing():
            return
        with self._lock:
            while self._pending and self._pending[0].reached.query():
                if (found := self._pending.popleft()).broken:
                    self._pending.clear()
                    raise RuntimeError(f"{found.message} (in a call before this one)")


late_errors = LateErrors()
