"""Build the core with sanitizers and run its checks (tests/native) on every instruction set; `make sanitize`.

    python tools/sanitize.py [BUILD ...]     all of BUILDS, or those named

Native builds run what this CPU has; emulated ones (tests/native/emulation) every instruction set of x86-64. The thread
sanitizer sees calls that are cut into as many pieces as there can be. Ends with 1 if a build or a check fails.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/support"))

import core_driver  # noqa: E402

# The stand-ins redefine what the compiler's headers define.
EMULATED = (f"-I{ROOT / 'tests/native/emulation'}", "-DQK_EMULATED", "-mavx2", "-mfma", "-mf16c")
# Stack traces that name lines, and an end at the first report.
REPORTS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
MEMORY = ("-fsanitize=address,undefined", *REPORTS)
THREADS = ("-fsanitize=thread", "-DQK_MIN_WORK_PER_THREAD=1", *REPORTS)
# name -> compiler, flags, arguments of core_check
BUILDS = {
    "memory": ("g++", MEMORY, ()),
    "memory, emulated": ("g++", (*MEMORY, *EMULATED), ()),
    "threads": ("g++", THREADS, ("--threads", "3")),
    "threads, emulated": ("g++", (*THREADS, *EMULATED), ("--threads", "3")),
    "clang": ("clang++", ("-O2", "-Wall", "-Wextra"), ()),
}


def check(name: str, folder: Path) -> bool:
    """Build `name` in `folder` and run it; whether all is well. What happens is printed."""
    compiler, flags, arguments = BUILDS[name]
    if shutil.which(compiler) is None:
        print(f"{name}: skipped, there is no {compiler}", flush=True)
        return True
    start = time.perf_counter()
    program = core_driver.build_with_core(folder / "core_check", compiler, flags)
    print(f"{name}: built in {time.perf_counter() - start:.0f} s", flush=True)
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout
    supported = listed.splitlines()[1].split()[1:]
    return all([_run(name, program, isa, arguments) for isa in supported])


def _run(name: str, program: Path, isa: str, arguments: tuple[str, ...]) -> bool:
    start = time.perf_counter()
    commands = [[program, "--isa", isa, *arguments], [program.with_name("driver_check"), isa]]
    results = [subprocess.run(command, capture_output=True, text=True) for command in commands]
    failed = [result for result in results if result.returncode != 0 or result.stderr]
    print(f"{name}: {isa} {'FAILED' if failed else 'clean'} in {time.perf_counter() - start:.0f} s", flush=True)
    for result in failed:
        wrong = [line for line in result.stdout.splitlines() if "FAILED" in line]
        print("\n".join([*wrong, result.stderr[-8000:]]))
    return not failed


def main() -> int:
    names = sys.argv[1:] or list(BUILDS)
    if unknown := set(names) - set(BUILDS):
        raise SystemExit(f"unknown build {', '.join(sorted(unknown))}; there are {', '.join(BUILDS)}")
    results = []
    for name in names:
        with TemporaryDirectory() as folder:
            results.append(check(name, Path(folder)))
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
