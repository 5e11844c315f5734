"""docs/guide/peft.md holds the table of the results file."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

if not (ROOT / "tools" / "peft_matrix.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)


def test_the_table_is_that_of_the_results():
    spec = importlib.util.spec_from_file_location("peft_matrix_page", ROOT / "tools" / "peft_matrix.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    results, text = json.loads(generator.RESULTS.read_text()), generator.PAGE.read_text()
    assert generator.page(text, results) == text, "run python tools/peft_matrix.py"
    assert len(results["rows"]) == len({row["name"] for row in results["rows"]}) * len(generator.BASES)
    assert "fails" not in generator.table(results)
