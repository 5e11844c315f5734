"""Reads a checkpoint that somebody may have broken, in little memory and time."""

import resource
import time
from contextlib import contextmanager
from pathlib import Path

from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.registry import open_checkpoint

SECONDS = 5  # far more than any of these files takes, also on a busy machine
BYTES = 1 << 30  # of address space, above what is in use


@contextmanager
def little_memory():
    """Let an allocation of more than `BYTES` fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(path: Path) -> None:
    """Read each tensor of a checkpoint."""
    found = open_checkpoint(path, Losses("requantize"))
    for part in (*found.layers.values(), *found.floats.values()):
        part.read()


def is_read_or_refused(path: Path) -> str | None:
    """Read all of a checkpoint; the message if it was refused."""
    started, message = time.process_time(), None
    try:
        with little_memory():
            read_all(path)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert 10 < len(message) < 3000, message
    assert time.process_time() - started < SECONDS, message
    return message
