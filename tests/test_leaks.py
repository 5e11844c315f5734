"""What is allocated in a call is given back: the heap does not grow with the number of calls."""

import ctypes
from pathlib import Path

import op_samples
import pytest
from helpers import run_python

CODE = """
import ctypes, gc, sys
import torch
sys.path.insert(0, {here!r})
import op_samples
from qkernels import ops

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info

def used():
    gc.collect()
    return libc.mallinfo2().uordblks

torch.set_num_threads(1)
for op in op_samples.SAMPLERS:
    samples = [args for args, _ in op_samples.samples(op, op_samples.OP_SCHEMES[op][-1], 8) if args[0].numel() < 20_000]
    call = getattr(ops, op)
    for _ in range(20):
        for args in samples:
            call(*args)
    before, calls = used(), 0
    while calls < 1000:
        for args in samples:
            call(*args)
            calls += 1
    print(op, (used() - before) / calls)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs mallinfo2 of glibc 2.33")
def test_operators_leave_nothing_behind():
    lines = run_python(CODE.format(here=str(Path(__file__).parent))).stdout.splitlines()
    grown = {op: float(number) for op, number in map(str.split, lines)}
    assert grown.keys() == op_samples.SAMPLERS.keys()
    assert max(grown.values()) < 8, f"bytes a call: {grown}"
