"""CPU seconds and peak memory of `quantize_` on a stack of linear layers, 1 GB of bfloat16 by default.

    python benchmarks/quantize_cost.py --layers 32 --output benchmarks/results/quantize_cost.json

CPU seconds are those of all threads (`time.process_time`); the model is built anew for each row.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch
from torch import nn

import qkernels as qk
from qkernels.kernels import isa

SCHEMES = ("w8a8", "w4a8-g32", "w4a8-g32-asym")


def measure(scheme: str, layers: int, size: int, threads: int) -> dict:
    """One row: quantize a fresh model of `layers` matrices [size, size] with `threads` threads."""
    torch.set_num_threads(threads)
    weight = torch.randn(size, size).bfloat16()
    model = nn.Sequential(
        *(nn.Linear(size, size, bias=False, device="meta", dtype=weight.dtype) for _ in range(layers))
    )
    for layer in model:
        layer.weight = nn.Parameter(weight.clone())
    before, cpu, wall = _resident(), time.process_time(), time.perf_counter()
    report = qk.quantize_(model, scheme)
    row = {
        "scheme": scheme,
        "threads": threads,
        "bytes": report.bytes_before,
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "peak_above_model_bytes": max(0, _peak() - before),
    }
    return row


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    measure("w8a8", 1, arguments.size, 1)  # loads what is loaded once
    rows = [measure(scheme, arguments.layers, arguments.size, threads) for scheme in SCHEMES for threads in (1, 2)]
    machine = {"cpu": _processor(), "isa": isa.current(), "torch": torch.__version__}
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
