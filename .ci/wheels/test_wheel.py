"""Run `smoke.py` on a wheel under several torches: `test_wheel.py WHEEL torch==2.10.0 torch`.

Each torch gets a fresh virtual environment below `--environments` (a torch with CUDA takes 7 GB there; an environment
that exists already is used again, with the wheel installed anew). The programs on PATH are those of the environment
alone, so that nothing can compile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py").resolve()


def environment(folder: Path, requirement: str) -> Path:
    """The Python of a virtual environment with this torch, made if need be."""
    place = folder / requirement.replace("=", "").replace("<", "").replace(">", "")
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", requirement, "numpy"], check=True)
        (place / "complete").touch()
    return python


def smoke(python: Path, wheel: Path) -> int:
    """Install the wheel and run the smoke test; the exit status of the latter."""
    ask = "import torch; print(torch.__version__.split('+')[0])"
    version = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    subprocess.run([*pip, wheel, f"torch=={version}"], check=True)  # its dependencies, and no other torch
    bare = {"PATH": str(python.parent), "HOME": str(python.parent.parent)}
    return subprocess.run([python, SMOKE, "--bare"], env=bare, cwd=python.parent.parent).returncode


def main() -> None:
    """Test the wheel under each torch named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("torch", nargs="+", help="requirement, such as torch==2.10.0")
    parser.add_argument("--environments", type=Path, default=Path("build/environments"))
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    failed = False
    for requirement in arguments.torch:
        python = environment(arguments.environments.resolve(), requirement)
        failed |= smoke(python, wheel) != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
