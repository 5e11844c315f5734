"""The AVX-512 VNNI kernels on a CPU that may lack them: the same source over emulated intrinsics (tests/emulation)."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import qkernels as qk
from qkernels import reference

ROOT = Path(__file__).resolve().parent.parent
ISA = "avx512vnni"

pytestmark = pytest.mark.skipif(
    "avx2" not in qk.isa.supported() or shutil.which("g++") is None, reason="needs AVX2 and g++ to emulate AVX-512"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """`_native` built with the emulated intrinsics, every ISA of which counts as supported."""
    import pybind11

    target = tmp_path_factory.mktemp("emulated") / "_native.so"
    sources = [*ROOT.glob("csrc/core/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), ROOT / "csrc/native.cpp"]
    includes = [ROOT / "tests/emulation", ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-DQK_EMULATED_AVX512"]
    flags += ["-mavx2", "-mfma", "-mf16c"]  # for the vector types in the headers

    def compile_one(source: Path) -> tuple[subprocess.Popen, Path]:
        out = target.with_name(source.parent.name + "_" + source.stem + ".o")
        command = ["g++", *flags, *(f"-I{path}" for path in includes), "-c", str(source), "-o", str(out)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True), out

    objects = []
    for process, out in [compile_one(source) for source in sources]:
        assert process.wait() == 0, process.stderr.read()
        objects.append(str(out))
    subprocess.run(["g++", "-shared", "-o", str(target), *objects, "-pthread"], check=True)
    spec = importlib.util.spec_from_file_location("_native", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.force_isa(ISA)
    return module


def case(scheme: str, m: int, k: int, n: int):
    generator = torch.Generator().manual_seed(1000 * m + 10 * k + n)
    x, grad = torch.randn(m, k, generator=generator), torch.randn(m, n, generator=generator)
    weight = qk.quantize_weight(torch.randn(n, k, generator=generator), scheme)
    return x, grad, weight, torch.randn(n, generator=generator)


# (M, K, N) around the tiles: 12 and 6 rows, 32 columns, 4 k a unit, 64 k a vector; up to 4 rows take the row dots.
SHAPES = [(1, 1, 1), (4, 130, 33), (7, 33, 31), (13, 161, 70)]


@pytest.mark.parametrize("scheme", qk.QuantScheme.names())
def test_equals_reference(emulated, scheme):
    for shape in SHAPES:
        x, grad, weight, bias = case(scheme, *shape)
        arrays = [None if t is None else t.numpy() for t in weight]
        actual = torch.from_numpy(emulated.linear(x.numpy(), *arrays, bias.numpy(), scheme))
        expected = reference.linear(x, *weight, bias, scheme)
        if qk.QuantScheme.parse(scheme).int_activations:
            assert torch.equal(actual, expected), (scheme, shape)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        actual = torch.from_numpy(emulated.linear_grad_input(grad.numpy(), *arrays, x.shape[1], scheme))
        torch.testing.assert_close(
            actual, reference.linear_grad_input(grad, *weight, x.shape[1], scheme), rtol=1e-4, atol=1e-4
        )
        actual = emulated.dequantize_weight(*arrays, x.shape[1], scheme)
        assert np.array_equal(actual, reference.dequantize_weight(*weight, x.shape[1], scheme).numpy())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-ag32"])
def test_activation_quantization(emulated, scheme):
    x = torch.randn(5, 200) * torch.tensor([1.0, 1e-30, 0.0, 1e30, 1.0]).unsqueeze(1)
    x[4, 7] = torch.inf
    q, scales = emulated.quantize_activation(x.numpy(), scheme)
    expected_q, expected_scales = reference.quantize_activation(x, scheme)
    assert np.array_equal(q, expected_q.numpy())
    assert np.array_equal(scales, expected_scales.numpy(), equal_nan=True)


@pytest.mark.parametrize("kernel", ["scalar", "avx2"])
def test_emulation_agrees_with_the_real_kernels(emulated, kernel):
    """The build with emulated intrinsics computes the other ISAs too: all of them give the same bits."""
    x, _, weight, bias = case("w4a8-g32-asym", 14, 161, 45)
    arrays = [None if t is None else t.numpy() for t in weight]
    expected = emulated.linear(x.numpy(), *arrays, bias.numpy(), "w4a8-g32-asym")
    emulated.force_isa(kernel)
    try:
        assert np.array_equal(emulated.linear(x.numpy(), *arrays, bias.numpy(), "w4a8-g32-asym"), expected)
    finally:
        emulated.force_isa(ISA)
