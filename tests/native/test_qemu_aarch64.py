"""The ARM kernels, cross-compiled and run by qemu-user: what each CPU gets, that all of them compute the bits of this
machine's kernels without touching memory past their arguments (core_check.cpp), and how their inner loops look.
"""

import shutil
import subprocess

import core_driver
import disassembly
import pytest
from gpu_emulation.files import made_once

COMPILER, OBJDUMP = shutil.which("aarch64-linux-gnu-g++"), shutil.which("aarch64-linux-gnu-objdump")
QEMU = shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in (COMPILER, OBJDUMP, QEMU),
        reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian packages g++-aarch64-linux-gnu and qemu-user)",
    ),
]

# CPU -> the instruction sets it has, in ascending order.
CPUS = {
    "max": ["scalar", "neon_dotprod", "neon_i8mm"],
    "neoverse-n1": ["scalar", "neon_dotprod"],
    "cortex-a57": ["scalar"],
}

# (kernel, the instruction that does its work) -> how many of them one pass of the loop holds, per ISA
TILES = {
    "neon_dotprod": {
        ("int_tile<Sdot>", "sdot"): 24,
        ("grouped<Sdot, true, 8l>", "sdot"): 96,
        ("grouped<Sdot, false, 8l>", "sdot"): 96,
        ("dot_int8_x4", "sdot"): 16,
        ("float_tile", "fmla"): 24,
    },
    "neon_i8mm": {
        ("int_tile<Smmla>", "smmla"): 24,
        ("grouped<Smmla, true, 8l>", "smmla"): 48,
        ("grouped<Smmla, false, 8l>", "smmla"): 48,
        ("dot_int8_x4", "sdot"): 16,
        ("float_tile", "fmla"): 24,
    },
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = core_driver.shared_folder(tmp_path_factory, "aarch64")
    return made_once(
        folder / "core_check", lambda path: core_driver.build_with_core(path, COMPILER, flags=("-static",))
    )


@pytest.mark.parametrize("cpu", CPUS)
def test_detection(program, cpu):
    command = [QEMU, "-cpu", cpu, str(program)]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout
    assert listed.splitlines() == ["compiled " + " ".join(CPUS["max"]), "supported " + " ".join(CPUS[cpu])]
    for name in set(CPUS["max"]) - set(CPUS[cpu]):
        forced = subprocess.run([*command, "--isa", name], capture_output=True, text=True)
        assert forced.returncode == 2
        assert f"this CPU does not support '{name}'" in forced.stderr


@pytest.mark.parametrize("cpu", CPUS)
def test_all_schemes_have_the_bits_of_the_native_kernels(program, native_checksums, cpu):
    used, checksums = core_driver.run(QEMU, "-cpu", cpu, program)
    assert used == CPUS[cpu][-1]
    assert checksums == native_checksums


def test_forced_instruction_set(program, native_checksums):
    used, checksums = core_driver.run(QEMU, "-cpu", "max", program, "--isa", "neon_dotprod")
    assert used == "neon_dotprod"
    assert checksums == native_checksums


@pytest.mark.parametrize("isa", TILES)
def test_the_driver_that_is_named_is_the_one_that_runs(program, isa):
    command = [QEMU, "-cpu", "max", str(program.with_name("driver_check")), isa]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    drivers = {line.split(":")[0] for line in result.stdout.splitlines()}
    assert drivers == {"row_dot", "int_matmul", "float_dot", "float_matmul"}


@pytest.mark.parametrize("isa", TILES)
def test_accumulators_stay_in_registers(tmp_path, isa):
    target = tmp_path / "kernels.o"
    source = core_driver.ROOT / f"csrc/cpu/kernels/arm/{isa}.cpp"
    subprocess.run([COMPILER, *core_driver.FLAGS, "-O3", "-c", str(source), "-o", str(target)], check=True)
    functions = disassembly.functions(target, OBJDUMP)
    for (tile, instruction), count in TILES[isa].items():
        disassembly.check_registers(functions, tile, rf"^{instruction}\b", count)
