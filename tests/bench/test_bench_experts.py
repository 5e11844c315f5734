"""`qkernels bench experts`: what it times is checked, and what it writes can be read."""

import pytest
import torch
from helpers import assert_refused, invoke

pytest.importorskip("transformers")

from qkernels.bench import experts
from qkernels.bench.ours import WrongResult
from qkernels.bench.results import Results

SMALL = {"tokens": (3, 1), "experts": 4, "taken": 2, "hidden": 64, "intermediate": 32, "threads": (1,), "seconds": 0.01}


def test_rows_of_a_run():
    results = experts.run(experts.ExpertsPlan(**SMALL, schemes=("w8a8",)))
    names = [row.name for row in results.rows[:4]]
    assert names == [
        "transformers grouped_mm float32",
        "transformers grouped_mm bfloat16",
        "qkernels w8a8 float32",
        "qkernels w8a8 bfloat16",
    ]
    assert [row.ours for row in results.rows[:4]] == [False, False, True, True]
    assert [row.m for row in results.rows] == [6] * 4 + [2] * 4
    assert results.rows[0].error == 0
    assert all(0 < row.error < 0.06 and row.median > 0 and row.limit > 0 for row in results.rows[1:4])


def test_a_wrong_result_is_not_timed():
    plan = experts.ExpertsPlan(**SMALL)
    module = experts.float_experts(plan)
    wrong = experts.Experts("qkernels w8a8 float32", "int8", 8, torch.float32, lambda x, *_: x + 1, 0.06)
    with torch.no_grad(), pytest.raises(WrongResult, match="w8a8 float32: relative error"):
        experts.Inputs(plan, 3, module).error(wrong)


def test_command(tmp_path):
    sizes = ["--tokens", "2", "--experts", "3", "--taken", "1", "--hidden", "32", "--intermediate", "32"]
    done = invoke("bench", "experts", *sizes, "--seconds", "0.01", "--only", "*w8a8*", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    rows = Results.load(tmp_path / "experts.json").rows
    assert [row.name for row in rows] == ["qkernels w8a8 float32", "qkernels w8a8 bfloat16"]
    assert_refused(invoke("bench", "experts", "--taken", "65", "--output", tmp_path), "taken", "65")
