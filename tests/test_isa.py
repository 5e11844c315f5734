"""Choosing and forcing the instruction set of the CPU kernels."""

import pytest
import torch
from helpers import run_python

from qkernels import isa

DIGEST = """
import hashlib, torch, qkernels as qk
from qkernels import isa, ops
torch.manual_seed(0)
digest = hashlib.sha256()
for scheme in ("w8a8", "w4a8-g32-asym", "w8a8-g64-ag32", "w4a8-asym-ag128"):
    for rows, columns in ((1, 301), (20, 64), (90, 130)):
        layer = qk.QuantLinear.from_float(torch.nn.Linear(columns, 77), scheme)
        x = torch.randn(rows, columns)
        digest.update(layer(x).detach().numpy().tobytes())
        digest.update(layer(x.bfloat16()).detach().view(torch.int16).numpy().tobytes())
print(isa.current(), digest.hexdigest())
"""


def test_names():
    assert set(isa.supported()) <= set(isa.compiled())
    assert isa.compiled()[0] == isa.supported()[0] == "scalar"
    assert isa.current() in isa.supported() and isa.current() in isa.reason()


def test_force_is_a_scope():
    before = isa.current()
    for name in isa.supported():
        with isa.force(name):
            assert isa.current() == name
            with isa.force("scalar"):
                assert isa.current() == "scalar"
            assert isa.current() == name
    with pytest.raises(KeyError), isa.force("scalar"):
        raise KeyError
    assert isa.current() == before


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "scalar "])
def test_unknown_names_are_refused(name):
    before = isa.current()
    with pytest.raises(ValueError, match="scalar") as error, isa.force(name):
        pass
    assert repr(name)[1:-1] in str(error.value)
    assert isa.current() == before


def test_what_the_cpu_lacks_is_refused():
    before = isa.current()
    for name in set(isa.compiled()) - set(isa.supported()):
        with pytest.raises(ValueError, match=name), isa.force(name):
            pass
    assert isa.current() == before


def test_environment_forces_the_scalar_kernels_with_equal_bits():
    default, digest = run_python(DIGEST).stdout.split()
    forced, forced_digest = run_python(DIGEST, QKERNELS_ISA="scalar").stdout.split()
    assert forced == "scalar" and default == isa.supported()[-1]
    assert forced_digest == digest


@pytest.mark.parametrize("name", ["avx1024", *sorted(set(isa.compiled()) - set(isa.supported()))])
def test_environment_with_a_wrong_name(name):
    code = "import torch, qkernels as qk; qk.QuantLinear(4, 3)(torch.ones(2, 4))"
    result = run_python(code, check=False, QKERNELS_ISA=name)
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert "QKERNELS_ISA" in error and name in error and "scalar" in error, result.stderr


def test_threads_see_a_forced_instruction_set():
    from concurrent.futures import ThreadPoolExecutor

    with isa.force("scalar"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(isa.current).result() == "scalar"
        torch.ones(3).sum()
