"""Faults planted into the kernels: the emulator reports each or gives another result, and so does the interpreter."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import cuda_cases as cases
import pytest
import torch
from gpu_emulation.host import KernelError
from gpu_emulation.project import compiled, emulated
from gpu_emulation.ptx.program import PtxError

if emulated.MISSING:
    pytest.skip(emulated.MISSING, allow_module_level=True)

pytestmark = pytest.mark.slow
BF16, F32 = torch.bfloat16, torch.float32
QUANTIZE = ("quantize_activation", "w8a8", (3, 1000), F32)
INT8 = ("linear", "w8a8", (66, 70, 288), BF16)
INT4 = ("linear", "w4a8-g32-asym", (40, 40, 288), F32)
FEW = ("linear", "w8a8", (5, 40, 1024), F32)
GRADIENT = ("int_grad_input", "w8a8", (40, 144, 80), torch.int8)


class Fault(NamedTuple):
    """What is planted: file, text and what stands for it; the operator that must not bear it, and how that shows."""

    file: str
    text: str
    replacement: str
    case: tuple
    shows: str


NEXT_TILE = """    if (tile + kStages - 1 < tiles) copy(tile + kStages - 1);
    commit_copies();
"""
BARRIER = "    sync_block();\n"
WAIT = "    wait_copies<kStages - 2>();\n"
LAX_WAIT = "    wait_copies<kStages - 1>();\n"
IN_SOURCE = {
    "wait too lax": Fault("tiles.cuh", WAIT, LAX_WAIT, INT8, "wrong|waited"),
    "no barrier": Fault("tiles.cuh", BARRIER, "", INT8, "wrong"),
    "tile overwritten while it is read": Fault(
        "tiles.cuh", WAIT + BARRIER + NEXT_TILE, NEXT_TILE + LAX_WAIT + BARRIER, INT8, "wrong"),
    "swapped fragment": Fault("int_matmul.cu", "b[j][1] = r[1];", "b[j][1] = r[2];", INT8, "wrong"),
    "factor not transposed": Fault(
        "int_matmul.cu", "load_matrices_transposed(", "load_matrices(", GRADIENT, "wrong"),
    "rows of the gradient's weight in order": Fault(
        "int_matmul.cu", "2 * (matrix % 2) + 4 * (i / 2) + i % 2", "8 * (matrix % 2) + i", GRADIENT, "wrong"),
    "row past the end is read": Fault(
        "tiles.cuh", "from.first + row < from.rows ?", "from.first + row <= from.rows ?", INT8, "no buffer"),
    "row past the end is written": Fault(
        "int_matmul.cu", "if (m < args.m && column", "if (m <= args.m && column", INT8, "no buffer|wrong"),
    "misaligned copy": Fault(
        "tiles.cuh", "copy_async_16(to,", "copy_async_16(to + 8,", INT8, "misaligned|bounds"),
    "banks in conflict": Fault(
        "tiles.cuh", "((chunk ^ number) * kCopyBytes)", "(chunk * kCopyBytes)", INT8, "conflicts"),
    "zero point left out": Fault("int_matmul.cu", "args.zeros == nullptr ? 8", "true ? 8", INT4, "wrong"),
    "scale of the group before": Fault("int_matmul.cu", "load_group(next)", "load_group(k)", INT4, "wrong"),
    "sum that must be positive": Fault("int_matmul.cu", "0x4b400000", "0x4b000000", INT4, "wrong"),
    "pipeline too shallow at its start": Fault(
        "tiles.cuh", "    if (tile < tiles) copy(tile);", "    if (tile < 1) copy(tile);", FEW, "wrong"),
    "range of the first warp only": Fault("rows.cu", "i < blockDim.x / 32", "i < 1", QUANTIZE, "wrong"),
    "shuffle in part of a warp": Fault(
        "rows.cu", "v = lane_max(v, 32);", "if (threadIdx.x != 77) v = lane_max(v, 32);", QUANTIZE,
        "deadlock|different"),
    "sign kept in the range": Fault(
        "rules.cuh", "__float_as_uint(v) & 0x7fffffffu", "__float_as_uint(v)", QUANTIZE, "wrong"),
    "bfloat16 truncated": Fault("rules.cuh", "(bits + 0x7fff + (bits >> 16 & 1))", "bits", INT8, "wrong"),
}  # fmt: skip


def shown(run, case: tuple) -> str:
    """How running the case shows a fault: the message, "wrong result", or "" for not at all."""
    try:
        run(case, cases.sample(*case))
    except (KernelError, PtxError) as error:
        return str(error)
    except AssertionError:
        return "wrong result"
    return ""


def on_emulator(library: emulated.Emulated):
    """Runs a case under several schedules."""

    def run(case: tuple, sample) -> None:
        library.counts()
        for seed in range(6):
            library.schedule(seed, early_copies=seed % 2 == 1)
            cases.check(*case[:2], sample, library.call(case[0], *sample.args))
        if library.counts()["conflicts"]:
            raise KernelError("bank conflicts")

    return run


@pytest.mark.parametrize("case", [QUANTIZE, INT8, INT4, FEW, GRADIENT], ids=lambda case: "-".join(map(str, case[:2])))
def test_without_a_fault_nothing_is_reported(case):
    assert shown(on_emulator(emulated.library()), case) == ""


@pytest.mark.parametrize("name", IN_SOURCE)
def test_fault_in_the_source(name, tmp_path: Path):
    fault = IN_SOURCE[name]
    folder = tmp_path / "cuda"
    shutil.copytree(emulated.ROOT / "csrc/cuda", folder)
    source = folder / fault.file
    text = source.read_text()
    assert fault.text in text, "nothing is planted"
    source.write_text(text.replace(fault.text, fault.replacement))
    stem = "rows" if fault.case[0] == "quantize_activation" else "int_matmul"
    changed = emulated.compile_source(folder / f"{stem}.cu", tmp_path / "changed.o", "-O1", before=tmp_path)
    library = emulated.link(f"fault{list(IN_SOURCE).index(name)}", **{stem: changed})
    assert re.search(fault.shows, shown(on_emulator(library), fault.case))


# Into the PTX that nvcc makes: pattern, replacement, how many occurrences (0: all), how it must show.
IN_PTX = {
    "wait too lax": (INT8, r"cp\.async\.wait_group 2;", "cp.async.wait_group 3;", 0, "not delivered|waited"),
    "copies not committed": (INT8, r"cp\.async\.commit_group;", "", 0, "not delivered|waited"),
    "no barrier": (INT8, r"bar\.sync\s+0;", "", 0, "race|not delivered"),
    "transposed ldmatrix": (INT8, r"m8n8\.x4\.shared", "m8n8.x4.trans.shared", 1, "wrong"),
    "factor not transposed": (GRADIENT, r"m8n8\.x4\.trans\.shared", "m8n8.x4.shared", 1, "wrong"),
    "bytes in another order": (GRADIENT, r"\b30001\b", "25632", 0, "wrong"),
    "swapped factor": (INT8, r"(mma[^;]*\}, \{)(%r\d+), (%r\d+)(\}, \{%r\d+, %r\d+, %r\d+, %r\d+\};)", r"\1\3, \2\4", 1,
                       "wrong"),
    "mask of nibbles": (INT4, r"252645135", "117901063", 0, "wrong"),
    "high nibbles lost": (INT4, r"shr\.u32 (\s*%r\d+), (%r\d+), 4;", r"mov.u32 \1, \2;", 0, "wrong|cannot"),
    "sum that must be positive": (INT4, r"1262485504", "1258291200", 0, "wrong"),
    "scales added": (INT4, r"mul\.rn\.f32", "add.rn.f32", 0, "wrong"),
    "range by sign": (QUANTIZE, r"and\.b32 (\s*%r\d+), (%r\d+), 2147483647;", r"mov.b32 \1, \2;", 0, "wrong"),
    "smallest for the largest": (QUANTIZE, r"max\.u32", "min.u32", 0, "wrong"),
}  # fmt: skip


def main_kernel(case: tuple) -> str:
    """The kernel that an operator launches last."""
    return emulated.library().record(case[0], *cases.sample(*case).args)[-1].kernel


@pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
@pytest.mark.parametrize("name", IN_PTX)
def test_fault_in_the_compiled_code(name):
    case, pattern, replacement, count, shows = IN_PTX[name]
    kernel = main_kernel(case)
    text, planted = re.subn(pattern, replacement, compiled.texts()[kernel], count=count)
    assert planted, "nothing is planted"

    def run(case: tuple, sample) -> None:
        cases.check(*case[:2], sample, compiled.run(case[0], sample.args, {kernel: text}))

    assert re.search(shows, shown(run, case))
