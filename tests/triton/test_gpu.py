"""The operators on a real device. Without one these tests are skipped; `pytest -m gpu` runs them alone."""

import op_samples
import pytest
import torch

from qkernels import QuantLinear, dispatch, reference

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

from bounds import assert_within_bound
from checks import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
CASES = [(op, scheme) for op, schemes in op_samples.OP_SCHEMES.items() for scheme in schemes]


def moved(args: tuple, device: str) -> tuple:
    return tuple(arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args)


@pytest.mark.parametrize(("op", "scheme"), CASES)
def test_operator(op, scheme):
    assert dispatch.select(dispatch.facts_of(torch.device("cuda:0"))).backend == "triton"
    for sample in op_samples.samples(op, scheme):
        result = getattr(torch.ops.qkernels, op)(*moved(sample.args, "cuda"))
        check(op, scheme, sample, tuple(r.cpu() for r in (result if isinstance(result, tuple) else (result,))))


@pytest.mark.parametrize("shape", [(1, 4096, 4096), (16, 4096, 11008), (512, 4096, 4096), (2048, 768, 3072)])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g128"])
def test_real_shapes_equal_the_reference(shape, scheme):
    m, n, k = shape
    layer = QuantLinear.from_float(torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16), scheme)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    stored = (layer.qweight, layer.scales, layer.zeros, layer.bias, scheme)
    assert torch.equal(torch.ops.qkernels.linear(x, *stored), reference.linear(x, *stored))


def test_layer_trains_and_compiles():
    layer = QuantLinear.from_float(torch.nn.Linear(256, 128, device="cuda"), "w8a8")
    x = torch.randn(32, 256, device="cuda", requires_grad=True)
    eager = layer(x)
    assert torch.equal(torch.compile(layer)(x), eager)
    grad = torch.randn_like(eager)
    eager.backward(grad)
    assert_within_bound(x.grad.cpu(), grad.cpu(), layer.dequantize().t().double().cpu(), gradient=True)
