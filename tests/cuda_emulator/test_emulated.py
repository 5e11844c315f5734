"""Every CUDA kernel, run on the host under unkind schedules, gives what the reference does."""

import aligned
import emulated
import op_samples
import pytest
import torch
from bounds import assert_within_bound
from helpers import assert_same_bits

from qkernels import cuda, dispatch, reference

if emulated.MISSING:
    pytest.skip(emulated.MISSING, allow_module_level=True)

CASES = [
    (op, scheme)
    for op in ("quantize_activation", "quantize_rows", "linear", "int_grad_input")
    for scheme in op_samples.OP_SCHEMES[op]
]


def check(op: str, scheme: str, sample: op_samples.Sample, actual) -> None:
    """Equal bits where integers are multiplied, the bound of a float sum otherwise."""
    if op == "linear" and scheme in op_samples.FLOAT_SCHEMES:
        x, *stored, bias = sample.args[:5]
        exact = op_samples.exact_weight(*stored, x.shape[1], scheme)
        assert_within_bound(actual, x, exact, bias, sample.label)
        return
    expected = getattr(reference, op)(*sample.args)
    for result, wanted in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_same_bits(result, wanted, sample.label)


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def supported(op: str, sample: op_samples.Sample) -> bool:
    return cuda.supports(dispatch.call_of(op, sample.args, {}))


@pytest.mark.parametrize(("op", "scheme"), CASES)
def test_ragged_samples(op, scheme):
    kernels = emulated.library()
    for number, sample in enumerate(op_samples.samples(op, scheme)):
        if supported(op, sample):
            kernels.schedule(number, early_copies=number % 2 == 1)
            check(op, scheme, sample, getattr(kernels, op)(*sample.args))


@pytest.mark.parametrize(("op", "scheme", "shape", "dtype"), aligned.CASES, ids=aligned.IDS)
def test_aligned_samples(op, scheme, shape, dtype):
    kernels = emulated.library()
    sample = aligned.sample(op, scheme, shape, dtype)
    kernels.counts()
    for seed, early_copies in ((1, False), (2, True)):
        kernels.schedule(seed, early_copies)
        check(op, scheme, sample, getattr(kernels, op)(*sample.args))
    assert kernels.counts()["conflicts"] == 0


def test_few_columns_divide_the_depth():
    kernels = emulated.library()
    sample = aligned.sample("linear", "w4a16-g64-asym", (3, 70, 2048), torch.bfloat16)
    assert [len(launches) for launches in division(kernels, sample)] == [1, 2]
    kernels.processors = 64
    try:
        results = [kernels.linear(*sample.args) for _ in range(2)]
    finally:
        kernels.processors = 2
    check("linear", "w4a16-g64-asym", sample, results[0])
    assert_same_bits(*results)


def division(kernels: emulated.Emulated, sample: op_samples.Sample) -> list[list]:
    """The launches on a device with few processors, and on one with many."""
    found = []
    for kernels.processors in (2, 64):
        found.append(kernels.record("linear", *sample.args)[1])
    kernels.processors = 2
    return found


def test_samples_reach_every_kernel():
    kernels = emulated.library()
    reached = {"_ZN2qk4cuda17add_slices_kernelENS0_15FloatMatmulArgsE"}  # by the test above
    samples = [(op, sample) for op, scheme in CASES for sample in op_samples.samples(op, scheme)]
    samples += [(op, aligned.sample(op, scheme, shape, dtype)) for op, scheme, shape, dtype in aligned.CASES]
    for op, sample in samples:
        if supported(op, sample):
            reached |= {launch.kernel for launch in kernels.record(op, *sample.args)[1]}
    assert reached == kernels.kernels()
