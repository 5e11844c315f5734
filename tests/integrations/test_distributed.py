"""mode="int8" on two ranks: equal bits, shards of integers, and clear refusals (docs/gradients.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or sys.platform == "win32":
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)


@pytest.mark.parametrize("case", ["ddp", "zero", "broadcast", "fsdp", "fsdp1"])
def test_two_ranks(case, tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "distributed_int8.py"), case, str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
