"""What a run leaves behind: rows with their surroundings, as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diagnostics.environment import environment
from ..profiling.roofline import Roofline, cache_bytes
from ..system import json_file
from ..system.host import package_version

FORMAT = 1
PROGRAM = "qkernels bench linear"
PACKAGES = (
    "torch", "numpy", "transformers", "peft", "torchao", "bitsandbytes", "sdnq", "onnxruntime", "openvino",
    "llama-cpp-python", "auto-round-lib",
)  # fmt: skip
FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Row:
    """One candidate on one case. Times are seconds a call.

    Attributes:
        name: of the candidate.
        ours: whether it is a kernel of qkernels.
        layer, m, n, k, direction, weights, dtype, threads: the case; dtype is the candidate's own.
        copies: of the weight that the calls rotate over (1: warm).
        check: how the result was verified.
        error: relative Frobenius error against the float64 product of the same inputs.
        median, quartiles, samples: of the times.
        limit: the least time by the roofline of the same minute, and
        limited_by: what sets it, an instruction or a level of memory.
    """

    name: str
    ours: bool
    layer: str
    m: int
    n: int
    k: int
    direction: str
    weights: str
    dtype: str
    threads: int
    copies: int
    check: str
    error: float
    median: float
    quartiles: tuple[float, float]
    samples: int
    limit: float
    limited_by: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes rows of two runs comparable."""
        return (self.direction, self.weights, self.threads, self.n, self.k, self.m, self.dtype, self.name)

    @property
    def cell(self) -> tuple[Any, ...]:
        """What rows that were timed in turn have in common."""
        return (self.direction, self.weights, self.threads, self.n, self.k, self.m)

    @property
    def fraction(self) -> float:
        """Of the limit: 1 is as fast as this machine can be."""
        return self.limit / self.median

    @property
    def rate(self) -> float:
        """Operations per second; a multiply-add is 2."""
        return 2 * self.m * self.n * self.k / self.median


@dataclass(frozen=True)
class Skipped:
    """Why a candidate was not timed, in so many cells."""

    name: str
    reason: str
    cells: int


@dataclass
class Results:
    """A whole run."""

    machine: dict[str, Any]
    rooflines: list[Roofline]
    rows: list[Row]
    skipped: list[Skipped]

    def save(self, folder: Path, stem: str = "linear") -> tuple[Path, Path]:
        """Write `stem`.json and `stem`.csv into `folder`."""
        path, table = folder / f"{stem}.json", folder / f"{stem}.csv"
        json_file.write(path, {"format": FORMAT} | dataclasses.asdict(self))
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            fields = [field.name for field in dataclasses.fields(Row) if field.name != "quartiles"]
            writer.writerow([*fields, "quartile_1", "quartile_3", "fraction", "operations_per_second"])
            for row in self.rows:
                values = [getattr(row, name) for name in fields]
                writer.writerow([*values, *row.quartiles, row.fraction, row.rate])
        return path, table

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote: the JSON file, or the folder that holds `linear.json`.

        Raises:
            ValueError: if it is not such a file.
        """
        file = path / "linear.json" if path.is_dir() else path
        data = json_file.read(file, program=PROGRAM, version=FORMAT)
        with json_file.describing(file, PROGRAM):
            rows = [Row(**row | {"quartiles": tuple(row["quartiles"])}) for row in data["rows"]]
            rooflines = [Roofline(**roofline) for roofline in data["rooflines"]]
            return cls(data["machine"], rooflines, rows, [Skipped(**item) for item in data["skipped"]])


def machine() -> dict[str, Any]:
    """The CPU, its instruction set in use, the versions and the commit that a number was taken with."""
    facts = environment()
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", cpuinfo.read_text())) if cpuinfo.exists() else set()
    return {
        "cpu": facts["cpu"],
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "caches": cache_bytes(),
        "isa": facts["isa"],
        "qkernels": facts["qkernels"],
        "python": facts["python"],
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Of the source tree this package is run from, with a "+" if files differ; None outside of git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):  # no git program, or a repository that is not ours to read
        return None
