"""What docs/guide/distributed.md promises, on two processes over gloo: one start for all checks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or sys.platform == "win32":
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import core_driver
import data_parallel_checks
from gpu_emulation.files import made_once
from two_processes import checks

pytestmark = pytest.mark.thorough
SUPPORT = Path(__file__).parents[1] / "support"
SECONDS = 180  # for all checks, on a machine of two cores


def launch(*command: str, timeout: float, **environment: str) -> str:
    """Run `python -m command`; what it wrote."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": timeout}
    try:
        return subprocess.run([sys.executable, "-m", *command], env=environment, **options).stdout
    except subprocess.TimeoutExpired as error:
        return f"{error.stdout}\nstopped after {timeout} s"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of the run, which the first worker that asks for it starts."""

    def run(target: Path) -> None:
        target.mkdir()
        data_parallel_checks.save_alone(target)
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        output = launch(*torchrun, str(SUPPORT / "two_processes.py"), str(target), timeout=900)
        (target / "output.txt").write_text(output)

    return made_once(core_driver.shared_folder(tmp_path_factory, "two_processes") / "run", run)


def lines(folder: Path, rank: int) -> dict[str, dict]:
    path = folder / f"{rank}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("name", checks())
def test_two_processes(name, folder):
    for rank in (0, 1):
        row = lines(folder, rank).get(name)
        output = (folder / "output.txt").read_text()[-3000:]
        assert row is not None, f"not run: a check before failed, or the processes died\n{output}"
        assert row["failure"] is None, f"rank {rank}: {row['failure']}\n{output}"


def test_the_page_names_every_check():
    page = Path(__file__).parents[2] / "docs" / "guide" / "distributed.md"
    if not page.exists():
        pytest.skip("needs the source tree")
    rows = re.findall(r"^\|.*\| `(\w+)` \|$", page.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(checks())


def test_all_checks_take_less_than_three_minutes(folder):
    assert sum(row["seconds"] for row in lines(folder, 0).values()) < SECONDS


def test_checkpoint_of_two_processes_loads_in_one(folder):
    data_parallel_checks.load_alone(folder)


def test_accelerate_launch():
    """The example under `accelerate launch`: two processes, which it counts as GPUs, told to stay on the CPU."""
    example = Path(__file__).parents[2] / "examples" / "two_processes.py"
    machine = ("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    command = ("accelerate.commands.launch", *machine, "--num_processes", "2", "--main_process_port", "0")
    output = launch(*command, str(example), "--steps", "10", timeout=300, ACCELERATE_USE_CPU="true")
    assert re.search(r"step 10: loss \d", output), output
    assert sorted(re.findall(r"process (\d) holds", output)) == ["0", "1"]
