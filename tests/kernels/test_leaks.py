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
    for _ in range(20):
        for args in samples:
            op_samples.call(op, args)
    before, calls = used(), 0
    while calls < 1000:
        for args in samples:
            op_samples.call(op, args)
            calls += 1
    print(op, (used() - before) / calls)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs mallinfo2 of glibc 2.33")
def test_operators_leave_nothing_behind():
    lines = run_python(CODE.format(here=str(Path(__file__).parents[1] / "support"))).stdout.splitlines()
    grown = {op: float(number) for op, number in map(str.split, lines)}
    assert grown.keys() == op_samples.SAMPLERS.keys()
    assert max(grown.values()) < 8, f"bytes a call: {grown}"


PEAK = """
import torch
from qkernels import ops

torch.set_num_threads(2)
weight = (torch.ones(65536, 128, dtype=torch.int8), torch.ones(65536, 1), None)
grad_out = torch.ones(512, 65536)
open("/proc/self/clear_refs", "w").write("5")

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024

before = memory("VmRSS")
ops.linear_grad_input(grad_out, *weight, 128, "w8a8")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of Linux")
def test_float_products_do_not_copy_the_whole_input():
    """The gradient of a head with many classes: it has 128 MB, of which 32 are packed at a time."""
    assert float(run_python(PEAK).stdout) < 64, "MB"


STEPS = """
import random
import torch
from torch import nn
import qkernels as qk

torch.set_num_threads(1)
torch.manual_seed(0)
random.seed(0)
kinds = [(96, 200, "w8a8"), (300, 64, "w4a8-g32-asym"), (128, 512, "w8a16"), (77, 129, "w4a16-g64")]
layers = [qk.QuantLinear.from_float(nn.Linear(k, n), scheme) for k, n, scheme in kinds]

def resident(steps):
    for step in range(steps):
        k, _, _ = kinds[step % 4]
        x = torch.randn(random.randint(1, 400), k, requires_grad=True)
        layers[step % 4](x).sum().backward()
    return int(open("/proc/self/statm").read().split()[1]) * 4

before = resident(4000)
print(resident(6000) - before)
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the resident memory of Linux")
def test_memory_stays_flat_over_calls_of_mixed_shapes():
    """The strings that torch leaked lay between other blocks, so that memory grew by more than their size."""
    assert int(run_python(STEPS).stdout) < 1024, "KB"
