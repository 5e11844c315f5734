"""`QuantLinear` in use: outputs, gradients, shapes, dtypes, autocast, training loops."""

import copy

import numpy as np
import pytest
import reference_ops
import torch
from helpers import UNIT_ROUNDOFF, assert_same_bits, assert_within_float_bound, gamma
from op_samples import FLOAT_SCHEMES, SCHEMES, x_scale_of
from tiers import tiered
from torch import nn
from torch.utils.checkpoint import checkpoint

from qkernels import QuantLinear, QuantScheme, quantize_weight
from qkernels.kernels import isa
from qkernels.nn.linear import relative_error

K, N = 70, 19
# One of each class: weight bits x grouping x activations.
CLASSES = ["w8a8", "w8a16-g32", "w8a8-g64-ag32", "w4a8", "w4a8-g32-asym", "w4a16-asym", "w4a8-asym-ag64", "w8a8s"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(scheme: str, in_features: int = K, out_features: int = N, bias: bool = True, dtype=torch.float32):
    torch.manual_seed(1)
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    return QuantLinear.from_float(linear, scheme, x_scale=x_scale_of(scheme))


def reference_output(layer: QuantLinear, x: torch.Tensor, out_dtype=None) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    weight = (layer.qweight, layer.scales, layer.zeros, layer.bias)
    out = reference_ops.linear(flat, *weight, layer.scheme.name, out_dtype or x.dtype, layer.x_scale)
    return out.reshape(*x.shape[:-1], layer.out_features)


def assert_output(layer: QuantLinear, out: torch.Tensor, x: torch.Tensor) -> None:
    """Equal bits for integer activations, the bound of a float sum otherwise."""
    if layer.scheme.int_activations:
        assert_same_bits(out, reference_output(layer, x, out.dtype), str(layer.scheme))
    else:
        rows, bias = x.detach().reshape(-1, layer.in_features), layer.bias
        bias = None if bias is None else bias.detach().double()
        assert_within_float_bound(out.detach().reshape(-1, layer.out_features), rows, weight_of(layer), bias)


def weight_of(layer: QuantLinear) -> torch.Tensor:
    return layer.dequantize().double()


def assert_gradient(layer: QuantLinear, gradient: torch.Tensor, grad_out: torch.Tensor) -> None:
    rows = grad_out.reshape(-1, layer.out_features)
    assert_within_float_bound(gradient.reshape(-1, layer.in_features), rows, weight_of(layer).t(), gradient=True)


@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_from_float(scheme):
    linear = nn.Linear(K, N).eval()
    layer = QuantLinear.from_float(linear, scheme, x_scale=x_scale_of(scheme))
    assert isinstance(layer, nn.Linear) and "weight" not in layer._parameters and not layer.training
    assert layer.bias is linear.bias and layer.bias.requires_grad
    assert (layer.in_features, layer.out_features, layer.compute_dtype) == (K, N, torch.float32)
    for name, tensor in quantize_weight(linear.weight, scheme)._asdict().items():
        stored = getattr(layer, name)
        assert (stored is None) == (tensor is None)
        if tensor is not None:
            assert_same_bits(stored, tensor)
            assert isinstance(stored, nn.Parameter) and not stored.requires_grad and type(stored.data) is torch.Tensor
    stored = [name for name in layer.state_dict() if name not in ("bias", "x_scale")]
    assert layer.storage_bytes() == sum(getattr(layer, name).nbytes for name in stored)
    x = torch.randn(5, K)
    assert_output(layer, layer(x), x)


@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_gradients(scheme):
    layer = layer_of(scheme)
    x = torch.randn(3, 4, K, requires_grad=True)
    grad_out = torch.randn(3, 4, N)
    out = layer(x)
    out.backward(grad_out)
    assert_output(layer, out, x)
    assert_gradient(layer, x.grad, grad_out)
    exact = grad_out.double().sum((0, 1))
    assert ((layer.bias.grad - exact).abs() <= gamma(12) * grad_out.double().abs().sum((0, 1))).all()
    assert layer.qweight.grad is None and layer.scales.grad is None


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w8a8-g32-ag64", "w4a16-g64"])
def test_gradients_are_straight_through_in_float64(scheme):
    """Autograd through a fake quantization in float64, whose rounding passes gradients on, gives the same."""
    layer = layer_of(scheme)
    x = torch.randn(6, K)
    x64, bias = x.double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    fake = x64
    if layer.scheme.int_activations:
        q, scales = reference_ops.quantize_activation(x, scheme)
        size = layer.scheme.act_group_size or K
        restored = q.double() * scales.double().repeat_interleave(size, dim=1)[:, :K]
        fake = x64 + (restored - x64).detach()
    target = torch.randn(6, N, dtype=torch.float64)
    out64 = fake @ weight_of(layer).t() + bias
    (out64 * target).sum().backward()

    x.requires_grad_()
    out = layer(x)
    (out * target.float()).sum().backward()
    assert_gradient(layer, x.grad, target.float())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad.double(), bias.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.double(), out64, rtol=1e-4, atol=1e-5)


