"""Packaging: what libraries link to, what the source archive holds, what is said of a compiled part that is missing."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels.kernels import cuda_library, extensions

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(qkernels.__file__).resolve().parent

if not (ROOT / "setup.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT / ".ci" / "wheels"))
import check_wheel  # noqa: E402
import elf  # noqa: E402


def built_libraries() -> dict[str, Path]:
    return check_wheel.libraries(PACKAGE)


class TestLibraries:
    def test_those_of_this_build_are_fine(self):
        found = built_libraries()
        assert set(check_wheel.LINKS) - {"_C_cuda"} <= set(found)
        assert [problem for name, path in found.items() for problem in check_wheel.check_library(name, path)] == []

    def test_links_to_what_they_need(self):
        found = built_libraries()
        assert {"libqkernels_core.so", "libtorch_cpu.so"} <= elf.needed(found["_C"])
        assert not any("torch" in name for name in elf.needed(found["_native"]))
        assert "aoti_torch_get_dtype" in elf.undefined_symbols(found["_C"])
        assert elf.run_paths(found["_C"]) == {"$ORIGIN"}

    def test_what_ties_a_library_to_one_torch_or_machine_is_found(self, tmp_path):
        source, library = tmp_path / "bad.cpp", tmp_path / "_native.so"
        source.write_text(
            "namespace at { struct Tensor; void add(const Tensor&); }\n"
            "void probe(const at::Tensor& t) { at::add(t); }\n"
        )
        flags = ["-g", "-shared", "-fPIC", "-Wl,-rpath,/opt/libraries", "-Wl,--no-as-needed", "-lgomp"]
        subprocess.run(["g++", str(source), "-o", str(library), *flags], check=True)
        problems = "\n".join(check_wheel.check_library("_native", library))
        for word in ("links to libgomp.so.1", "looks for libraries in /opt/libraries", "_ZN2at3add", "is not stripped"):
            assert word in problems
        assert len(problems.splitlines()) == 4


class TestGpuCode:
    @staticmethod
    def entry(kind: int, arch: int, compressed: int) -> bytes:
        payload = bytes(24)
        return struct.pack("<HHIQIIHHI", kind, 257, 64, len(payload), compressed, 0, 8, 1, arch) + bytes(32) + payload

    def test_entries_are_read(self):
        entries = self.entry(2, 80, 20), self.entry(2, 120, 0), self.entry(1, 120, 20)
        header = struct.pack("<IHHQ", elf.FATBIN_MAGIC, 1, 16, sum(map(len, entries)))
        data = header + b"".join(entries) + bytes(8) + struct.pack("<IHHQ", elf.FATBIN_MAGIC, 1, 16, 0)
        assert [(c.ptx, c.arch, c.compressed) for c in elf._fat_binaries(data)] == [
            (False, 80, True),
            (False, 120, False),
            (True, 120, True),
        ]

    def test_unknown_layout_is_refused(self):
        with pytest.raises(ValueError, match="no fat binary at byte 0"):
            elf._fat_binaries(b"x" * 32)

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
    def test_of_a_compiled_library(self, tmp_path):
        source, library = tmp_path / "k.cu", tmp_path / "k.so"
        source.write_text("__global__ void k(int* p) { *p = 1; }")
        flags = ["-shared", "-Xcompiler=-fPIC", "--compress-mode=size", "-gencode=arch=compute_80,code=sm_80"]
        flags += ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]
        subprocess.run(["nvcc", *flags, str(source), "-o", str(library)], check=True)
        assert check_wheel.check_gpu_code(library, [80, 90]) == []
        (problem,) = check_wheel.check_gpu_code(library, [80, 90, 120])
        assert "machine code for [80, 90] instead of [80, 90, 120]" in problem


class TestWheel:
    def pack(self, path: Path, *extra: str, leave_out: str = "-") -> Path:
        with zipfile.ZipFile(path, "w") as wheel:
            if not "py.typed".startswith(leave_out):
                wheel.writestr("qkernels/py.typed", "")
            for library in built_libraries().values():
                if not library.name.startswith((leave_out, "_C_cuda")):
                    wheel.write(library, f"qkernels/{library.name}")
            wheel.writestr("qkernels-0.1.0.dist-info/METADATA", "Name: qkernels\nRequires-Dist: torch>=2.10\n")
            wheel.writestr("qkernels-0.1.0.dist-info/licenses/LICENSE", "")
            for name in extra:
                wheel.writestr(name, "")
        return path

    def test_a_good_one_passes(self, tmp_path):
        path = self.pack(tmp_path / "qkernels-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl")
        assert check_wheel.check(path, "manylinux_2_34") == []

    def test_each_fault_is_named(self, tmp_path):
        name = "qkernels-0.1.0-cp311-cp311-manylinux_2_36_x86_64.whl"
        path = self.pack(tmp_path / name, "tests/a.py", "qkernels/a.cu", leave_out="_native")
        problems = "\n".join(check_wheel.check(path, "manylinux_2_34"))
        for word in (
            "manylinux_2_34 or older",
            "holds tests/a.py",
            "holds qkernels/a.cu",
            "instead of ['_C', '_native'",
        ):
            assert word in problems
        assert len(problems.splitlines()) == 4

    def test_a_wheel_without_its_types_is_refused(self, tmp_path):
        path = self.pack(tmp_path / "qkernels-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl", leave_out="py.typed")
        (problem,) = check_wheel.check(path)
        assert "lacks qkernels/py.typed" in problem

    def test_cuda_kernels_are_expected_by_the_version(self, tmp_path):
        path = self.pack(tmp_path / "qkernels-0.1.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl")
        (problem,) = check_wheel.check(path)
        assert "_C_cuda" in problem


def test_a_build_ships_its_types():
    """The list of files that setuptools puts into a wheel, by the settings of this tree."""
    code = (
        "from setuptools import Distribution; d = Distribution(); d.parse_config_files(); d.script_name = 'setup.py';"
        "b = d.get_command_obj('build_py'); b.ensure_finalized(); print([entry[3] for entry in b.data_files])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'py.typed'" in done.stdout


def test_source_archive_holds_what_git_tracks(tmp_path):
    """Built in a copy without .git, as by a packager, for CUDA if there is an nvcc, whose toolkit the version names."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    copy = tmp_path / "copy"
    for name in tracked.stdout.splitlines():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    env = {**os.environ, "QKERNELS_CUDA": "1" if shutil.which("nvcc") else "0"}
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=copy, env=env, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert ("+cu" in archive.name) == (env["QKERNELS_CUDA"] == "1")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    left_out = {name for name in tracked.stdout.splitlines() if name not in held}
    assert {name for name in left_out if not name.startswith(".")} == set()
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_targets_of_make():
    command = ["make", "-n", "wheel-cuda", "CUDA_ARCHS=80;90a;120"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'TORCH_CUDA_ARCH_LIST="8.0;9.0a;12.0+PTX"' in done.stdout


@pytest.mark.parametrize(
    ("targets", "capability", "expected"),
    [
        ("8.0", 80, True), ("8.0", 89, True), ("8.6", 80, False), ("8.0", 90, False), ("8.0", 75, False),
        ("8.0+PTX", 120, True), ("9.0a", 90, True), ("9.0a+PTX", 100, False), ("8.0;9.0;12.0+PTX", 103, False),
        ("8.0;10.0;12.0+PTX", 103, True), ("12.0+PTX", 130, True), ("", 80, False),
    ],
)  # fmt: skip
def test_which_devices_a_build_covers(targets, capability, expected):
    assert cuda_library.Library(bool(targets), "", None, targets).covers(capability) is expected


def break_copy(folder: Path, **files: str | None) -> None:
    """Copy the package into a folder; there these modules have other contents, or are gone."""
    shutil.copytree(PACKAGE, folder / "qkernels", ignore=shutil.ignore_patterns("__pycache__", "_C_cuda*"))
    for name, contents in files.items():
        for path in (folder / "qkernels").glob(f"{name}.*"):
            path.unlink()
        if contents is not None:
            (folder / "qkernels" / f"{name}{'.py' if contents else '.abi3.so'}").write_text(contents)


# An editable installation would find the files that the copy lacks.
NO_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"


def run_in(folder: Path, code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", NO_EDITABLE + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


# As in `qkernels info --json` beside a torch that is built with CUDA, and then a layer on the CPU.
INFO = """
import json, torch
torch.version.cuda, torch.version.hip = "13.0", None
import qkernels as qk
from qkernels.cli.info import collect
layer = qk.QuantLinear.from_float(torch.nn.Linear(40, 8), "w8a8")
assert torch.equal(layer(torch.ones(2, 40))[0], layer(torch.ones(1, 40))[0])
print(json.dumps(collect()["gpu"]["cuda"]))
"""
OLD_DRIVER = """
targets, runtime_version = "8.0;12.0+PTX", 13000
def driver_version(): return 12040
"""


@pytest.mark.parametrize(
    ("library", "reason", "remedy"),
    [
        (None, "built without them", "QKERNELS_CUDA=1 pip install --no-build-isolation ."),
        ("", "they do not load: ", "QKERNELS_CUDA=1 pip install --no-build-isolation ."),
        (OLD_DRIVER, "built with CUDA 13.0, and the driver supports only 12.4", "update the NVIDIA driver"),
    ],
    ids=["absent", "broken", "old driver"],
)
def test_a_missing_cuda_library_says_why_and_leaves_the_cpu_alone(tmp_path, library, reason, remedy):
    break_copy(tmp_path, _C_cuda=library)
    done = run_in(tmp_path, INFO)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert not facts["loaded"]
    assert reason in facts["reason"] and remedy in facts["next_step"]


@pytest.mark.parametrize("name", ["_C", "_native"])
@pytest.mark.parametrize(
    ("contents", "word"), [(None, "is not built for this Python"), ("", "does not load with torch")]
)
def test_a_missing_required_library_says_what_to_do(tmp_path, name, contents, word):
    break_copy(tmp_path, **{name: contents})
    done = run_in(tmp_path, "import qkernels")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"ImportError: qkernels.{name} {word}"), last
    assert "pip install --no-build-isolation ." in last


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    message = extensions._explain("_C", ImportError("undefined symbol"))
    assert message == "qkernels needs torch >= 2.10, got 2.9.1+cu128: pip install 'torch>=2.10'"
