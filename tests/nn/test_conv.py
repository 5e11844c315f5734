"""`QuantConv2d` and `QuantConv1d`: what torch's layers compute, in every mode, and what users do with them."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.nn.utils import prune

import qkernels as qk
from qkernels.autograd.conv import to_rows

# A layer and the shape of an input.
CASES = {
    "3x3": (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 9, 11)),
    "same": (lambda: nn.Conv2d(8, 6, (4, 3), padding="same", dilation=(1, 2), groups=2), (2, 8, 9, 7)),
    "valid": (lambda: nn.Conv2d(3, 8, 4, stride=4, padding="valid", bias=False), (1, 3, 16, 17)),
    "reflect": (lambda: nn.Conv2d(8, 8, 3, padding=(2, 1), padding_mode="reflect"), (2, 8, 6, 5)),
    "1x1": (lambda: nn.Conv2d(16, 32, 1, stride=2), (2, 16, 8, 8)),
    "1d": (lambda: nn.Conv1d(8, 12, 5, stride=2, padding=2), (3, 8, 40)),
    "circular": (lambda: nn.Conv1d(8, 12, 3, padding=1, groups=4, padding_mode="circular"), (2, 8, 10)),
}
KINDS = [("w8a8", "frozen"), ("w4a8-g32-asym", "qat"), ("w8a8", "int8"), ("w8a16", "qat"), ("w4a16-g64", "frozen")]


def quantized(conv, *args, **options):
    return (qk.QuantConv1d if isinstance(conv, nn.Conv1d) else qk.QuantConv2d).from_float(conv, *args, **options)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("grad_dtype", ["float", "int8"])
@pytest.mark.parametrize(("scheme", "mode"), KINDS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_dequantized_layer(case, scheme, mode, grad_dtype):
    torch.manual_seed(0)
    make, shape = CASES[case]
    conv, x = make(), torch.randn(shape)
    layer = quantized(copy.deepcopy(conv), scheme, mode=mode, grad_dtype=grad_dtype)
    with torch.no_grad():
        conv.weight.copy_(layer._from_rows(layer.dequantize()))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected, out = conv(inputs[0]), layer(inputs[1])
    assert out.dtype == expected.dtype
    assert relative(out, expected) < (1e-5 if "a16" in scheme else 0.02)
    grad = torch.randn_like(expected)
    expected.backward(grad), out.backward(grad)
    bound = 1e-5 if grad_dtype == "float" else 0.03
    assert relative(inputs[1].grad, inputs[0].grad) < bound
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, conv.bias.grad)
    if mode != "frozen":
        weight_grad = layer.weight.grad if mode == "qat" else layer._from_rows(layer.weight.grad)
        assert relative(weight_grad, conv.weight.grad) < (0.04 if "a8" in scheme else 1e-5)


def test_integer_gradient_of_an_image_of_more_pixels_than_an_integer_sum_takes():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 1)
    layer = quantized(conv, "w8a8", mode="qat", grad_dtype="int8")
    x, grad_out = torch.randn(1, 2, 512, 270), torch.randn(1, 3, 512, 270)
    layer(x).backward(grad_out)
    expected = torch.nn.grad.conv2d_weight(x, conv.weight.shape, grad_out)
    noise = (x.square().sum().sqrt() * grad_out.abs().max() / 127).item()
    assert (layer.weight.grad - expected).abs().max() < noise


def test_the_memory_format_of_the_input_is_kept():
    conv, x = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 9, 9)
    layer = quantized(conv, "w8a8")
    for image in (x, x.to(memory_format=torch.channels_last), x[0], x.bfloat16()):
        out, expected = layer(image), conv.to(image.dtype)(image)
        assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), image.dtype)
    assert_same_bits(layer(x.to(memory_format=torch.channels_last)).contiguous(), layer(x), "channels last")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_an_image_does_not_depend_on_its_batch():
    layer, x = quantized(nn.Conv2d(3, 70, 5, padding=2), "w4a8-g32"), torch.randn(5, 3, 33, 32)
    assert_same_bits(layer(x)[2:3], layer(x[2:3]), "alone")


@pytest.mark.parametrize(("scheme", "mode"), KINDS)
@pytest.mark.parametrize("case", ["3x3", "circular"])
def test_saving_copying_freezing_keep_the_bits(case, scheme, mode):
    make, shape = CASES[case]
    conv, x = make(), torch.randn(shape)
    layer = quantized(conv, scheme, mode=mode)
    out, other = layer(x), quantized(make(), scheme, mode=mode)
    names = {"weight"} if mode == "qat" else {"qweight", "scales"} | ({"zeros"} if "asym" in scheme else set())
    assert set(layer.state_dict()) == names | {"bias"}
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).freeze_()):
        assert_same_bits(twin(x), out, f"{twin}")
    frozen = copy.deepcopy(layer).freeze_()
    assert frozen.weight.shape == conv.weight.shape and frozen.weight.dtype == torch.float32
    assert relative(frozen.weight.clone(), conv.weight) < 0.2
    frozen.weight = frozen.weight
    with pytest.raises(RuntimeError, match="read-only"):
        frozen.weight.zero_()
    with pytest.raises(RuntimeError, match="qweight must be"):
        frozen.load_state_dict({**frozen.state_dict(), "qweight": torch.zeros(3, 3, dtype=torch.int8)})


def test_a_parent_that_multiplies_the_weight_gets_the_rounded_values():
    layer, x = quantized(nn.Conv2d(8, 16, 3), "w4a8-g32", mode="qat"), torch.randn(1, 8, 6, 6)
    expected = nn.functional.conv2d(x, layer._from_rows(layer.dequantize()))
    torch.testing.assert_close(nn.functional.conv2d(x, layer.weight), expected)
    nn.functional.conv2d(x, layer.weight).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    torch.testing.assert_close(nn.functional.conv2d(x, layer.freeze_().weight), expected)


def test_pruned_zeros_and_learned_scales_train():
    for options in ({"mode": "qat"}, {"mode": "qat", "weight_scale": "learned"}, {"mode": "int8"}):
        conv = prune.l1_unstructured(nn.Conv2d(8, 8, 3), "weight", 0.5)
        zeros = to_rows(conv.weight_mask) == 0
        layer = quantized(conv, "w8a8", **options)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(torch.randn(2, 8, 5, 5)).square().sum().backward()
        optimizer.step()
        layer(torch.randn(1, 8, 5, 5))
        integers = layer.freeze_().qweight.to(torch.int8)
        assert not integers[zeros].any() and integers[~zeros].any()


def test_a_model_of_convolutions_is_quantized_trained_frozen_and_put_back():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    x, target = torch.randn(16, 3, 12, 12), torch.arange(16) % 4
    report = qk.quantize_(model, "w8a8", "qat")
    assert [row.name for row in report.quantized] == ["0", "4", "7"]
    assert [row.reason.partition(":")[0] for row in report.left] == ["depthwise convolution"]
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    out = model.eval()(x)
    assert_same_bits(qk.freeze_(model)(x), out, "frozen")
    qk.dequantize_(model)
    assert type(model[0]) is nn.Conv2d and relative(model(x), out) < 0.05
    assert "w8a8" not in repr(model)


def test_activation_groups_and_other_layers_are_refused():
    left = qk.quantize_(nn.Sequential(nn.Conv2d(32, 8, 1), nn.Linear(8, 8)), "w8a8-ag32").left
    assert [row.reason for row in left] == [
        "convolution: w8a8-ag32 has activation groups, which a patch of pixels has not"
    ]
    with pytest.raises(ValueError, match="scheme must have no activation groups"):
        qk.QuantConv2d(3, 8, 3, scheme="w8a8-ag32")
    with pytest.raises(TypeError, match=r"layer must be an nn\.Conv2d, got Conv1d"):
        qk.QuantConv2d.from_float(nn.Conv1d(2, 2, 1), "w8a8")
    with pytest.raises(RuntimeError, match=r"input must have shape \[N, 3, H, W\], got \[2, 4, 8, 8\]"):
        qk.QuantConv2d(3, 8, 3)(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match="NaN or Inf"):
        conv = nn.Conv2d(3, 4, 3)
        conv.weight.data[0, 0, 0, 0] = torch.nan
        qk.QuantConv2d.from_float(conv, "w8a8")


@pytest.mark.parametrize(("mode", "weight_scale"), [("frozen", "absmax"), ("qat", "learned"), ("int8", "absmax")])
def test_static_activations(mode, weight_scale):
    """One given scale for all images: what is larger is clamped, an image of NaN alone is NaN."""
    torch.manual_seed(0)
    conv, x, x_scale = nn.Conv2d(8, 16, 3, padding=1), torch.randn(3, 8, 7, 7), torch.tensor([0.015])
    layer = quantized(copy.deepcopy(conv), "w8a8s", mode=mode, weight_scale=weight_scale, x_scale=x_scale)
    with torch.no_grad():
        conv.weight.copy_(layer._from_rows(layer.dequantize()))
    clamped = (x / x_scale).round().clamp(-127, 127) * x_scale
    assert relative(layer(x), conv(clamped)) < 1e-5 < relative(layer(x), conv(x))
    loaded = quantized(nn.Conv2d(8, 16, 3, padding=1), "w8a8s", mode=mode, x_scale=torch.ones(1))
    loaded.load_state_dict(layer.state_dict(), strict=weight_scale != "learned")
    assert torch.equal(loaded.x_scale, x_scale)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert ((x.grad == 0) == (x.abs() > 127.5 * x_scale)).all() if weight_scale == "learned" else (x.grad != 0).all()
    if weight_scale == "learned":
        assert layer.x_scale.grad.isfinite().all() and layer.x_scale.grad != 0
    broken = x.detach().clone()
    broken[1, 0, 0, 0] = torch.inf
    assert layer(broken).isnan().flatten(1).all(dim=1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="x_scale"):
        quantized(conv, "w8a8s")


def test_transforms_export_and_second_derivatives():
    torch.manual_seed(0)
    layer, x = quantized(nn.Conv2d(4, 8, 3, padding=1), "w8a8", mode="qat"), torch.randn(2, 4, 6, 6)
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    expected = nn.functional.conv2d(torch.ones_like(x), layer._from_rows(layer.dequantize()), None, padding=1)
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()
    layer.freeze_()
    program = torch.export.export(layer, (x.detach(),))
    assert_same_bits(program.module()(x.detach()), layer(x.detach()), "export")


def test_convolutions_of_one_weight_share_it_on_both_ways():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    qk.quantize_(model, "w8a8", embeddings=True)
    assert model[1].qweight is model[0].qweight
    qk.dequantize_(model)
    assert model[1].weight is model[0].weight and model[1].bias is not model[0].bias


@pytest.mark.parametrize(("options", "what"), [({"calibration": [torch.zeros(1, 4, 5, 5)]}, "rounded to nearest"),
                                               ({"never_slower": True}, "not timed")])  # fmt: skip
def test_what_passes_over_convolutions_says_so(options, what):
    with pytest.warns(UserWarning, match=f"convolutions and experts are .*{what}"):
        qk.quantize_(nn.Sequential(nn.Conv2d(4, 4, 3)), "w4a8-g32", **options)
