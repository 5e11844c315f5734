"""Threads: as many work for a call as it says, in torch's pool and in `_native`; and those that fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_python

NATIVE = Path(__file__).parents[1] / "native"
SUPPORT = Path(__file__).parents[1] / "support"

COUNT = """
import ctypes, sys
import torch
sys.path.insert(0, {here!r})
import op_samples
from qkernels import QuantScheme, _native, ops

switch = ctypes.c_int.in_dll(ctypes.CDLL(None), "count_on")
found = ctypes.c_int.in_dll(ctypes.CDLL(None), "count_threads")

def threads_of(call):
    found.value, switch.value = 0, 1
    call()
    switch.value = 0
    return found.value

limit = {limit}
torch.set_num_threads(limit)
draw, most = op_samples.Draw("threads"), 0
for scheme in ("w8a8", "w4a8-g32-asym", "w8a16", "w4a16-g32", "w4a8-ag128"):
    for m, n, k in ((1, 768, 1024), (1, 512, 512), (7, 256, 384), (1, 2048, 1024), (200, 1000, 515), (3, 40, 64)):
        qweight, scales, zeros = draw.weight(n, k, QuantScheme.parse(scheme))
        weight = [tensor if tensor is None else tensor.contiguous() for tensor in (qweight, scales, zeros)]
        x = draw.floats(m, k)
        useful = _native.choose_linear(scheme, m, n, k, limit)["threads"]
        pooled = threads_of(lambda: ops.linear(x, *weight, None, scheme))
        arrays = [tensor if tensor is None else tensor.numpy() for tensor in weight]
        plain = threads_of(lambda: _native.linear(x.numpy(), *arrays, None, scheme, threads=limit))
        assert 1 <= pooled <= useful <= limit, (scheme, m, n, k, pooled, useful)
        # x is packed by some threads, then multiplied by others, and the caller is one of both.
        assert 1 <= plain <= 2 * useful - 1, (scheme, m, n, k, plain, useful)
        most = max(most, pooled, plain)
        assert useful == limit if n == 1000 else useful < 16, (n, useful)
assert (most > 1) == (limit > 1), most
for op in op_samples.SAMPLERS:
    scheme = op_samples.OP_SCHEMES[op][-1]
    most = max(threads_of(lambda: op_samples.call(op, args)) for args, _ in op_samples.samples(op, scheme, 4))
    assert most <= limit, (op, most)
print("counted")
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("count") / "libcount.so"
    flags = ["-std=c11", "-O1", "-shared", "-fPIC", "-pthread", "-o", str(library)]
    subprocess.run([compiler, *flags, str(NATIVE / "count_threads.c"), "-ldl"], check=True)
    return library


@pytest.mark.parametrize("limit", [1, 2, 4, 16])
def test_the_limit_limits(counter, limit):
    result = run_python(COUNT.format(here=str(SUPPORT), limit=limit), LD_PRELOAD=str(counter))
    assert result.stdout.strip() == "counted"


LIMITED = """
import resource
import numpy as np
import torch
from qkernels import _native, ops

torch.set_num_threads(4)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)

def limited(more, call):
    # What the call does where the process may have only so many bytes more.
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + more, hard))
    try:
        return call()
    except Exception as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_threads_that_cannot_be_started_leave_their_share_to_the_caller():
    """And those that start, but find no memory for their work, raise in the caller."""
    code = """
weight = (np.ones((2048, 1024), np.int8), np.ones((2048, 1), np.float32), None)
x = np.ones((512, 1024), np.float32)
call = lambda threads: _native.linear(x, *weight, None, "w8a8", threads=threads)
expected = call(1)
for more in (0, 14, 16, 20, 24, 32, 64, 128, 256):
    print(limited(more << 20, lambda: np.array_equal(call(500), expected)))
"""
    seen = run_python(LIMITED + code).stdout.split()
    assert len(seen) == 9 and set(seen) == {"True", "MemoryError"} and seen[-1] == "True", seen


def test_scratch_that_cannot_be_allocated_is_a_memory_error():
    code = """
weight = (torch.ones(64, 131072, dtype=torch.int8), torch.ones(64, 1), None)
x = torch.ones(2048, 131072)
arrays = [tensor if tensor is None else tensor.numpy() for tensor in weight]
print(limited(48 << 20, lambda: ops.linear(x, *weight, None, "w8a8")))
print(limited(48 << 20, lambda: _native.linear(x.numpy(), *arrays, None, "w8a8", threads=4)))
print(ops.linear(x[:3], *weight, None, "w8a8")[0, 0].item())
"""
    assert run_python(LIMITED + code).stdout.split() == ["MemoryError", "MemoryError", "131072.0"]


def test_python_runs_while_native_computes():
    code = """
import threading, time
import numpy as np
from qkernels import _native

weight = (np.ones((2048, 2048), np.int8), np.ones((2048, 1), np.float32), None)
x = np.ones((2048, 2048), np.float32)
worker = threading.Thread(target=lambda: _native.linear(x, *weight, None, "w8a16"))
worker.start()
turns = 0
while worker.is_alive():
    time.sleep(0.001)
    turns += 1
print(turns)
"""
    assert int(run_python(code).stdout) > 10
