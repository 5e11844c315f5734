"""Every CUDA kernel, run on the host under unkind schedules, gives what the reference does."""

import cuda_cases as cases
import op_samples
import pytest
import torch
from cuda_cases import check
from gpu_emulation.project import emulated
from helpers import assert_same_bits

from qkernels.kernels import cuda_library, dispatch

if emulated.MISSING:
    pytest.skip(emulated.MISSING, allow_module_level=True)

CASES = [
    (op, scheme)
    for op in ("quantize_activation", "quantize_rows_stochastic", "linear", "linear_with_saved_input", "int_grad_input")
    for scheme in op_samples.OP_SCHEMES[op]
    if op != "linear_with_saved_input" or "-ag" not in scheme
]


def supported(op: str, sample: op_samples.Sample) -> bool:
    return cuda_library.supports(dispatch.call_of(op, op_samples.schema_args(sample.args)))


@pytest.mark.parametrize(("op", "scheme"), CASES)
def test_ragged_samples(op, scheme):
    kernels = emulated.library()
    for number, sample in enumerate(op_samples.samples(op, scheme, 4)):
        if supported(op, sample):
            kernels.schedule(number, early_copies=number % 2 == 1)
            check(op, scheme, sample, kernels.call(op, *sample.args))


@pytest.mark.parametrize(("op", "scheme", "shape", "dtype"), cases.CASES, ids=cases.IDS)
def test_every_kind_of_kernel(op, scheme, shape, dtype):
    kernels = emulated.library()
    sample = cases.sample(op, scheme, shape, dtype)
    kernels.counts()
    for seed, early_copies in ((1, False), (2, True)):
        kernels.schedule(seed, early_copies)
        check(op, scheme, sample, kernels.call(op, *sample.args))
    assert kernels.counts()["conflicts"] == 0


def test_saving_quantizes_once_where_the_product_reads_what_is_saved():
    """And where it reads padded rows or another order, which 40 columns or 4 bits make it do, a second time."""
    kernels = emulated.library()
    for scheme, columns, launches in (("w8a8", 64, 2), ("w8a8-g32", 96, 2), ("w8a8", 40, 3), ("w4a8", 64, 3)):
        sample = cases.sample("linear_with_saved_input", scheme, (5, 33, columns), torch.bfloat16)
        assert len(kernels.record("linear_with_saved_input", *sample.args)) == launches, (scheme, columns)


def test_few_columns_divide_the_depth():
    kernels = emulated.library()
    sample = cases.sample("linear", "w4a16-g64-asym", (3, 70, 2048), torch.bfloat16)
    assert [len(launches) for launches in division(kernels, sample)] == [1, 2]
    kernels.processors = 64
    try:
        results = [kernels.call("linear", *sample.args) for _ in range(2)]
    finally:
        kernels.processors = 2
    check("linear", "w4a16-g64-asym", sample, results[0])
    assert_same_bits(*results)


def division(kernels: emulated.Emulated, sample: op_samples.Sample) -> list[list]:
    """The launches on a device with few processors, and on one with many."""
    found = []
    for kernels.processors in (1, 64):
        found.append(kernels.record("linear", *sample.args))
    kernels.processors = 2
    return found


def test_cases_reach_every_kernel():
    kernels = emulated.library()
    reached = {"_ZN2qk4cuda17add_slices_kernelENS0_15FloatMatmulArgsE"}  # by the test above
    for op, scheme, shape, dtype in cases.CASES:
        sample = cases.sample(op, scheme, shape, dtype)
        reached |= {launch.kernel for launch in kernels.record(op, *sample.args)}
    assert reached == kernels.kernels()


@pytest.mark.parametrize(
    ("choice", "shape", "reason"),
    [
        ("tile", (16, 4096, 4096, 108), "at most 16 rows"),
        ("tile", (17, 4096, 4096, 108), "64 x 64"),
        ("tile", (512, 4096, 4096, 108), "128 x 128"),
        ("tile", (512, 1024, 4096, 108), "64 x 64"),
        ("tile", (512, 4096, 4100, 108), "16 bytes"),
        ("slices", (16, 4096, 4096, 108), "idle"),
        ("slices", (16, 28672, 4096, 108), "occupy"),
        ("slices", (17, 4096, 4096, 108), "more than 16 rows"),
    ],
)
def test_choice_and_its_reason(choice, shape, reason):
    assert reason in emulated.library().reason(choice, *shape)
