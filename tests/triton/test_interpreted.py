"""The operators under Triton's interpreter, in a process of its own: one cannot both interpret and compile kernels."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

LEAST = 300  # tests in the child, so that it cannot pass by collecting nothing


def test_operators_equal_the_reference(interpreting):
    output, _ = interpreting.communicate(timeout=400)
    assert interpreting.returncode == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= LEAST, output[-2000:]
