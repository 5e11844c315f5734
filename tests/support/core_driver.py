"""Builds and runs the programs of tests/native, which compute cases of every scheme with the core alone."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qkernels

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests/native/core_check.cpp"
DRIVERS = ROOT / "tests/native/driver_check.cpp"
LIBRARY = Path(qkernels.__file__).with_name("libqkernels_core.so")
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{ROOT / 'csrc'}"]


def _call(*command: str | Path) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A temporary folder of all workers of this run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def build(target: Path, compiler: str = "g++") -> Path:
    """The driver with the core that is installed in the package."""
    _call(compiler, *FLAGS, SOURCE, LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}", "-o", target)
    return target


def build_with_core(target: Path, compiler: str = "g++", flags: tuple[str, ...] = ()) -> Path:
    """The driver with a core of its own, compiled with `flags`; beside it driver_check, which looks into the core."""
    core = [*ROOT.glob("csrc/common/*.cpp"), *ROOT.glob("csrc/cpu/**/*.cpp")]
    objects = {source: target.with_name(f"{source.stem}.o") for source in (SOURCE, DRIVERS, *core)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda s: _call(compiler, *FLAGS, *flags, "-c", s, "-o", objects[s]), objects))
    for source, program in ((SOURCE, target), (DRIVERS, target.with_name("driver_check"))):
        _call(compiler, *flags, objects[source], *(objects[s] for s in core), "-o", program)
    return target


def run(*command: str | Path) -> tuple[str, dict[str, str]]:
    """The ISA that was used, and the checksum of each case whose bits do not depend on it."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    failures = [line for line in result.stdout.splitlines() if "FAILED" in line]
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stderr}" + "\n".join(failures)
    isa = re.match(r"isa (\S+)\n", result.stdout)
    assert isa, result.stdout
    return isa[1], dict(re.findall(r"^(.+) = ([0-9a-f]{16})$", result.stdout, re.MULTILINE))
