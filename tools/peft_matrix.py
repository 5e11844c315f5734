"""The table of docs/guide/peft.md: every method of PEFT over a float model and quantized ones.

    python tools/peft_matrix.py --run     runs the methods, writes benchmarks/results/peft-matrix.json and the table
    python tools/peft_matrix.py           writes the table from that file

The methods are those of `tests/support/peft_matrix.py`, which the tests run as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peft-matrix.json"
PAGE = ROOT / "docs" / "guide" / "peft.md"
BEGIN, END = "<!-- matrix: generated -->\n", "<!-- end -->"
BASES = ("float", "w8a8", "w4a8-g32", "qat", "int8")
STEPS = ("train", "save", "disable", "copy", "merge", "unmerge", "bfloat16")


def measure() -> dict[str, Any]:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    import peft_matrix
    import transformers

    transformers.logging.set_verbosity_error()
    rows = []
    for row in peft_matrix.ROWS:
        for base in BASES:
            result = asdict(peft_matrix.run(row, base))
            print(row.name, base, result["refused"] or peft_matrix.Result(**result).failures() or "ok", flush=True)
            rows.append(result)
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"libraries": libraries, "rows": rows}


def cell(result: dict[str, Any]) -> str:
    """What one method did over one base: "ok" and the error of its merge, or the steps that failed."""
    if result["refused"]:
        return "refused"
    failed = [step for step in STEPS if result[step] not in ("ok", "-")]
    text = "fails to " + ", ".join(failed) if failed else "ok"
    if result["rounding"] is not None:
        text += f", {result['rounding']:.3f}"
    return text


def table(results: dict[str, Any]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for result in results["rows"]:
        text = cell(result)
        if result["base"] == "float" and not result["refused"] and result["merge"] == "-":
            text += ", no merge"
        if result["initialization"] is not None:
            text += f" ({result['initialization']:.3f})"
        cells.setdefault(result["name"], {})[result["base"]] = text
    lines = ["| method | " + " | ".join(BASES) + " |", "| --- |" + " --- |" * len(BASES)]
    lines += [f"| {name} | " + " | ".join(row[base] for base in BASES) + " |" for name, row in cells.items()]
    made_with = ", ".join(f"{name} {number}" for name, number in results["libraries"].items())
    return "\n".join([*lines, "", f"Made with {made_with} by `python tools/peft_matrix.py --run`.", ""])


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the table of these results."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the methods first")
    if parser.parse_args().run:
        measured = measure()
        lines = ",\n  ".join(json.dumps(row) for row in measured["rows"])
        text = f'{{\n "libraries": {json.dumps(measured["libraries"])},\n "rows": [\n  {lines}\n ]\n}}\n'
        RESULTS.write_text(text, encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
