"""Seconds per call of several candidates, timed in turn in one process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

MIN_TURNS = 5
BURST = 3e-3  # seconds of consecutive calls that make one sample
SETTLE = 1e-3  # seconds of calls before them: threads of other libraries stop spinning, and caches fill


class Turns:
    """The calls of one candidate.

    Args:
        calls: taken cyclically: one call, or as many as there are copies of the weight.
        x: what each is called with.
        scope: entered around each turn, outside of the timed part.
        finish: waits until the calls are done, for devices that work on after they return.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[Any], object]],
        x: Any,
        scope: Callable[[], AbstractContextManager[object]] = nullcontext,
        finish: Callable[[], None] = lambda: None,
    ):
        self._calls: Iterator[Callable[[Any], object]] = itertools.cycle(calls)
        self._x, self._scope, self._finish = x, scope, finish
        self._repeat: int | None = None  # calls in a burst, known after the first turn
        self.samples: list[float] = []

    def turn(self) -> None:
        """Add a sample: the mean of a burst of calls."""
        with self._scope():
            slowest_allowed = time.perf_counter() + SETTLE
            calls = 0
            while calls == 0 or time.perf_counter() < slowest_allowed:
                self._run(1)
                calls += 1
            if self._repeat is None:
                self._repeat = max(1, round(BURST / self._run(1)))
            self.samples.append(self._run(self._repeat) / self._repeat)

    def _run(self, repeat: int) -> float:
        x = self._x
        calls = itertools.islice(self._calls, repeat)
        self._finish()
        start = time.perf_counter()
        for call in calls:
            call(x)
        self._finish()
        return time.perf_counter() - start


def interleave(candidates: Sequence[Turns], seconds: float) -> None:
    """Take turns for `seconds` for each candidate, so that a neighbour's load hits all of them alike."""
    end = time.perf_counter() + seconds * len(candidates)
    turns = 0
    while turns < MIN_TURNS or time.perf_counter() < end:
        for candidate in candidates:
            candidate.turn()
        turns += 1
