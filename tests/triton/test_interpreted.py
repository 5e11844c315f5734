"""The operators under Triton's interpreter, in a process of its own: one cannot both interpret and compile kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

CHECKS = Path(__file__).with_name("interpreted_checks.py")
LEAST = 300  # tests in the child, so that it cannot pass by collecting nothing


def test_operators_equal_the_reference():
    command = [sys.executable, "-m", "pytest", str(CHECKS), "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= LEAST, result.stdout[-2000:]
