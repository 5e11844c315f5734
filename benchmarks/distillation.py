"""What distillation gains: `examples/distillation.py` with two schemes, and with more digits for the student.

`python benchmarks/distillation.py` writes the rows that docs/guide/pruning-distillation.md quotes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from qkernels.diagnostics.environment import environment
from qkernels.system import json_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = (("w4a8-g32", 100), ("w8a8", 100), ("w4a8-g32", 300))
LINE = re.compile(r"^(?P<name>[a-z ]+): (?P<mean>[0-9.]+) \(over seeds: (?P<deviation>[0-9.]+)\)$", re.MULTILINE)


def measure(scheme: str, digits: int, seeds: int) -> dict[str, Any]:
    """The accuracies that the example prints, and their standard deviations over seeds."""
    command = [sys.executable, str(ROOT / "examples" / "distillation.py"), "--scheme", scheme]
    command += ["--digits", str(digits), "--seeds", str(seeds)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{scheme}, {digits} digits\n{printed}", flush=True)
    found = {m["name"]: [float(m["mean"]), float(m["deviation"])] for m in LINE.finditer(printed)}
    return {"scheme": scheme, "digits": digits, "seeds": seeds, "accuracy": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "distillation.json")
    arguments = parser.parse_args()
    rows = [measure(scheme, digits, arguments.seeds) for scheme, digits in RUNS]
    json_file.write(arguments.output, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
