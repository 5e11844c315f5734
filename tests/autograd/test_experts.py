"""Gradients of fused experts: those of the un-fused layers."""

import pytest
import torch
from helpers import assert_same_bits

from qkernels import QuantScheme, quantize_weight
from qkernels.autograd.experts import grouped_linear, trained_grouped_linear
from qkernels.autograd.frozen import quant_linear
from qkernels.autograd.int8_weight import Int8Weight
from qkernels.autograd.trained import trained_linear

E, N, K, TOKENS, CHOSEN = 5, 24, 64, 12, 2
SCHEMES = ["w8a8", "w4a8-g32-asym", "w8a16", "w4a8-g64-ag32"]


def of_expert(weight, expert):
    return weight.map(lambda tensor: tensor[expert])


def experts(scheme: str):
    """Weights, and a routing in which expert 2 takes no token and the last rows belong to no expert."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(E * N, K, generator=generator), scheme).map(lambda t: t.unflatten(0, (E, N)))
    chosen = torch.randint(0, E + 1, (TOKENS, CHOSEN), generator=generator)
    chosen[chosen == 2] = 4
    order = chosen.flatten().argsort(stable=True)
    offsets = torch.bincount(chosen.flatten(), minlength=E + 1)[:E].cumsum(0)
    assert offsets[-1] < len(order)
    return weight, order // CHOSEN, offsets


def unfused(x, rows, offsets, weight, bias, scheme):
    parts, begin = [], 0
    for expert, end in enumerate(offsets.tolist()):
        parts.append(quant_linear(x[rows[begin:end]], of_expert(weight, expert), bias[expert], scheme))
        begin = end
    return torch.cat([*parts, x.new_zeros(len(rows) - begin, N)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_unfused_layers(scheme, dtype):
    weight, rows, offsets = experts(scheme)
    leaves = [torch.randn(TOKENS, K).to(dtype), torch.randn(E, N)]
    fused, single = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    out = grouped_linear(fused[0], rows, offsets, weight, fused[1], scheme)
    expected = unfused(single[0], rows, offsets, weight, single[1], scheme)
    if scheme == "w8a16":
        torch.testing.assert_close(out, expected)
    else:
        assert_same_bits(out.detach(), expected.detach())
    grad_out = torch.randn(out.shape).to(dtype)
    out.backward(grad_out)
    expected.backward(grad_out)
    for one, other in zip(fused, single, strict=True):
        error = (one.grad - other.grad).float().norm() / other.grad.float().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert not fused[1].grad[2].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_mode_derivative_is_the_dequantized_product(scheme):
    weight, rows, offsets = experts(scheme)
    x, bias, tangent, bias_tangent = (
        torch.randn(TOKENS, K),
        torch.randn(E, N),
        torch.randn(TOKENS, K),
        torch.randn(E, N),
    )
    _, out = torch.func.jvp(
        lambda x, bias: grouped_linear(x, rows, offsets, weight, bias, scheme), (x, bias), (tangent, bias_tangent)
    )
    float_scheme = scheme.split("-ag")[0].replace("a8", "a16")
    expected = unfused(tangent, rows, offsets, weight, bias_tangent, float_scheme)
    torch.testing.assert_close(out, expected)


def test_rows_without_index_and_without_gradient():
    weight, rows, offsets = experts("w8a8")
    x, bias = torch.randn(len(rows), K), torch.randn(E, N)
    out = grouped_linear(x, None, offsets, weight, bias, "w8a8")
    assert not out.requires_grad
    trained = x.clone().requires_grad_()
    again = grouped_linear(trained, None, offsets, weight, bias, "w8a8")
    assert_same_bits(again.detach(), out)
    again.sum().backward()
    assert trained.grad[: offsets[-1]].any(dim=1).all()
    assert not trained.grad[offsets[-1] :].any()


def test_compiled_experts_give_the_same_bits_and_gradients():
    weight, rows, offsets = experts("w8a8")
    x = torch.randn(TOKENS, K)
    results = []
    for function in (grouped_linear, torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        out = function(leaf, rows, offsets, weight, None, "w8a8")
        out.sum().backward()
        results.append((out.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_second_derivatives_are_refused():
    weight, rows, offsets = experts("w8a8")
    x = torch.randn(TOKENS, K, requires_grad=True)
    out = grouped_linear(x, rows, offsets, weight, None, "w8a8")
    (grad,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of a quantized layer"):
        grad.sum().backward()


def relative(one, other) -> float:
    return ((one - other).float().norm() / other.float().norm()).item()


@pytest.mark.parametrize("grad_dtype", ["float", "int8"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w8a16"])
def test_trained_gradients_are_those_of_unfused_layers(scheme, learned, grad_dtype):
    parsed = QuantScheme.parse(scheme)
    _, rows, offsets = experts(scheme)
    leaves = [torch.randn(TOKENS, K), torch.randn(E, N, K), torch.randn(E, N)]
    if learned:
        leaves.append(quantize_weight(leaves[1].flatten(0, 1), scheme).scales.unflatten(0, (E, N)) * 0.9)
    fused, single = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    x, weight, bias, *scales = fused
    out = trained_grouped_linear(
        x, rows, offsets, weight, bias, parsed, grad_dtype=grad_dtype, scales=scales[0] if learned else None
    )
    x, weight, bias, *scales = single
    parts, begin = [], 0
    for expert, end in enumerate(offsets.tolist()):
        own = scales[0][expert] if learned else None
        parts.append(trained_linear(x[rows[begin:end]], weight[expert], bias[expert], parsed, scales=own))
        begin = end
    expected = torch.cat([*parts, x.new_zeros(len(rows) - begin, N)])
    if parsed.int_activations:
        assert_same_bits(out.detach(), expected.detach())
    grad_out = torch.randn(out.shape)
    out.backward(grad_out)
    expected.backward(grad_out)
    for one, other in zip(fused, single, strict=True):
        assert one.grad.shape == one.shape
        assert relative(one.grad, other.grad) < (2e-2 if grad_dtype == "int8" else 1e-6)
    assert not fused[1].grad[2].any(), "an expert without rows gets zeros"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_int8_gradient_of_frozen_experts_has_the_float_one_as_its_mean(scheme):
    weight, rows, offsets = experts(scheme)
    x, grad_out = torch.randn(TOKENS, K), torch.randn(len(rows), N)
    gradients = []
    for grad_dtype, draws in (("float", 1), ("int8", 40)):
        total = torch.zeros(TOKENS, K)
        for _ in range(draws):
            leaf = x.clone().requires_grad_()
            grouped_linear(leaf, rows, offsets, weight, None, scheme, grad_dtype=grad_dtype).backward(grad_out)
            total += leaf.grad / draws
        gradients.append(total)
        single = leaf.grad
    assert 1e-4 < relative(single, gradients[0]) < 2e-2
    assert relative(gradients[1], gradients[0]) < 0.6 * relative(single, gradients[0])


def test_int8_weights_of_experts_train():
    _, rows, offsets = experts("w8a8")
    stored = quantize_weight(torch.randn(E * N, K), "w8a8")
    weight = torch.nn.Parameter(Int8Weight(stored.qweight.clone(), stored.scales.clone(), torch.float32))
    x = torch.randn(TOKENS, K, requires_grad=True)
    out = trained_grouped_linear(x, rows, offsets, weight, None, QuantScheme.parse("w8a8"), grad_dtype="int8")
    frozen = grouped_linear(x.detach(), rows, offsets, stored.map(lambda t: t.unflatten(0, (E, N))), None, "w8a8")
    assert_same_bits(out.detach(), frozen)
    out.square().sum().backward()
    assert weight.grad.shape == (E * N, K)
    assert not weight.grad[2 * N : 3 * N].any()
    before = weight.qweight.clone()
    torch.optim.SGD([weight], lr=1e-2).step()
    assert_same_bits(weight.qweight[2 * N : 3 * N], before[2 * N : 3 * N])
    assert not torch.equal(weight.qweight, before)
