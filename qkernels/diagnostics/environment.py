"""The surroundings that a number was taken in."""

from __future__ import annotations

import platform
import sys

import torch

from ..kernels import isa
from ..system.host import cpu_features, package_version
from ..version import __version__


def environment() -> dict[str, object]:
    """Versions, CPU and instruction set, for a report."""
    return {
        "qkernels": __version__,
        "python": platform.python_version(),
        "platform": sys.platform,
        "packages": {
            "torch": str(torch.__version__),  # with the CUDA it was built for, which its metadata may leave out
            **{name: package_version(name) for name in ("transformers", "peft", "triton")},
        },
        "cpu": cpu_features().get("cpu_name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "isa": isa.current(),
    }
