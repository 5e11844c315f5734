"""Faults planted into compiled code: executing it must report each, or give another result."""

import re
from functools import cache
from typing import NamedTuple

import pytest
import reference_ops
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

from gpu_emulation.project.aot import TARGETS, compile_launch
from gpu_emulation.project.executor import execute_all, execute_ptx
from gpu_emulation.ptx.program import PtxError
from gpu_emulation.triton_code import Compiled
from helpers import same_bits
from launch_checks import plan

from qkernels import quantize_weight
from qkernels.kernels.triton.launch import Launch

TARGET = "sm_80"
INT4 = "w4a8-g32-asym"


class Case(NamedTuple):
    """A launch whose inputs are ready, its code, its outputs, and what they must hold."""

    launch: Launch
    compiled: Compiled
    outputs: tuple
    expected: tuple

    @property
    def ptx(self) -> str:
        return self.compiled.asm["ptx"]


@cache
def case(name: str) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "quantize":
        x = random(5, 300)
        x[:, 7] = -9.0  # the largest magnitude
        outputs, (launch,) = plan("quantize_activation", (x, "w8a8"), TARGETS[TARGET])
        return Case(launch, compile_launch(launch, TARGET), outputs, reference_ops.quantize_activation(x, "w8a8"))
    if name == "random":
        args = (random(5, 300), random(300), torch.tensor(7), 1)
        outputs, (launch,) = plan("quantize_rows_stochastic", args, TARGETS[TARGET])
        return Case(launch, compile_launch(launch, TARGET), outputs, reference_ops.quantize_rows_stochastic(*args))
    args = (random(40, 272), *quantize_weight(random(72, 272), name), random(72), name, torch.bfloat16)
    outputs, (quantize, launch) = plan("linear", args, TARGETS[TARGET])
    execute_all([quantize], TARGET)
    return Case(launch, compile_launch(launch, TARGET), outputs, (reference_ops.linear(*args),))


def caught(name: str, ptx: str) -> str:
    """How the fault shows: the interpreter's message, "wrong result", or "" for not at all."""
    planted = case(name)
    assert ptx != planted.ptx, "nothing was planted"
    for output in planted.outputs:
        output.fill_(1)
    try:
        execute_ptx(planted.launch, planted.compiled, ptx)
    except PtxError as error:
        return str(error)
    equal = all(same_bits(*pair).all() for pair in zip(planted.outputs, planted.expected, strict=True))
    return "" if equal else "wrong result"


@pytest.mark.parametrize("name", ["quantize", "random", "w8a8", "w4a8-g32-asym"])
def test_without_a_fault_nothing_is_reported(name):
    assert caught(name, case(name).ptx + "\n// the same\n") == ""


# What is planted: kernel, pattern, replacement, how many occurrences (0: all), and how it must show.
FAULTS = {
    "load without its mask": (
        "w8a8", r"selp\.b32 (\s*%r\d+), (%r\d+|16), 0, %p\d+;", r"mov.b32 \1, 16;", 0, "out of bounds"
    ),
    "store without its mask": ("w8a8", r"@%p\d+ (st\.global)", r"\1", 0, "out of bounds"),
    "row bound off by one": ("w8a8", r"setp\.lt\.s32", "setp.le.s32", 0, "bounds|another|wrong"),
    "one wait too lax": ("w8a8", r"wait_group (\s*)4", r"wait_group \g<1>6", 1, "not delivered"),
    "copies not committed": ("w8a8", r"cp\.async\.commit_group;", "", 0, "not delivered"),
    "swapped fragment": (
        "w8a8",
        r"(mma.*?\}, )\{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}",
        r"\1{ \3, \2, \4, \5 }",
        1,
        "wrong result",
    ),
    "swapped factor": ("w8a8", r"(mma.*?\}, \{.*?\}, )\{ (%r\d+), (%r\d+) \}", r"\1{ \3, \2 }", 1, "wrong result"),
    "transposed ldmatrix": ("w8a8", r"m8n8\.x4\.shared", "m8n8.x4.trans.shared", 1, "wrong result"),
    "sum not carried": ("w8a8", r"(mma[^;]*\{ %r\d+, %r\d+ \}, \{ )%r\d+", r"\g<1>0", 1, "wrong result"),
    "wrong scale": ("w8a8", r"mul\.rn\.f32 (\s*%r\d+), (%r\d+), %r\d+;", r"mul.rn.f32 \1, \2, \2;", 1, "wrong result"),
    "bias left out": ("w8a8", r"add\.rn\.f32 (\s*%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;", 1, "wrong result"),
    "bfloat16 truncated": ("w8a8", r", 32767;", ", 0;", 0, "wrong result"),
    "shared address off": ("w8a8", r"(ldmatrix[^\[]*\[%r\d+\+?)(\d*)\]", r"\g<1>+16]", 1, "wrong|cannot|written"),
    "nibble cut": (INT4, r"and\.b16 (\s*%rs\d+), (%rs\d+), 15;", r"and.b16 \1, \2, 7;", 0, "wrong result"),
    "high nibble lost": (INT4, r"shr\.u16 (\s*%rs\d+), (%rs\d+), 4;", r"shr.u16 \1, \2, 3;", 1, "wrong result"),
    "zero point left out": (INT4, r"sub\.s16 (\s*%rs\d+), (%rs\d+), %rs\d+;", r"mov.b16 \1, \2;", 0, "wrong"),
    "rounding of the positive only": ("quantize", r"0f4B400000", "0f4B000000", 0, "wrong result"),
    "sign kept in the range": (
        "quantize", r"and\.b32 (\s*%r\d+), (%r\d+), 2147483647;", r"mov.b32 \1, \2;", 0, "wrong"
    ),
    "another random number": (
        "random", r"mul\.hi\.u32 (\s*%r\d+), (%r\d+), -766435501;", r"mul.hi.u32 \1, \2, -766435500;", 0, "wrong result"
    ),
    "nearest taken for floor": ("random", r"setp\.gt\.f32", "setp.lt.f32", 1, "wrong result"),
    "random bits not cut to 24": (
        "random", r"shr\.u32 (\s*%r\d+), (%r\d+), 8;", r"shr.u32 \1, \2, 7;", 0, "wrong result"
    ),
    "warp reduced by half": ("quantize", r"redux\.sync\.max", "redux.sync.min", 1, "wrong result"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault):
    name, pattern, replacement, count, shows = FAULTS[fault]
    ptx = re.sub(pattern, replacement, case(name).ptx, count=count)
    assert re.search(shows, caught(name, ptx))


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g32-asym", "quantize", "random"])
def test_every_barrier_and_every_wait_is_needed(name):
    """Taking away any one of them is a race, or the use of what has not arrived."""
    ptx = case(name).ptx
    found = list(re.finditer(r"bar\.sync\s+0;|cp\.async\.wait_group\s+\d+;", ptx))
    assert found
    for place in found:
        message = caught(name, ptx[: place.start()] + ptx[place.end() :])
        assert re.search("race|not delivered|waited for", message), place[0]