SHAPES = [(K,), (1, K), (0, K), (2, 0, K), (3, 2, K), (2, 1, 3, K), (2, 2, 1, 3, K), (7, K)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", CLASSES)
def test_leading_shapes(scheme, shape):
    layer = layer_of(scheme)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], N) and out.dtype == torch.float32
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    assert x.grad.shape == shape
    if x.numel():
        assert_output(layer, out, x)
        assert_gradient(layer, x.grad, grad_out)
    else:
        assert_same_bits(layer.bias.grad, torch.zeros(N))


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (1, 5), (5, 1), (2, 3), (33, 2), (129, 17)])
@pytest.mark.parametrize("scheme", CLASSES)
def test_small_layers(scheme, in_features, out_features):
    layer = layer_of(scheme, in_features, out_features, bias=False)
    x = torch.randn(4, in_features, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert_output(layer, out, x)
    assert_gradient(layer, x.grad, torch.ones(4, out_features))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w4a16-g32"])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[:, ::2],
        lambda t: t[1:, 1:],
        lambda t: t[:1].expand(5, -1, -1),
        lambda t: t.flip(0),
        lambda t: t.permute(1, 0, 2)[None, :, None],
        lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    ],
)
def test_strided_inputs_and_gradients(scheme, view):
    layer = layer_of(scheme)
    base = torch.randn(4, 6, K, requires_grad=True)
    x = view(base)
    x.retain_grad()
    out = layer(x)
    grad_out = view(torch.randn(4, 6, N))
    assert grad_out.shape == out.shape
    out.backward(grad_out)
    assert_output(layer, out, x)
    assert_gradient(layer, x.grad, grad_out)


