"""Check that a wheel holds what it should and nothing that ties it to one machine or torch: `check_wheel.py WHEEL...`.

Prints the size of each library and the GPUs of each device code, and exits with status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

import elf

# What any manylinux system has; see the policy of auditwheel.
SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
CORE = "libqkernels_core.so"
# Which libraries may be linked to besides the system's. torch's are never bundled: the program has loaded them before.
LINKS = {
    "libqkernels_core": set(),
    "_native": {CORE},
    "_C": {CORE, "libtorch_cpu.so", "libtorch.so", "libc10.so"},
    "_C_cuda": {CORE, "libtorch_cpu.so", "libtorch.so", "libc10.so", "libtorch_cuda.so", "libc10_cuda.so"},
}
# Nested names in C++ namespaces that have no stable ABI. Their presence would tie the binary to one version of torch.
UNSTABLE = re.compile(r"N[rVKRO]*(?:2at|3c10|5torch|5caffe2)\d")


def libraries(folder: Path) -> dict[str, Path]:
    """Name without suffixes -> path of every shared library under a folder."""
    return {path.name.split(".")[0]: path for path in sorted(folder.rglob("*.so*"))}


def check_library(name: str, path: Path) -> list[str]:
    """What is wrong with one library, in sentences."""
    problems = []
    foreign = elf.needed(path) - SYSTEM - LINKS[name]
    if foreign:
        problems.append(f"links to {', '.join(sorted(foreign))}")
    if elf.run_paths(path) - {"$ORIGIN"}:
        problems.append(f"looks for libraries in {', '.join(sorted(elf.run_paths(path)))}")
    unstable = [symbol for symbol in elf.undefined_symbols(path) if UNSTABLE.search(symbol)]
    if unstable:
        problems.append(f"needs {len(unstable)} symbols without a stable ABI, such as {unstable[0]}")
    if elf.has_debug_info(path):
        problems.append("is not stripped")
    return [f"{path.name} {problem}" for problem in problems]


def check_gpu_code(path: Path, archs: list[int] | None) -> list[str]:
    """What is wrong with the device code; `archs`: what it has to be for, ascending, or None: anything."""
    code = elf.gpu_code(path)
    machine = sorted({piece.arch for piece in code if not piece.ptx})
    ptx = sorted({piece.arch for piece in code if piece.ptx})
    print(f"  {path.name}: machine code for {machine}, PTX for {ptx}")
    problems = []
    if archs is not None and machine != archs:
        problems.append(f"has machine code for {machine} instead of {archs}")
    if not machine or ptx != machine[-1:]:
        problems.append(f"has PTX for {ptx}; later GPUs need that of the newest target alone")
    if not all(piece.compressed for piece in code):
        problems.append("has device code that is not compressed")
    return [f"{path.name} {problem}" for problem in problems]


def check_metadata(wheel: zipfile.ZipFile) -> list[str]:
    """Licence, py.typed and the oldest torch have to be in the wheel, and no sources or tests."""
    names = wheel.namelist()
    problems = [f"holds {name}" for name in names if not name.startswith(("qkernels/", "qkernels-"))]
    problems += [f"holds {name}" for name in names if name.endswith((".cpp", ".cu", ".h", ".cuh", ".inc"))]
    metadata = Parser().parsestr(wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    if "torch>=2.10" not in (metadata.get_all("Requires-Dist") or []):
        problems.append("does not require torch>=2.10")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        problems.append("lacks the licence")
    if "qkernels/py.typed" not in names:
        problems.append("lacks qkernels/py.typed, by which type checkers know that it has types")
    return problems


def check(path: Path, platform: str | None = None, archs: list[int] | None = None) -> list[str]:
    """Everything that is wrong with a wheel; prints what it holds.

    Args:
        path: the file.
        platform: the newest platform allowed, such as "manylinux_2_34"; None: any.
        archs: GPU architectures such as [80, 90] that a wheel with CUDA kernels must have; None: any.
    """
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    problems = []
    tag = re.search(r"manylinux_2_(\d+)_\w+\.whl$", path.name)
    if platform is not None and (tag is None or int(tag[1]) > int(platform.rsplit("_", 1)[1])):
        problems.append(f"is not a wheel for {platform} or older")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
        problems += check_metadata(wheel)
        wheel.extractall(folder)
        found = libraries(Path(folder))
        cuda = "+cu" in path.name
        expected = set(LINKS) if cuda else set(LINKS) - {"_C_cuda"}
        if set(found) != expected:
            problems.append(f"holds the libraries {sorted(found)} instead of {sorted(expected)}")
        for name, library in found.items():
            print(f"  {library.name}: {library.stat().st_size / 1e6:.2f} MB")
            problems += check_library(name, library) if name in LINKS else []
        if "_C_cuda" in found:
            problems += check_gpu_code(found["_C_cuda"], archs)
    return problems


def main() -> None:
    """Check the wheels named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--platform", help="newest platform tag allowed, such as manylinux_2_34")
    parser.add_argument("--archs", help='GPU architectures expected, such as "80;90"')
    arguments = parser.parse_args()
    archs = sorted(int(arch.rstrip("a")) for arch in arguments.archs.split(";")) if arguments.archs else None
    failed = False
    for wheel in arguments.wheels:
        for problem in check(wheel, arguments.platform, archs):
            print(f"error: {wheel.name} {problem}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
