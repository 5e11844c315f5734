"""`Target`: the GPU that tiles are chosen for, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """The GPU that a kernel is configured for.

    Attributes:
        backend: "cuda" or "hip".
        capability: compute capability times ten (80, 89, 90, ...); 0 on HIP.
        processors: multiprocessors (compute units), each of which runs a few programs at a time.
        shared_bytes: shared memory that one program may use.
        tuned: tiles that were measured to be the fastest, by product (`tuning.tuned`), before those of `tiles.choose`.
    """

    backend: str
    capability: int
    processors: int
    shared_bytes: int
    tuned: Mapping[Any, Any] = field(default_factory=dict, compare=False, repr=False)
