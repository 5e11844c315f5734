"""Regression tracking with pytest-benchmark: `pytest benchmarks/ --benchmark-only --benchmark-autosave`.

Each kernel is verified against the reference before it is timed. `qkernels bench linear` has the whole picture.
"""

import pytest
import torch

from qkernels.bench.candidate import FORWARD, GRAD_INPUT, OVERHEAD, WARM, Case
from qkernels.bench.ours import Module, Operator
from qkernels.bench.suite import Inputs
from qkernels.bench.torch_baselines import Float32

SHAPES = [(1, 768, 768), (16, 2048, 640), (256, 3072, 768)]


def run(benchmark, case: Case, make) -> None:
    with torch.no_grad():
        candidate, inputs = make(case), Inputs(case)
        verified = inputs.verify(candidate)
        benchmark(verified.call, candidate.convert_input(inputs.x))


def case(direction: str, m: int, n: int, k: int) -> Case:
    return Case(f"{n}x{k}", m, n, k, direction, WARM, "float32", torch.get_num_threads())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT])
@pytest.mark.parametrize("name", ["torch float32", "w8a8", "w4a8-g128", "w4a16-g32-asym"])
def test_linear(benchmark, name, direction, shape):
    benchmark.group = f"{direction} {shape}"
    run(benchmark, case(direction, *shape), Float32 if name == "torch float32" else lambda c: Operator(c, name))


@pytest.mark.parametrize("kind", [Float32, Operator, Module])
def test_overhead(benchmark, kind):
    benchmark.group = "overhead"
    run(benchmark, case(OVERHEAD, 1, 64, 64), kind if kind is Float32 else lambda c: kind(c, "w8a8"))
