"""docs/guide/convolutions.md holds the table of the results file."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

if not (ROOT / "benchmarks" / "resnet18.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)


def test_the_table_is_that_of_the_results():
    spec = importlib.util.spec_from_file_location("resnet18_benchmark", ROOT / "benchmarks" / "resnet18.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows, text = json.loads(benchmark.RESULTS.read_text())["rows"], benchmark.PAGE.read_text()
    assert benchmark.page(text, rows) == text, "run python benchmarks/resnet18.py --page"
    assert {row["name"] for row in rows} >= {"torch float32", "torch.ao static int8 (x86)", "w8a8, folded"}
