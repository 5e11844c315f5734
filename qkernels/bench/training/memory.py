"""Memory of one contender, in a process of its own: `python -m qkernels.bench.training.memory` with JSON on stdin."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

STEPS = 3


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the process.

    Attributes:
        libraries: with everything imported, before there is a model.
        loaded: with the converted model.
        peak: the most during `STEPS` steps.
    """

    libraries: int
    loaded: int
    peak: int

    @property
    def growth(self) -> int:
        """What training adds to the loaded model."""
        return self.peak - self.loaded


def measure(case: str, contender: str, schemes: Sequence[str], grad_dtypes: Sequence[str]) -> Memory:
    """Load, convert and train in a new process.

    Args:
        case, contender: by name.
        schemes, grad_dtypes: what `contenders` was given.

    Raises:
        RuntimeError: if the process fails, with the end of what it wrote.
    """
    request = {"case": case, "contender": contender, "schemes": list(schemes), "grad_dtypes": list(grad_dtypes)}
    done = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender} on {case}: exit status {done.returncode}: {done.stderr.strip()[-500:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(case: str, contender: str, schemes: Sequence[str], grad_dtypes: Sequence[str]) -> Memory:
    import psutil

    from ...finetune.measure import PeakMemory
    from ...system import heap
    from .cases import CASES
    from .contenders import contenders

    def resident() -> int:
        gc.collect()
        heap.trim()
        return psutil.Process().memory_info().rss

    found, chosen = CASES[case], contenders(CASES[case], schemes, grad_dtypes, peers=True)
    trainer = next(item for item in chosen if item.name == contender)
    for reason in (found.unavailable(), trainer.unavailable()):  # imports what is needed
        if reason is not None:
            raise RuntimeError(reason)
    with trainer.scope():
        libraries = resident()
        training = found.start(trainer.convert(found.model(trainer.dtype)), trainer.dtype)
        loaded = resident()
        with PeakMemory() as peak:
            for _ in range(STEPS):
                training.step()
    return Memory(libraries, loaded, peak.bytes)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(**json.load(sys.stdin)))))


def huge_pages() -> bool:
    """Whether large tensors on the CPU lie in huge pages, as torch asks for with `THP_MEM_ALLOC_ENABLE=1`."""
    import torch

    block = torch.ones(1 << 26, dtype=torch.uint8)
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return False
    inside = False
    for line in lines:
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            inside = begin <= block.data_ptr() < end
        elif inside and first == "AnonHugePages:":
            return int(rest.split()[0]) > 0
    return False
