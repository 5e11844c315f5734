"""Every method of PEFT over a float model and quantized ones: `python benchmarks/peft_methods.py`.

It runs the methods of `tests/support/peft_matrix.py`, which the tests run as well, and writes
benchmarks/results/peft-matrix.json. `python tools/tables.py` makes the table of docs/guide/peft.md of that.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peft-matrix.json"
BASES = ("float", "w8a8", "w4a8-g32", "qat", "int8")


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


def main() -> None:
    measured = measure()
    lines = ",\n  ".join(json.dumps(row) for row in measured["rows"])
    text = f'{{\n "libraries": {json.dumps(measured["libraries"])},\n "rows": [\n  {lines}\n ]\n}}\n'
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
