"""The machine code of every kernel, for every GPU that wheels are built for."""

import re

import pytest
from gpu_emulation.project import sass

if sass.MISSING:
    pytest.skip(sass.MISSING, allow_module_level=True)

from gpu_emulation.project import compiled, emulated

pytestmark = pytest.mark.slow
TABLE = emulated.ROOT / "docs" / "gpu.md"
# Another release of the compiler may need some more registers than the one the table is of.
SPARE_REGISTERS = 8
FORBIDDEN = re.compile(r"\b(div\.full|div\.approx|rcp\.approx|fma\.rn\.f32\w*|[\w.]+\.ftz)\b")


def documented() -> dict[tuple[str, str], int]:
    """Registers by kernel and target, in the table of docs/gpu.md."""
    text = TABLE.read_text().split("<!-- cuda code -->")[1].split("<!-- end of cuda code -->")[0]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    return {
        (row[0], target): int(cell.split()[0]) for row in rows for target, cell in zip(header[1:], row[1:], strict=True)
    }


@pytest.mark.parametrize("target", sass.TARGETS)
def test_code(target):
    registers, seen = documented(), set()
    for name, code in sass.assembled(target).items():
        assert code.spilled == 0, name
        kernel = sass.product(name)
        if kernel is None:
            continue
        seen.add(kernel.name)
        assert code.products == kernel.mma, kernel.name
        assert code.registers <= registers[kernel.name, target] + SPARE_REGISTERS, kernel.name
        if kernel.aligned:
            assert code.copies == kernel.copies, kernel.name
        wanted = "IMMA" if kernel.integers else "HMMA"
        assert all(opcode.startswith(wanted) for opcode in code.loop if "MMA" in opcode), kernel.name
        assert sass.occupancy(kernel, code.registers, target) > 0, kernel.name
    assert seen == {kernel for kernel, of in registers if of == target}


def test_compiler_found_no_undefined_behaviour():
    """nvcc compiles a path that it takes for undefined into a trap."""
    for name, text in compiled.texts().items():
        assert "trap;" not in text, name


def test_kernels_of_integers_round_every_operation():
    for name, text in compiled.texts().items():
        if "float_matmul" not in name and "float_row" not in name:
            assert not FORBIDDEN.search(text), name
