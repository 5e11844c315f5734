"""The AVX-512 and AVX-VNNI kernels on a CPU that may lack them: the same source over emulated intrinsics."""

import re
import shutil
import subprocess

import core_driver
import pytest
from gpu_emulation.files import made_once

import qkernels as qk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "avx2" not in qk.isa.supported() or shutil.which("g++") is None, reason="needs AVX2 and g++ to emulate the rest"
    ),
]

# The drivers that an instruction set uses.
COMMON = {"row_dot", "int_matmul", "float_dot", "float_matmul"}
DRIVERS = {name: COMMON | {"group_dot"} for name in ("avx512", "avx512vnni", "avx512bf16")}
DRIVERS["amx"] = COMMON | {"group_dot", "tile_dot", "tile_groups"}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """core_check with the emulated intrinsics (tests/native/emulation), every ISA of which counts as supported."""
    # AVX2 everywhere for the vector types in the headers.
    flags = (f"-I{core_driver.ROOT / 'tests/native/emulation'}", "-DQK_EMULATED", "-O1", "-mavx2", "-mfma", "-mf16c")
    folder = core_driver.shared_folder(tmp_path_factory, "emulated_core")
    return made_once(folder / "core_check", lambda path: core_driver.build_with_core(path, flags=flags))


@pytest.mark.parametrize("isa", qk.isa.compiled())
def test_all_schemes_have_the_bits_of_the_native_kernels(emulated, native_checksums, isa):
    used, checksums = core_driver.run(emulated, "--isa", isa)
    assert used == isa
    assert checksums == native_checksums


@pytest.mark.parametrize("isa", qk.isa.compiled())
def test_the_driver_that_is_named_is_the_one_that_runs(emulated, isa):
    result = subprocess.run([emulated.with_name("driver_check"), isa], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(re.findall(r"^(\w+):", result.stdout, re.MULTILINE)) == DRIVERS.get(isa, COMMON)
