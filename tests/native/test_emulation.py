"""The AVX-512 and AVX-VNNI kernels on a CPU that may lack them: the same source over emulated intrinsics."""

import shutil

import core_driver
import pytest

import qkernels as qk

pytestmark = pytest.mark.skipif(
    "avx2" not in qk.isa.supported() or shutil.which("g++") is None, reason="needs AVX2 and g++ to emulate the rest"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """core_check with the emulated intrinsics (tests/native/emulation), every ISA of which counts as supported."""
    # AVX2 everywhere for the vector types in the headers.
    flags = (f"-I{core_driver.ROOT / 'tests/native/emulation'}", "-DQK_EMULATED", "-O1", "-mavx2", "-mfma", "-mf16c")
    return core_driver.build_with_core(tmp_path_factory.mktemp("emulated") / "core_check", flags=flags)


@pytest.mark.parametrize("isa", qk.isa.compiled())
def test_all_schemes_have_the_bits_of_the_native_kernels(emulated, native_checksums, isa):
    used, checksums = core_driver.run(emulated, "--isa", isa)
    assert used == isa
    assert checksums == native_checksums
