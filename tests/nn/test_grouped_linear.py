"""`QuantGroupedLinear`: each expert's product has the bits of a `QuantLinear`; modes, state, layouts."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from op_samples import x_scale_of
from torch import nn

import qkernels as qk
from qkernels.nn.adapters import adapter_of, float_twin
from qkernels.nn.grouped_linear import GroupedLinear, QuantGroupedLinear

E, N, K = 4, 24, 64
OFFSETS = torch.tensor([3, 3, 10, 12])  # the second expert has no row
SCHEMES = ["w8a8", "w8a16", "w4a8-g32", "w4a8-g32-asym", "w4a16-g32", "w4a8-ag32", "w8a8s", "w4a8s-g32", "w4a8-g32-min"]


def layer_of(bias=True, transposed=False, flat=False, dtype=torch.float32) -> GroupedLinear:
    torch.manual_seed(0)
    weight = torch.randn(E, K, N) if transposed else torch.randn(E, N, K)
    weight = (weight.flatten(0, 1) if flat else weight).to(dtype)
    return GroupedLinear(
        nn.Parameter(weight), nn.Parameter(torch.randn(E, N).to(dtype)) if bias else None, E, transposed=transposed
    )


def unfused(layer: GroupedLinear, scheme: str, **options) -> list[qk.QuantLinear]:
    """A `QuantLinear` for each expert."""
    layers = []
    for expert, matrix in enumerate(layer.matrices()):
        linear = nn.Linear(K, N, layer.bias is not None, dtype=matrix.dtype)
        linear.weight = nn.Parameter(matrix.detach().clone())
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias[expert].detach().clone())
        layers.append(qk.QuantLinear.from_float(linear, scheme, **options))
    return layers


def expected(x: torch.Tensor, linears) -> torch.Tensor:
    parts = x[: OFFSETS[-1]].tensor_split(OFFSETS[:-1])
    out = torch.cat([linear(part) for linear, part in zip(linears, parts, strict=True)])
    return torch.cat([out, out.new_zeros(len(x) - len(out), N)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_has_the_bits_of_a_linear_layer(scheme, dtype):
    layer, x, options = layer_of(dtype=dtype), torch.randn(14, K).to(dtype), {"x_scale": x_scale_of(scheme)}
    quantized = QuantGroupedLinear.from_float(layer, scheme, **options)
    assert_same_bits(quantized(x, OFFSETS), expected(x, unfused(layer, scheme, **options)))


def test_a_row_that_several_experts_take_is_quantized_as_it_is():
    layer, x, rows = layer_of(), torch.randn(5, K), torch.randint(5, (12,))
    quantized = QuantGroupedLinear.from_float(layer, "w8a8")
    assert_same_bits(quantized(x, OFFSETS, rows), quantized(x[rows], OFFSETS))


@pytest.mark.parametrize("offsets", [[0, 0, 0, 0], [7, 7, 7, 7], [0, 0, 0, 7], [1, 2, 3, 4]])
def test_experts_without_rows_and_rows_without_experts(offsets):
    layer, x = layer_of(), torch.randn(7, K)
    for module in (layer, QuantGroupedLinear.from_float(layer, "w8a8")):
        out = module(x, torch.tensor(offsets))
        assert out.shape == (7, N) and not out[offsets[-1] :].any() and bool(out[: offsets[-1]].any(dim=1).all())
        assert module(torch.randn(0, K), torch.zeros(E, dtype=torch.int64)).shape == (0, N)


@pytest.mark.parametrize(
    "scheme, mode, options",
    [
        ("w8a8", "qat", {}),
        ("w4a8-g32", "qat", {}),
        ("w4a8-g32", "qat", {"weight_scale": "learned"}),
        ("w8a16", "int8", {}),
        ("w8a8", "int8", {}),
        ("w8a8s", "qat", {}),
        ("w8a8s", "int8", {}),
        ("w4a8s-g32", "qat", {"weight_scale": "learned"}),
    ],
)
def test_trained_modes_have_the_bits_and_gradients_of_linear_layers(scheme, mode, options):
    layer, x = layer_of(), torch.randn(14, K, requires_grad=True)
    options = {**options, "x_scale": x_scale_of(scheme)}
    quantized = QuantGroupedLinear.from_float(copy.deepcopy(layer), scheme, mode=mode, **options)
    linears = unfused(layer, scheme, mode=mode, **options)
    out, wanted = quantized(x, OFFSETS), expected(x, linears)
    assert_same_bits(out, wanted)
    grad = torch.randn(14, N)
    (grad_x,) = torch.autograd.grad(wanted, x, grad, retain_graph=True)
    wanted.backward(grad)
    x.grad = None
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad_x)
    for expert, linear in enumerate(linears):
        own = quantized.weight.grad.view(E, N, K)[expert]
        torch.testing.assert_close(own, torch.zeros(N, K) if linear.weight.grad is None else linear.weight.grad)
        torch.testing.assert_close(quantized.bias.grad[expert], linear.bias.grad)
    if (x_scale := quantized.x_scale) is not None and x_scale.requires_grad:
        each = [linear.x_scale.grad for linear in linears if linear.x_scale.grad is not None]
        torch.testing.assert_close(x_scale.grad, torch.stack(each).sum(dim=0))
        assert x_scale.grad != 0


def test_the_gradient_of_a_frozen_layer():
    layer, x = layer_of(), torch.randn(14, K, requires_grad=True)
    linears = unfused(layer, "w4a8-g32")
    grad = torch.randn(14, N)
    (wanted,) = torch.autograd.grad(expected(x, linears), x, grad)
    quantized = QuantGroupedLinear.from_float(layer, "w4a8-g32")
    quantized(x, OFFSETS).backward(grad)
    torch.testing.assert_close(x.grad, wanted)
    assert quantized.bias.grad.shape == (E, N)


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_a_state_dict_holds_one_static_scale_for_all_experts(mode):
    scale, x = x_scale_of("w8a8s"), torch.randn(14, K)
    quantized = QuantGroupedLinear.from_float(layer_of(), "w8a8s", mode=mode, x_scale=scale)
    state, other = quantized.state_dict(), QuantGroupedLinear(E, K, N, True, "w8a8s", mode=mode)
    assert_same_bits(state["x_scale"], scale)
    other.load_state_dict(state)
    assert_same_bits(other(x, OFFSETS), quantized(x, OFFSETS))
    assert_same_bits(copy.deepcopy(other).freeze_()(x, OFFSETS), quantized(x, OFFSETS))
    with pytest.raises(RuntimeError, match=r"x_scale must be torch.float32 of shape \[1\]"):
        other.load_state_dict({**state, "x_scale": torch.ones(E)})


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_state_dicts_hold_the_experts_one_after_the_other(mode):
    quantized = QuantGroupedLinear.from_float(layer_of(), "w8a8", mode=mode)
    state = quantized.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stored = {"weight": (E, N, K)} if mode == "qat" else {"qweight": (E, N, K), "scales": (E, N, 1)}
    assert shapes == {**stored, "bias": (E, N)}
    other = QuantGroupedLinear(E, K, N, True, "w8a8", mode=mode)
    x = torch.randn(14, K)
    assert not torch.equal(other(x, OFFSETS), quantized(x, OFFSETS))
    other.load_state_dict(state)
    assert_same_bits(other(x, OFFSETS), quantized(x, OFFSETS))
    assert_same_bits(quantized.freeze_()(x, OFFSETS), other(x, OFFSETS))
    if mode != "qat":
        with pytest.raises(RuntimeError, match=r"qweight must be torch.int8 of shape \[4, 24, 64\]"):
            other.load_state_dict({**state, "qweight": state["qweight"].flatten(0, 1)})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_float_layer_comes_back_as_its_model_holds_it(transposed, flat):
    layer = layer_of(transposed=transposed, flat=flat)
    adapter = adapter_of(layer)
    assert adapter.shape(layer) == (E, N, K)
    quantized = adapter.quantize(layer, "w8a8")
    vars(quantized).update(transposed=transposed, flat=flat)  # as a conversion copies them
    back = float_twin(quantized, nn.Parameter(quantized.dequantize()))
    assert back.weight.shape == layer.weight.shape and back.bias is layer.bias
    x = torch.randn(12, K)
    torch.testing.assert_close(back(x, OFFSETS), layer(x, OFFSETS), atol=0.2, rtol=0.1)
    empty = adapter.empty(layer, "w4a8-g32")
    assert empty.qweight.is_meta and empty.qweight.shape == (E, N, K // 2) and empty.bias.shape == (E, N)


def test_casts_and_copies_keep_the_integers():
    quantized = QuantGroupedLinear.from_float(layer_of(), "w4a8-g32")
    half = copy.deepcopy(quantized).to(torch.bfloat16)
    assert half.bias.dtype == half.compute_dtype == torch.bfloat16 and half.weight.dtype == torch.bfloat16
    assert_same_bits(half.qweight, quantized.qweight)
    assert_same_bits(half.scales, quantized.scales)
    assert quantized.weight.shape == (E, N, K) and "num_experts=4, in_features=64" in str(quantized)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(torch.randn(12, K), OFFSETS).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="x_scale is missing for w8a8s"):
        QuantGroupedLinear.from_float(layer_of(), "w8a8s")
    with pytest.raises(ValueError, match="scheme must have 8-bit weights"):
        QuantGroupedLinear(E, K, N, scheme="w4a8-g32", mode="int8")
    with pytest.raises(RuntimeError, match=r"input must have shape \[\.\.\., 64\]"):
        QuantGroupedLinear(E, K, N)(torch.randn(3, K + 1), OFFSETS)
    layer = layer_of()
    with torch.no_grad():
        layer.weight[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        QuantGroupedLinear.from_float(layer, "w8a8")