def test_expanded_gradient():
    """`sum().backward()` hands down a gradient whose strides are all 0."""
    layer = layer_of("w8a8")
    x = torch.randn(5, K, requires_grad=True)
    layer(x).sum().backward()
    assert_gradient(layer, x.grad, torch.ones(5, N))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("layer_dtype", FLOATS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32-asym"])
def test_dtypes(scheme, layer_dtype, x_dtype):
    layer = layer_of(scheme, dtype=layer_dtype)
    assert layer.compute_dtype == layer_dtype and layer.scales.dtype == torch.float32
    x = torch.randn(5, K, dtype=x_dtype, requires_grad=True)
    out = layer(x)
    assert out.dtype == x_dtype
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    assert x.grad.dtype == x_dtype and layer.bias.grad.dtype == layer_dtype
    assert_output(layer, out, x)
    assert_gradient(layer, x.grad, grad_out)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym-ag32", "w8a16"])
def test_autocast(scheme, x_dtype, autocast_dtype, enabled):
    layer = layer_of(scheme)
    x = torch.randn(5, K, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=autocast_dtype, enabled=enabled):
        out = layer(x)
    assert out.dtype == (autocast_dtype if enabled else x_dtype)
    assert_output(layer, out, x)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    assert x.grad.dtype == x_dtype and layer.bias.grad.dtype == torch.float32
    assert_gradient(layer, x.grad, grad_out)


@pytest.mark.parametrize("scheme", CLASSES)
def test_gradient_under_autocast_is_a_bfloat16_product(scheme):
    """A float32 x shows the gradient before it is rounded: that of the weight rounded to bfloat16."""
    layer, x = layer_of(scheme), torch.randn(9, K, requires_grad=True)
    with isa.force("scalar"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        grad_out = torch.randn_like(out)
        out.backward(grad_out)
    assert x.grad.dtype == torch.float32 and grad_out.dtype == torch.bfloat16
    rounded = layer.dequantize().bfloat16().double()
    assert_within_float_bound(x.grad, grad_out.float(), rounded.t())


@pytest.mark.parametrize("scheme", CLASSES)
def test_inference(scheme):
    layer, x = layer_of(scheme), torch.randn(5, K)
    expected = layer(x).detach()
    with torch.no_grad():
        out = layer(x.requires_grad_())
        assert not out.requires_grad
        assert_same_bits(out, expected)
    with torch.inference_mode():
        out = layer(x)
        assert out.is_inference()
        assert_same_bits(out.clone(), expected)
    created = torch.inference_mode()(lambda: torch.ones(2, K))()
    assert_same_bits(layer.requires_grad_(False)(created).clone(), layer(torch.ones(2, K)))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w4a16"])
def test_only_asked_gradients_exist(scheme):
    layer = layer_of(scheme)
    x = torch.randn(5, K)
    layer(x).sum().backward()  # trainable bias, frozen weight, constant input
    assert layer.bias.grad is not None
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_backward_keeps_no_activation():
    layer = layer_of("w8a8")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(500, K, requires_grad=True))
    assert {t.data_ptr() for t in saved} <= {layer.qweight.data_ptr(), layer.scales.data_ptr()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w4a16-g32"])
def test_checkpointing(scheme, reentrant):
    model = nn.Sequential(layer_of(scheme), nn.GELU(), layer_of(scheme, N, K))
    x = torch.randn(5, K, requires_grad=True)
    model(x).pow(2).sum().backward()
    expected, x.grad = x.grad, None
    expected_bias, model[0].bias.grad = model[0].bias.grad, None
    with torch.autocast("cpu", enabled=False):
        checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert_same_bits(x.grad, expected)
    assert_same_bits(model[0].bias.grad, expected_bias)


def test_gradient_accumulation():
    layer = layer_of("w4a8-g32")
    x = torch.randn(6, K, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    once = torch.autograd.grad(layer(x).sum(), (x, layer.bias))
    assert_same_bits(x.grad, 2 * once[0])
    assert_same_bits(layer.bias.grad, 2 * once[1])


def test_layer_used_twice():
    layer = layer_of("w8a8", K, K)
    x = torch.randn(3, K, requires_grad=True)
    out = layer(layer(x))
    out.backward(torch.ones(3, K))
    middle = torch.ones(3, K).double() @ weight_of(layer)
    torch.testing.assert_close(x.grad.double(), middle @ weight_of(layer), rtol=1e-4, atol=1e-5)


def test_double_backward_is_refused():
    layer = layer_of("w8a8")
    x = torch.randn(3, K, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_training_an_adapter_lowers_the_loss_and_leaves_the_weight():
    base = layer_of("w4a8-g32-asym")
    before = copy.deepcopy(base.state_dict())
    adapter = nn.Linear(K, N, bias=False)
    nn.init.zeros_(adapter.weight)
    parameters = [*adapter.parameters(), base.bias]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x, target = torch.randn(64, K), torch.randn(64, N)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (base(x) + adapter(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for name in ("qweight", "scales", "zeros"):
        assert_same_bits(base.state_dict()[name], before[name])
    assert not torch.equal(base.bias, before["bias"])


def test_optimizer_over_all_parameters_skips_the_frozen_ones():
    layer = layer_of("w8a8")
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(torch.randn(4, K)).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert_same_bits(layer.qweight, before["qweight"])
    assert_same_bits(layer.scales, before["scales"])


def test_integers_cannot_require_gradients():
    """torch says so; the layer works on, and its bias can be made trainable."""
    layer = layer_of("w8a8").requires_grad_(False)
    with pytest.raises(RuntimeError, match="floating point dtype can require gradients"):
        layer.requires_grad_(True)
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, K)).sum().backward()
    assert layer.bias.grad is not None and not layer.qweight.requires_grad


@pytest.mark.parametrize("scheme", CLASSES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_rows_stay_alone(scheme, value):
    layer, x = layer_of(scheme), torch.randn(2, 3, K)
    clean = layer(x)
    broken = x.clone()
    broken[1, 0, K // 2] = value
    out = layer(broken)
    assert not out[1, 0].isfinite().any()
    if layer.scheme.int_activations:
        assert out[1, 0].isnan().all()
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 0] = False
    assert_same_bits(out[keep], clean[keep])


@pytest.mark.parametrize("scheme", tiered(FLOAT_SCHEMES))
def test_relative_error(scheme):
    linear = nn.Linear(256, 64)
    layer = QuantLinear.from_float(linear, scheme)
    expected = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert relative_error(linear.weight.detach(), layer) == pytest.approx(expected.item(), rel=1e-5)
    # Uniform weights: a step of range / levels, an error of step / sqrt(12).
    levels = {8: 254, 4: 15}[QuantScheme.parse(scheme).weight_bits]
    assert expected < 1.3 / levels


def test_output_is_rounded_once():
    """bfloat16 output is the float32 output rounded, bias included: not a rounded product plus bias."""
    layer = layer_of("w8a8")
    x = torch.randn(64, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert_same_bits(out, layer(x).to(torch.bfloat16))
    assert UNIT_ROUNDOFF == np.finfo(np.float32).eps / 2


@pytest.mark.parametrize("shape", [(), (K + 1,), (2, K - 1), (0,), (2, 1)], ids=str)
def test_wrong_input_shape(shape):
    with pytest.raises(RuntimeError, match=rf"input must have shape \[\.\.\., {K}\], got"):
        layer_of("w8a8")(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64])
def test_wrong_input_dtype(dtype):
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, got"):
        layer_of("w8a8")(torch.ones(2, K).to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "w8a9"}, "unknown scheme 'w8a9'; did you mean"),
        ({"mode": "train"}, r"mode must be one of \('frozen', 'qat', 'int8'\), got 'train'"),
        ({"grad_dtype": "int4"}, r"grad_dtype must be one of \('float', 'int8'\), got 'int4'"),
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
        ({"in_features": 131073}, "in_features must be at most 131072 for w8a8 .* use a w8a16 scheme"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"dtype": torch.int8}, "dtype must be float32, bfloat16 or float16, got torch.int8"),
    ],
)
def test_wrong_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantLinear(**{"in_features": 4, "out_features": 3, "device": "meta", **arguments})


@pytest.mark.parametrize(
    "wrong", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.Bilinear(4, 4, 4), nn.Sequential(), nn.Identity(), None]
)
def test_from_float_refuses_other_modules(wrong):
    with pytest.raises(TypeError, match=r"layer must be .* a transformers Conv1D or a layer with an adapter, got"):
        QuantLinear.from_float(wrong, "w8a8")


