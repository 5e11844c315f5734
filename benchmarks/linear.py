"""Times one linear layer against torch: forward and input gradient, interleaved in one process, as medians.

Every product is checked against the reference before it is timed. Writes one JSON file per machine and thread count
into benchmarks/results/, which is what the README quotes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

import qkernels as qk
from qkernels import isa, ops, reference

SHAPES = [(1, 2048, 2048), (16, 2048, 2048), (256, 2048, 2048), (512, 640, 2048), (512, 2048, 640)]
SCHEMES = ["w8a8", "w8a8-ag128", "w4a8-g32-asym", "w4a16-g32-asym"]


def cpu_name() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    flags = " with avx512_vnni" if "avx512_vnni" in Path("/proc/cpuinfo").read_text() else ""
    return (match[1].strip() if match else platform.processor()) + flags


def interleaved_medians(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each candidate, taken in turn, so that a neighbour's load hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def candidates(m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(m, k, generator=generator), torch.randn(m, n, generator=generator)
    weight = torch.randn(n, k, generator=generator)
    x16, weight16, grad16 = x.bfloat16(), weight.bfloat16(), grad.bfloat16()
    runs: dict[str, Callable[[], object]] = {
        "torch float32": lambda: linear(x, weight),
        "torch bfloat16": lambda: linear(x16, weight16),
        "torch float32 grad_input": lambda: grad @ weight,
        "torch bfloat16 grad_input": lambda: grad16 @ weight16,
    }
    for scheme in SCHEMES:
        stored = qk.quantize_weight(weight, scheme)
        actual, expected = ops.linear(x, *stored, None, scheme), reference.linear(x, *stored, None, scheme)
        if qk.QuantScheme.parse(scheme).int_activations:
            assert torch.equal(actual, expected), scheme
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(
            ops.linear_grad_input(grad, *stored, k, scheme),
            reference.linear_grad_input(grad, *stored, k, scheme),
            rtol=1e-4,
            atol=1e-3,
        )
        runs[scheme] = lambda stored=stored, scheme=scheme: ops.linear(x, *stored, None, scheme)
        runs[f"{scheme} grad_input"] = lambda stored=stored, scheme=scheme: ops.linear_grad_input(
            grad, *stored, k, scheme
        )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/linear-<cpu>-<threads>t.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    for m, n, k in SHAPES:
        times = interleaved_medians(candidates(m, n, k), args.seconds)
        for name, samples in times.items():
            quartiles = statistics.quantiles(samples, n=4)
            backward = name.endswith("grad_input")
            baseline = statistics.median(times["torch float32 grad_input" if backward else "torch float32"])
            rows.append(
                {
                    "m": m,
                    "n": n,
                    "k": k,
                    "name": name,
                    "median_ms": quartiles[1] * 1e3,
                    "quartiles_ms": [quartiles[0] * 1e3, quartiles[2] * 1e3],
                    "gops": 2 * m * n * k / quartiles[1] / 1e9,
                    "speedup_over_float32": baseline / quartiles[1],
                    "samples": len(samples),
                }
            )

    table = Table("M x N x K", "", "ms", "Gop/s", "x torch float32", title=f"{cpu_name()}, {args.threads} threads")
    for row in rows:
        table.add_row(
            f"{row['m']} x {row['n']} x {row['k']}",
            row["name"],
            f"{row['median_ms']:.3f}",
            f"{row['gops']:.0f}",
            f"{row['speedup_over_float32']:.2f}",
        )
    Console().print(table)

    name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    output = args.output or Path(__file__).with_name("results") / f"linear-{name}-{isa.current()}-{args.threads}t.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": cpu_name(),
        "isa": isa.current(),
        "threads": args.threads,
        "torch": torch.__version__,
        "qkernels": qk.__version__,
        "date": datetime.date.today().isoformat(),
    }
    output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
