"""The kernels in Triton's interpreter, in a process of their own: one either interprets kernels or compiles them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

CHECKS = Path(__file__).with_name("interpreted_checks.py")
LEAST = 300  # tests that pass at least, so that the process cannot pass by collecting nothing


def test_interpreted_kernels_equal_the_reference():
    command = [sys.executable, "-m", "pytest", str(CHECKS), "-q", "--disable-warnings", "-p", "no:xdist"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= LEAST, done.stdout[-2000:]
