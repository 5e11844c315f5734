"""Where the package keeps files for its user."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder `qkernels` in `XDG_CACHE_HOME`, or in `~/.cache` where that is unset or no absolute path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qkernels"
