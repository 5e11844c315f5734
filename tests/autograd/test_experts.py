"""Gradients of fused experts: those of the un-fused layers."""

import pytest
import torch
from helpers import assert_same_bits

from qkernels import quantize_weight
from qkernels.autograd.experts import grouped_linear
from qkernels.autograd.frozen import quant_linear

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
