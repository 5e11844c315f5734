"""Choosing and forcing the instruction set of the CPU kernels."""

from pathlib import Path

import pytest
import torch
from helpers import run_python

from qkernels.kernels import isa

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


def test_overlapping_blocks_end_with_what_was_in_use_before():
    """Blocks of several threads end in any order: the last that is open counts, and none leaves its choice behind."""
    before, names = isa.current(), [isa.supported()[-1], "scalar", isa.supported()[-1]]
    blocks = [isa.force(name) for name in names]
    for block in blocks:
        block.__enter__()
    seen = [isa.current()]
    for index in (0, 2, 1):
        blocks[index].__exit__(None, None, None)
        seen.append(isa.current())
    assert seen == [names[2], names[2], "scalar", before]


RACE = """
import threading, time, sys
import torch
sys.path.insert(0, {here!r})
import op_samples
from qkernels import isa, ops

torch.set_num_threads(2)
calls = []
for op in op_samples.SAMPLERS:
    for scheme in ("w8a8", "w4a8-g32-asym", "w8a8-ag64"):
        if scheme in op_samples.OP_SCHEMES[op]:
            args = list(op_samples.samples(op, scheme, 3))[-1].args
            calls.append((op, args, op_samples.results(op, args)))
stop, counts, wrong = time.time() + 6, [0, 0], []

def work(index):
    while time.time() < stop:
        for op, args, expected in calls[index::2]:
            pairs = zip(op_samples.results(op, args), expected)
            if op != "linear_grad_input" and not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
                wrong.append(op)
            counts[index] += 1

def flip():
    while time.time() < stop:
        with isa.force("scalar"):
            pass

before = isa.current()
threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)] + [threading.Thread(target=flip)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert min(counts) > 0 and not wrong and isa.current() == before, (counts, wrong, isa.current())
print("equal")
"""


def test_forcing_beside_running_calls_changes_none_of_them():
    """A call whose table changed under it read panels in another layout, beyond their end."""
    assert run_python(RACE.format(here=str(Path(__file__).parents[1] / "support"))).stdout.strip() == "equal"


def test_threads_see_a_forced_instruction_set():
    from concurrent.futures import ThreadPoolExecutor

    with isa.force("scalar"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(isa.current).result() == "scalar"
        torch.ones(3).sum()
