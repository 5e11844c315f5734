"""`tools/gpu_day.sh` rehearsed without a device: it ends in time, and says of each step what became of it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_day.sh"
SECONDS = 60
SLACK = 30  # on a busy machine, where even what is stopped takes its time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("timeout") is None, reason="needs timeout of coreutils"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="would use the GPU"),
]


def test_rehearsal(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out"), "--seconds", str(SECONDS)],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=10 * SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert time.monotonic() - start < SECONDS + SLACK, summary
    assert "torch finds no GPU here" in summary and "build: left out" in summary
    steps = re.findall(r"^(?:tests|step|timed) ([\w-]+) \d+ ", SCRIPT.read_text(), re.MULTILINE)
    assert {"tests", "tune", "linear-decode", "train-lora", "tests-slow"} <= set(steps)
    outcomes = dict(re.findall(r"\] ([\w-]+): (ok|left out|stopped|exit status)", summary))
    assert set(steps) <= set(outcomes), summary
    failed = sum(outcome != "ok" for name, outcome in outcomes.items() if name != "build")
    assert f"done: 0 failed tests, {failed} steps that did not end well" in summary, summary
    for name in steps:
        if outcomes[name] == "exit status":
            assert f"== {name}" in (tmp_path / "out" / "failures.txt").read_text()


def test_usage():
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr
