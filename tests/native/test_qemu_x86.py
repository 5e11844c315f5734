"""The installed core on older CPUs (qemu-user): which instruction set it chooses, and that its results are the same."""

import shutil
import subprocess

import core_driver
import pytest

import qkernels as qk

QEMU = shutil.which("qemu-x86_64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("avx2" not in qk.isa.compiled(), reason="the core was not built for x86-64"),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian package qemu-user)"),
]


@pytest.mark.parametrize(("cpu", "isa"), [("Haswell", "avx2"), ("Nehalem", "scalar")])
def test_all_schemes_have_the_bits_of_the_native_kernels(core_check, native_checksums, cpu, isa):
    used, checksums = core_driver.run(QEMU, "-cpu", cpu, core_check)
    assert used == isa
    assert checksums == native_checksums


@pytest.mark.parametrize("lacking", ["avx2", "fma", "f16c"])
def test_every_feature_of_avx2_kernels_is_asked_for(core_check, lacking):
    command = [QEMU, "-cpu", f"Haswell,-{lacking}", str(core_check)]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout
    assert "supported scalar\n" in listed
    forced = subprocess.run([*command, "--isa", "avx2"], capture_output=True, text=True)
    assert forced.returncode == 2
    assert "this CPU does not support 'avx2'" in forced.stderr
