"""The kernels as compiled by nvcc, executed by the PTX interpreter, give what the reference does."""

import cuda_cases as cases
import op_samples
import pytest
import torch
from gpu_emulation.project import compiled, emulated

MISSING = emulated.MISSING or compiled.MISSING
if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

pytestmark = pytest.mark.slow
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# A tile and a bit of each size, for the interpreter is slow.
CASES = [
    ("quantize_activation", "w8a8", (2, 300), F32),
    ("quantize_activation", "w8a8-ag64", (2, 328), BF16),
    ("quantize_rows_stochastic", "w8a8", (2, 328), F16),
    ("linear", "w8a8", (5, 40, 96), F32),
    ("linear", "w8a8", (66, 70, 96), BF16),
    ("linear", "w8a8", (3, 7, 50), BF16),
    ("linear", "w8a8-g32-ag64", (5, 40, 96), F32),
    ("linear", "w4a8", (70, 36, 96), F16),
    ("linear", "w4a8-g32-asym", (5, 40, 160), F32),
    ("linear", "w4a8-g128-asym", (66, 70, 160), BF16),
    ("linear", "w4a8-g64", (3, 9, 77), BF16),
    ("linear", "w8a16", (5, 40, 96), BF16),
    ("linear", "w8a16-g64", (20, 40, 160), F16),
    ("linear", "w4a16-asym", (20, 40, 96), F16),
    ("linear", "w4a16-g32-asym", (5, 40, 160), BF16),
    ("linear", "w4a16-g32-asym", (1, 9, 288), BF16),
    ("linear", "w8a16", (1, 9, 288), F16),
    ("int_grad_input", "w8a8", (5, 48, 80), torch.int8),
    ("int_grad_input", "w4a8-g32-asym", (5, 80, 66), torch.int8),
]
IDS = ["-".join(map(str, (op, scheme, *shape, str(dtype)[6:]))) for op, scheme, shape, dtype in CASES]


@pytest.mark.parametrize(("op", "scheme", "shape", "dtype"), CASES, ids=IDS)
def test_compiled_code(op, scheme, shape, dtype):
    sample: op_samples.Sample = cases.sample(op, scheme, shape, dtype)
    cases.check(op, scheme, sample, compiled.run(op, sample.args))
