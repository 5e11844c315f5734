"""Run by test_interpreted.py in a process with TRITON_INTERPRET=1: the operators on CPU tensors against the reference.

Triton's interpreter is mended for bfloat16: it multiplies the bits as integers, truncates float32 instead of rounding
it, and takes an integer's value for its bits.
"""

import numpy as np
import op_samples
import pytest
import torch
from checks import check
from helpers import assert_same_bits
from triton import language as tl
from triton.runtime import interpreter

from qkernels import dispatch
from qkernels.triton import ops, plans

COUNT = 2


def bfloat16_bits(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def float32_values(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


@pytest.fixture(autouse=True)
def mended_bfloat16(monkeypatch):
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, to):
        if to.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return interpreter.TensorHandle(bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def create_dot(self, a, b, *rest):
        return dot(self, float32_values(a), float32_values(b), *rest)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(builder, name, cast_impl)


@pytest.mark.parametrize(
    ("op", "scheme"), [(op, s) for op in sorted(ops.PLANS) for s in op_samples.OP_SCHEMES[op]]
)
def test_operator(op, scheme):
    for sample in list(op_samples.samples(op, scheme, COUNT))[:COUNT]:
        actual = ops.run(op, sample.args, {})
        check(op, scheme, sample, actual if isinstance(actual, tuple) else (actual,))


def test_dispatch_reaches_triton():
    x = torch.randn(3, 40)
    choice = dispatch.select(dispatch.Facts("cuda", 80, triton=True))
    q, scales = dispatch.run("quantize_activation", choice, (x, "w8a8"), {})
    check("quantize_activation", "w8a8", op_samples.Sample((x, "w8a8"), "dispatched"), (q, scales))
