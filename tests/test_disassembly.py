"""The inner loops of the matrix tiles keep their accumulators in registers, whichever compiler built them.

GCC spills an array of vector accumulators as soon as a loop over it is not fully unrolled, or scheduling gets in the
way, at half the speed and with correct results: only the disassembly shows it.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import qkernels

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="needs objdump on x86-64"
)

LIBRARY = Path(qkernels.__file__).with_name("libqkernels_core.so")
# The matrix tiles and, at the end, the probes of the roofline.
# (kernel, the instruction that does its work) -> how many of them one pass of the loop holds, per ISA
TILES = {
    ("int_tile", "vpmaddwd"): 12,
    ("float_tile", "vfmadd231ps.*ymm"): 12,
    ("int_tile", "vpdpbusd"): 24,
    ("grouped<true>", "vpdpbusd"): 96,
    ("grouped<false>", "vpdpbusd"): 96,
    ("float_tile", "vfmadd231ps.*zmm"): 24,
    ("vpdpbusd_avx512", "vpdpbusd.*zmm"): 12,
    ("vpmaddwd_avx2", "vpmaddwd.*ymm"): 12,
    ("fma_avx2", "vfmadd231ps"): 12,
}


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, list[tuple[int, str]]]]:
    """(symbol, [(address, instruction)]) of the library."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = []
    for block in text.split("\n\n"):
        if header := re.match(r"\s*[0-9a-f]+ <(.*)>:\n", block):
            lines = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", block, re.MULTILINE)
            found.append((header[1], [(int(address, 16), code) for address, code in lines]))
    return found


def loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the innermost loops: from the target of a backward jump to the jump."""
    spans = []
    for address, code in instructions:
        jump = re.match(r"j\w+\s+([0-9a-f]+)", code)
        if jump and instructions[0][0] <= int(jump[1], 16) < address:
            spans.append((int(jump[1], 16), address))
    innermost = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[code for address, code in instructions if start <= address <= end] for start, end in innermost]


@pytest.mark.parametrize(("tile", "instruction"), TILES)
def test_accumulators_stay_in_registers(functions, tile, instruction):
    bodies = [
        body
        for symbol, instructions in functions
        if f"::{tile}(" in symbol
        for body in loops(instructions)
        if any(re.search(instruction, code) for code in body)
    ]
    assert bodies, f"no loop of {tile} holds {instruction}: was the library stripped?"
    for body in bodies:
        work = sum(bool(re.search(instruction, code)) for code in body)
        spills = [code for code in body if re.search(r"\(%r[sb]p\)", code) and re.search(r"%[xyz]mm", code)]
        assert work % TILES[tile, instruction] == 0, "\n".join(body)
        assert not spills, "\n".join(spills)
