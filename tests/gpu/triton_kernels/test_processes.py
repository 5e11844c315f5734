"""Checks in processes of their own: one cannot both interpret and compile kernels, and others use a second core."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

INTERPRETED = ("interpreted_checks.py", {"TRITON_INTERPRET": "1"})
TARGETS = ("target_checks.py", {})


# Of each: tests that pass at least, so that it cannot pass by collecting nothing.
@pytest.mark.parametrize(("checks", "least"), [(INTERPRETED, 300), (TARGETS, 6)], ids=["interpreted", "targets"])
def test_checks(checks, least, child):
    output, _ = child.communicate(timeout=400)
    assert child.returncode == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= least, output[-2000:]
