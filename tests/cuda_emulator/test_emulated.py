"""Every CUDA kernel, run on the host under unkind schedules, gives the bits of the reference."""

import emulated
import op_samples
import pytest
from helpers import assert_same_bits

if emulated.MISSING:
    pytest.skip(emulated.MISSING, allow_module_level=True)

CASES = [
    (op, scheme)
    for op in ("quantize_activation", "quantize_rows", "linear", "int_grad_input")
    for scheme in op_samples.OP_SCHEMES[op]
    if op != "linear" or scheme in op_samples.INT_SCHEMES
]


@pytest.mark.parametrize(("op", "scheme"), CASES)
def test_bits_of_the_reference(op, scheme):
    kernels = emulated.library()
    for number, (sample, expected) in enumerate(op_samples.expected(op, scheme)):
        kernels.schedule(number, early_copies=number % 2 == 1)
        actual = getattr(kernels, op)(*sample.args)
        for result, wanted in zip(actual if isinstance(actual, tuple) else (actual,), expected, strict=True):
            assert_same_bits(result, wanted, sample.label)