def test_from_float_refuses_a_quantized_layer():
    with pytest.raises(TypeError, match="got QuantLinear"):
        QuantLinear.from_float(layer_of("w8a8"), "w8a8")


@pytest.mark.parametrize("scheme", CLASSES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_from_float_refuses_non_finite_weights(scheme, value):
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight[3, 4] = value
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match="weight must be finite"):
        QuantLinear.from_float(linear, scheme, x_scale=x_scale_of(scheme))
    assert_same_bits(linear.weight.detach(), before)


@pytest.mark.parametrize("scheme", tiered(SCHEMES))
def test_a_fresh_layer_is_zero(scheme):
    layer = QuantLinear(5, 3, scheme=scheme)
    assert_same_bits(layer.dequantize().abs(), torch.zeros(3, 5))
    assert_same_bits(layer(torch.randn(2, 5)).abs(), torch.zeros(2, 3))
    layer = layer_of(scheme, 5, 3)
    layer.reset_parameters()
    assert not layer.dequantize().any() and not layer.bias.any()


def test_repr():
    layer = layer_of("w4a8-g32-asym", bias=False)
    assert repr(layer) == (
        f"QuantLinear(in_features={K}, out_features={N}, bias=False, scheme=w4a8-g32-asym, mode=frozen, "
        "grad_dtype=float)"
    )
