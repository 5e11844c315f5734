"""The measurements of `qkernels tune` on a GPU: the products of layers, each with every candidate's tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from ..formats.scheme import QuantScheme
from ..kernels import arguments
from ..kernels.quantizers import quantize_weight
from ..kernels.triton import ops
from ..kernels.triton.launch import run_all
from ..kernels.triton.target import Target
from ..kernels.triton.tiles import MatmulShape, Tile, bucket
from ..kernels.triton.tuning import Finding, search, target_of

# The operators that multiply, by what they are called with.
_FORWARD, _GRADIENT, _INT_GRADIENT = "linear", "linear_grad_input", "int_grad_input"


def calls(n: int, k: int, m: int, scheme: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Operators with bfloat16 arguments on the GPU, for a layer [n, k] and m tokens."""
    parsed = QuantScheme.parse(scheme)
    device = torch.device("cuda")
    stored = quantize_weight(torch.randn(n, k, device=device), scheme)
    x, grad = (torch.randn(m, size, device=device, dtype=torch.bfloat16) for size in (k, n))
    yield _FORWARD, (x, *stored, None, scheme)
    if parsed.int_activations:
        q = torch.randint(-127, 128, (m, n), dtype=torch.int8, device=device)
        columns = (
            ops.run("column_scales", arguments.bundle("column_scales", (*stored, k, scheme)), {})
            if parsed.group_size
            else None
        )
        yield _INT_GRADIENT, (q, torch.rand(m, device=device), *stored, k, scheme, columns)
    else:
        yield _GRADIENT, (grad, *stored, k, scheme)


def tune(
    cases: list[tuple[int, int, int, str]], seconds: float, progress: Callable[[str], None]
) -> tuple[str, list[Finding]]:
    """Search for each product of `cases` (n, k, m, scheme), in `seconds` all together.

    Returns:
        The name of the device, and what was found.
    """
    device = torch.device("cuda")
    target, findings = target_of(device), {}
    for index, (n, k, m, scheme) in enumerate(cases):
        share = seconds / len(cases)
        for op, args in calls(n, k, m, scheme):
            shape = next(launch.product for launch in ops.plan(op, args, target).launches if launch.product)
            if bucket(shape) in findings:
                continue
            progress(f"{index + 1} of {len(cases)}: {op} of {scheme}, {m} x {n} x {k}")
            measure = _timer(op, args, shape, target)
            findings[bucket(shape)] = search(shape, target, measure, share / 2)
    return torch.cuda.get_device_name(device), list(findings.values())


def _timer(op: str, args: tuple[Any, ...], shape: MatmulShape, target: Target) -> Callable[[Tile], float]:
    """Seconds of all launches of a call, given the tiles of its product."""

    def measure(config: Tile) -> float:
        configured = replace(target, tuned={bucket(shape): config})
        _, launches = ops.plan(op, args, configured)
        try:
            return triton.testing.do_bench(lambda: run_all(launches, args[0].device), return_mode="median") / 1e3
        except (triton.OutOfResources, triton.CompilationError):
            return float("inf")

    return measure
