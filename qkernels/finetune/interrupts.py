"""Ctrl-C and termination as a wish that the training loop can grant after its step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_NOTICE = b"\nstopping after this step, then saving; interrupt again to stop at once and lose what is not saved\n"


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and what it had done is saved; the message says where, and how to go on."""


class Interrupts:
    """Context manager that handles SIGINT, SIGTERM and SIGHUP; each raises `KeyboardInterrupt` outside `deferred`.

    Signals that the process ignores (`nohup`) stay ignored. Outside the main thread, where Python handles no signals,
    nothing is changed.

    Attributes:
        requested: whether a signal came inside `deferred`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block the first signal sets `requested`, and only another one raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._deferred or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, _NOTICE)  # print is not allowed to be interrupted by itself
