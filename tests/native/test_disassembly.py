"""The inner loops of the matrix tiles keep their accumulators in registers, whichever compiler built them.

GCC spills an array of vector accumulators as soon as a loop over it is not fully unrolled, or scheduling gets in the
way, at half the speed and with correct results: only the disassembly shows it.
"""

import platform
import shutil
from pathlib import Path

import disassembly
import pytest

import qkernels

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="needs objdump on x86-64"
)

LIBRARY = Path(qkernels.__file__).with_name("libqkernels_core.so")
# The matrix tiles and, at the end, the probes of the roofline.
# (kernel, the instruction that does its work) -> how many of them one pass of the loop holds, per ISA
TILES = {
    ("int_tile", "vpmaddwd.*ymm"): 12,
    ("nibble_step<true>", "vpmaddubsw.*ymm"): 12,
    ("float_tile", "vfmadd231ps.*ymm"): 12,
    ("int_tile", "vpmaddwd.*zmm"): 24,
    ("grouped<true, 2>", "vpmaddwd.*zmm"): 24,
    ("grouped<false, 2>", "vpmaddwd.*zmm"): 24,
    ("int_tile", "vpdpbusd.*ymm"): 12,
    ("int_tile", "vpdpbusd.*zmm"): 24,
    ("grouped<true, 8>", "vpdpbusd.*zmm"): 96,
    ("grouped<false, 8>", "vpdpbusd.*zmm"): 96,
    ("float_tile", "vfmadd231ps.*zmm"): 24,
    ("bf16_tile", "vdpbf16ps"): 24,
    ("vpdpbusd_avx512", "vpdpbusd.*zmm"): 12,
    ("vpmaddwd_avx2", "vpmaddwd.*ymm"): 12,
    ("fma_avx2", "vfmadd231ps"): 12,
}


@pytest.fixture(scope="module")
def functions() -> list[disassembly.Function]:
    return disassembly.functions(LIBRARY)


@pytest.mark.parametrize(("tile", "instruction"), TILES)
def test_accumulators_stay_in_registers(functions, tile, instruction):
    disassembly.check_registers(functions, tile, instruction, TILES[tile, instruction])
