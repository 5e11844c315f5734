"""No kernel reads or writes outside the tensors it is given: each ends at a page that may not be touched."""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import run_python
from tiers import isa_parameters

HERE = Path(__file__).parent

CODE = """
import ctypes, sys
import torch
sys.path.insert(0, {here!r})
import op_samples
from helpers import assert_same_bits
from qkernels import isa

switch = ctypes.c_int.in_dll(ctypes.CDLL(None), "guard_on")
count = ctypes.c_int.in_dll(ctypes.CDLL(None), "guard_count")
torch.set_num_threads(2)
calls = 0
# Sums of floats, whose order is free.
GRADIENTS = {{"linear_grad_input", "grouped_linear_grad_input", "grouped_linear_grad_weight", "grouped_outer"}}
PRODUCTS = {{"linear", "linear_with_saved_input", "linear_cross_entropy", "grouped_linear", "conv"}}
for op in op_samples.SAMPLERS:
    for scheme in op_samples.OP_SCHEMES[op][::3]:
        for (args, label), plain in op_samples.expected(op, scheme, 12):
            print(op, scheme, label, flush=True)
            switch.value = 1
            guarded = [a.clone(memory_format=torch.contiguous_format) if torch.is_tensor(a) else a for a in args]
            out = op_samples.results(op, tuple(guarded))
            del guarded
            switch.value = 0
            calls += 1
            if op not in GRADIENTS and (op not in PRODUCTS or "a8" in scheme):
                for a, b in zip(out, plain, strict=True):
                    assert_same_bits(a, b, label)
                del a
            del out
assert count.value > 3 * calls > 100, (count.value, calls)
print("guarded", isa.current(), count.value)
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("guard") / "libguard.so"
    flags = ["-std=c11", "-O1", "-shared", "-fPIC", "-pthread", "-o", str(library)]
    subprocess.run([compiler, *flags, str(HERE / "guard_alloc.c"), "-ldl"], check=True)
    return library


def test_the_guard_bites(guard):
    code = """
import ctypes, torch
ctypes.c_int.in_dll(ctypes.CDLL(None), "guard_on").value = 1
x = torch.empty(10)
ctypes.memset(x.data_ptr(), 0, 40)
print("inside", flush=True)
ctypes.memset(x.data_ptr() + {}, 0, 1)
del x
"""
    for offset in (40, -1):
        result = run_python(code.format(offset), check=False, LD_PRELOAD=str(guard))
        assert result.returncode < 0 and "inside" in result.stdout, result.stderr


@pytest.mark.parametrize("name", isa_parameters())
def test_kernels_stay_inside_their_tensors(guard, name):
    code = CODE.format(here=str(HERE.parent / "support"))
    result = run_python(code, check=False, LD_PRELOAD=str(guard), QKERNELS_ISA=name)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout.splitlines()[-1:]} {result.stderr[-2000:]}"
    assert f"guarded {name}" in result.stdout
