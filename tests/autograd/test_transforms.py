"""torch.func, forward mode, second derivatives, tracing and compiled seeds of all kinds of layers."""

import io

import pytest
import torch
from helpers import assert_same_bits, run_python
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import qkernels as qk
from qkernels.autograd.frozen import LowRank, adapted_linear

K, N = 40, 24
KINDS = ["frozen", "adapted", "qat", "qat4", "learned", "int8"]


class Adapted(nn.Module):
    """A frozen layer with an adapter, as `QuantLoraLinear` computes it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Parameter(torch.randn(4, K) / 6), nn.Parameter(torch.randn(N, 4) / 6)

    def forward(self, x):
        weight = self.base.quantized_weight()
        return adapted_linear(x, weight, self.base.bias, self.base.scheme.name, LowRank(self.down, self.up, 0.5))


def layer_of(kind: str, grad_dtype: str = "float") -> nn.Module:
    scheme = "w4a8-g32" if kind == "qat4" else "w8a8"
    options = {"weight_scale": "learned"} if kind == "learned" else {}
    mode = {"adapted": "frozen", "qat4": "qat", "learned": "qat"}.get(kind, kind)
    layer = qk.QuantLinear.from_float(nn.Linear(K, N), scheme, mode=mode, grad_dtype=grad_dtype, **options)
    return Adapted(layer) if kind == "adapted" else layer


def parameters_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in layer.named_parameters() if p.is_floating_point() and p.requires_grad}


def loss(layer, parameters, x):
    return functional_call(layer, parameters, (x,)).pow(2).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients_are_those_of_single_samples(kind):
    layer, x = layer_of(kind), torch.randn(5, K)
    parameters = parameters_of(layer)
    got = vmap(grad(lambda p, z: loss(layer, p, z[None])), (None, 0))(parameters, x)
    for i in range(5):
        layer.zero_grad()
        layer(x[i : i + 1]).pow(2).sum().backward()
        for name in parameters:
            expected = dict(layer.named_parameters())[name].grad
            torch.testing.assert_close(got[name][i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_vmap_inside(kind):
    layer, x = layer_of(kind), torch.randn(5, K)
    got = grad(lambda z: vmap(layer)(z).pow(2).sum())(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).pow(2).sum().backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-5, atol=1e-5)
    rows = jacrev(layer)(x[0])
    torch.testing.assert_close(rows.pow(2).sum(), jacrev(layer)(x[1]).pow(2).sum())  # linear: the same everywhere


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_is_straight_through(kind):
    """The derivative along a direction equals the gradient times that direction."""
    layer, x, direction = layer_of(kind), torch.randn(3, K), torch.randn(3, K)
    out, tangent = jvp(layer, (x,), (direction,))
    assert_same_bits(out.detach(), layer(x).detach())
    probe = torch.randn(3, N)
    leaf = x.clone().requires_grad_()
    (layer(leaf) * probe).sum().backward()
    torch.testing.assert_close((tangent * probe).sum(), (leaf.grad * direction).sum(), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent.detach())


@pytest.mark.parametrize("kind", ["adapted", "qat", "qat4", "int8"])
def test_forward_mode_of_parameters(kind):
    layer, x = layer_of(kind), torch.randn(3, K)
    parameters = parameters_of(layer)
    tangents = {name: torch.randn(p.shape) for name, p in parameters.items()}
    if kind == "int8":
        parameters["weight"] = layer.weight.detach()
    _, tangent = jvp(lambda p: functional_call(layer, p, (x,)), (parameters,), (tangents,))
    probe = torch.randn(3, N)
    (layer(x) * probe).sum().backward()
    expected = sum((p.grad * tangents[name]).sum() for name, p in layer.named_parameters() if name in tangents)
    torch.testing.assert_close((tangent * probe).sum(), expected, rtol=1e-3, atol=1e-3)


SECOND = "second derivatives of a quantized layer are not defined"


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind):
    first, second = layer_of(kind), nn.Linear(N, 3)

    def f(z):
        return second(torch.nn.functional.gelu(first(z))).sum()

    x = torch.randn(1, K)
    for attempt in (
        lambda: torch.autograd.functional.hessian(f, x),
        lambda: hessian(f)(x),
        lambda: jacrev(jacrev(f))(x),
        lambda: grad(lambda z: grad(f)(z).pow(2).sum())(x),
    ):
        with pytest.raises(RuntimeError, match=SECOND):
            attempt()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", ["adapted", "qat", "learned", "int8"])
def test_gradients_of_weights_depend_on_what_came_before(kind):
    """As in meta-learning: the gradient of a weight is a function of x, and that of x one of the weight."""
    layer = layer_of(kind)
    weight = layer.up if kind == "adapted" else layer.weight
    x = torch.randn(3, K, requires_grad=True)
    (of_weight,) = torch.autograd.grad(layer(x).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(of_weight.sum(), x, allow_unused=True)
    (of_x,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(of_x.sum(), weight, allow_unused=True)


@pytest.mark.parametrize("kind", ["frozen", "adapted", "qat", "learned"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_traces_of_torch_jit(kind, with_gradient):
    layer, x = nn.Sequential(layer_of(kind), nn.ReLU()), torch.randn(3, K)
    with torch.set_grad_enabled(with_gradient):
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(layer, x), buffer)
        buffer.seek(0)
        y = torch.randn(5, K)
        assert_same_bits(torch.jit.load(buffer)(y).detach(), layer(y).detach())


def test_a_trace_of_an_int8_weight_is_refused():
    with pytest.raises(RuntimeError, match=r"freeze_\(model\) makes it frozen"):
        torch.jit.trace(layer_of("int8"), torch.randn(3, K))


@pytest.mark.parametrize("kind", ["frozen", "qat", "qat4", "int8"])
def test_weights_that_change_before_the_backward_are_noticed(kind):
    layer = layer_of(kind)
    weight = layer.qweight if kind == "frozen" else layer.weight
    out = layer(torch.randn(3, K, requires_grad=True)).sum()
    with torch.no_grad():
        weight.add_(1)
    if kind == "qat":  # which keeps the quantized weight of its forward
        out.backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.thorough
def test_compiled_gradients_draw_the_numbers_of_eager():
    """In a process of its own: inductor starts threads. One graph holds layers of all modes."""
    code = """
import copy, torch, qkernels as qk
torch.manual_seed(0)
net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
for i, mode in enumerate(["frozen", "qat", "int8"]):
    qk.quantize_(net, "w8a8", mode=mode, grad_dtype="int8", include=[str(i), str(i + 3)])
x = torch.randn(16, 64)
def gradients(function):
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    function(leaf).pow(2).sum().backward()
    return [leaf.grad, *(p.grad for p in net.parameters() if p.requires_grad)], torch.rand(1)
(eager, state), (compiled, other) = gradients(net), gradients(torch.compile(net, fullgraph=True))
assert torch.equal(state, other)
for a, b in zip(eager, compiled, strict=True):
    assert (a - b).norm() <= 1e-5 * a.norm(), ((a - b).norm() / a.norm()).item()
"""
    run_python(code, timeout=400)


def test_operators_have_no_gradient_and_say_so():
    layer, x = layer_of("frozen"), torch.randn(3, K, requires_grad=True)
    out = torch.ops.qkernels.linear(x, layer.qweight, layer.scales, None, None, layer.scheme.code, None)
    with pytest.raises(RuntimeError, match=r"qkernels::linear has no gradient.*quant_linear"):
        out.sum().backward()
    values, _ = torch.ops.qkernels.quantize_activation(x, layer.scheme.code)
    assert not values.requires_grad
