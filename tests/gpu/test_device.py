"""The operators on a real device. Without one these tests are skipped; `pytest -m gpu` runs them alone."""

import copy

import op_samples
import pytest
import reference_ops
import torch
from helpers import invoke
from tiers import tiered

from qkernels import QuantLinear, linear_cross_entropy
from qkernels.kernels import cuda_library, dispatch, ops, reference
from qkernels.nn.matrix_layer import GRAD_DTYPES

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

from bounds import assert_within_bound
from launch_checks import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
CASES = [
    pytest.param(op, *parameter.values, marks=parameter.marks)
    for op, schemes in op_samples.OP_SCHEMES.items()
    for parameter in tiered(schemes)
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request, monkeypatch) -> str:
    """Lets each backend compute what it can; without the CUDA C++ kernels their half is skipped."""
    if request.param == "triton":
        monkeypatch.setattr(cuda_library, "supports", lambda call: False)
    elif not cuda_library.library().loaded:
        pytest.skip(f"CUDA kernels: {cuda_library.library().reason}")
    return request.param


def moved(args: tuple, device: str) -> tuple:
    """The arguments on a device, but for the seed, which every backend reads on the host."""
    tensors = (isinstance(arg, torch.Tensor) and not (arg.dtype == torch.int64 and arg.dim() == 0) for arg in args)
    return tuple(arg.to(device) if moves else arg for arg, moves in zip(args, tensors, strict=True))


@pytest.mark.parametrize(("op", "scheme"), CASES)
def test_operator(op, scheme, backend):
    for sample in op_samples.samples(op, scheme):
        check(op, scheme, sample, tuple(result.cpu() for result in op_samples.results(op, moved(sample.args, "cuda"))))


@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096), (16, 4096, 11008), (512, 4096, 4096), (2048, 768, 3072), (2048, 4096, 8192)]
)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g128"])
def test_real_shapes_equal_the_reference(shape, scheme, backend):
    m, n, k = shape
    layer = QuantLinear.from_float(torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16), scheme)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    stored = (layer.qweight, layer.scales, layer.zeros, layer.bias, scheme)
    assert torch.equal(ops.linear(x, *stored), reference_ops.linear(x, *stored))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_a_weight_that_is_not_finite_is_told_of_later(scheme):
    """Nothing waits for the device to find out: a call after it raises, and the ones after that go on."""
    weight = torch.randn(64, 96, device="cuda")
    stored = ops.quantize_weight(weight, scheme)
    weight[3, 5] = torch.nan
    for call in (
        lambda: ops.quantize_weight(weight, scheme),
        lambda: ops.quantize_weight_scaled(weight, stored[1], scheme),
    ):
        call()
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=r"must be finite.*in a call before this one"):
            ops.dequantize_weight(*stored[:2], None, 96, scheme)
        ops.dequantize_weight(*stored[:2], None, 96, scheme)


def test_layer_trains_and_compiles(backend):
    layer = QuantLinear.from_float(torch.nn.Linear(256, 128, device="cuda"), "w8a8")
    x = torch.randn(32, 256, device="cuda", requires_grad=True)
    eager = layer(x)
    assert torch.equal(torch.compile(layer)(x), eager)
    grad = torch.randn_like(eager)
    eager.backward(grad)
    assert_within_bound(x.grad.cpu(), grad.cpu(), layer.dequantize().t().double().cpu(), gradient=True)


@pytest.mark.parametrize("grad", GRAD_DTYPES)
@pytest.mark.parametrize(("scheme", "mode"), [("w8a8", "qat"), ("w4a8-g32-asym-ag32", "qat"), ("w8a8", "int8")])
def test_training_equals_that_of_the_cpu(scheme, mode, grad, backend):
    torch.manual_seed(0)
    layer = QuantLinear.from_float(torch.nn.Linear(256, 128), scheme, mode=mode, grad_dtype=grad)
    x, upstream = torch.randn(33, 256), torch.randn(33, 128)

    def step(device: str) -> list[torch.Tensor]:
        torch.manual_seed(1)
        moved_layer, inputs = copy.deepcopy(layer).to(device), x.to(device).requires_grad_()
        out = moved_layer(inputs)
        wanted = [inputs, *(parameter for parameter in moved_layer.parameters() if parameter.requires_grad)]
        return [tensor.cpu() for tensor in (out, *torch.autograd.grad(out, wanted, upstream.to(device)))]

    on_cpu, on_gpu = step("cpu"), step("cuda")
    assert torch.equal(on_gpu[0], on_cpu[0])
    for actual, expected in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(actual, expected)
    if grad == "int8":
        assert torch.equal(on_gpu[1], on_cpu[1]) and torch.equal(on_gpu[2], on_cpu[2])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g128", "w4a16-g128"])
def test_loss_of_a_large_vocabulary(scheme, monkeypatch):
    """More logits than are held at a time, in chunks of the real size."""
    monkeypatch.setattr(reference, "LOSS_CHUNK", 1024)
    head = QuantLinear.from_float(torch.nn.Linear(256, 50_000, bias=False, device="cuda"), scheme)
    hidden = torch.randn(3000, 256, device="cuda", requires_grad=True)
    target = torch.randint(0, 50_000, (3000,), device="cuda")
    target[::7] = -100
    loss = linear_cross_entropy(hidden, head, target)
    loss.backward()
    x = hidden.detach().requires_grad_()
    expected = torch.nn.functional.cross_entropy(head(x).float(), target)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert (hidden.grad - x.grad).norm() < 0.02 * x.grad.norm()


def test_bench_and_tune(tmp_path, monkeypatch):
    shape = ["--layers", "256x512", "--rows", "1,64", "--schemes", "w8a8,w4a16-g128"]
    result = invoke("bench", "linear", "--device", "cuda", *shape, "--seconds", 0.05, "--output", tmp_path)
    assert result.exit_code == 0 and (tmp_path / "linear.json").exists(), result.output
    monkeypatch.setattr(
        cuda_library, "library", lambda: cuda_library.Library(False, "hidden")
    )  # Triton's tiles are what is tuned
    dispatch.facts_of.cache_clear()
    result = invoke("tune", *shape, "--seconds", 5, "--output", tmp_path / "tuned.json")
    dispatch.facts_of.cache_clear()
    assert result.exit_code == 0 and (tmp_path / "tuned.json").exists(), result.output
