"""Layers of weights with a float minimum per group (`-min`): what they compute, hold, save, refuse."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qkernels as qk
from qkernels.formats.storage import QuantizedWeight
from qkernels.nn.stored_parameter import StoredParameter

SCHEMES = ["w4a8-g32-min", "w8a8-min", "w4a16-g32-min", "w8a8-g16-min-ag32"]
K, N = 70, 19


def layer_of(scheme: str, **options) -> qk.QuantLinear:
    torch.manual_seed(0)
    return qk.QuantLinear.from_float(nn.Linear(K, N), scheme, **options)


@pytest.mark.parametrize("scheme", ["w4a16-g32-min", "w4a8-g32-min"])
def test_storage_can_be_read_by_hand(scheme):
    """What an importer of Q4_1 or MLX has: nibbles, scales and offsets."""
    layer = qk.QuantLinear(3, 1, scheme=scheme, bias=False)
    layer.set_weight(
        QuantizedWeight(torch.tensor([[0xF0, 0x07]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[-1.25]]))
    )
    assert torch.equal(layer.dequantize(), torch.tensor([[-1.25, 6.25, 2.25]]))
    torch.testing.assert_close(layer(torch.eye(3)).flatten(), layer.dequantize()[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_minima_are_shown_as_floats_and_held_as_bits(scheme):
    layer, x = layer_of(scheme), torch.randn(5, K)
    held = layer._parameters["zeros"]
    assert type(held) is StoredParameter and held.dtype == torch.int32
    assert layer.zeros.dtype == layer.state_dict()["zeros"].dtype == torch.float32
    assert_same_bits(held.data.view(torch.float32), layer.quantized_weight().zeros)
    expected = layer(x)
    cast = copy.deepcopy(layer).half()
    assert_same_bits(cast.dequantize(), layer.dequantize())
    for average in (None, get_ema_multi_avg_fn(0.9)):
        averaged = AveragedModel(layer, multi_avg_fn=average)
        for _ in range(3):
            averaged.update_parameters(layer)
        assert_same_bits(averaged.module(x), expected)
    with torch.no_grad():
        layer.zeros += 1.0  # a view of the parameter
    assert_same_bits(layer.dequantize(), qk.dequantize_weight(*layer.quantized_weight(), K, scheme))
    assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grad_dtype", ["float", "int8"])
def test_gradients(scheme, grad_dtype):
    """Against float64, of the dequantized weight; an int8 gradient in the mean."""
    layer, exact = layer_of(scheme, grad_dtype=grad_dtype), layer_of(scheme).dequantize().double()
    x, grad_out = torch.randn(9, K, requires_grad=True), torch.randn(9, N)
    count = 1 if grad_dtype == "float" else 64
    draws = torch.stack([torch.autograd.grad(layer(x), x, grad_out)[0] for _ in range(count)])
    error = (draws.double().mean(0) - grad_out.double() @ exact).norm() / (grad_out.double() @ exact).norm()
    assert error < (1e-6 if grad_dtype == "float" else 6e-3)


def test_column_scales_follow_a_weight_without_groups():
    layer = layer_of("w8a8-min", grad_dtype="int8")
    assert layer.column_scales.shape == (K,)
    before = layer.column_scales.clone()
    with torch.no_grad():
        layer.zeros += 1.0
    x = torch.randn(2, K, requires_grad=True)
    layer(x).sum().backward()
    assert (layer.column_scales > before).all()


def test_training_modes_are_refused_and_nothing_changes():
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 3))
    with pytest.raises(
        ValueError, match="no minima for mode='qat', got w4a8-g32-min; train w4a8-g32-asym, or adapters"
    ):
        qk.quantize_(model, "w4a8-g32-min", mode="qat")
    with pytest.raises(ValueError, match="8-bit weights with one scale a row for mode='int8', got w8a8-min"):
        qk.quantize_(model, "w8a8-min", mode="int8")
    assert all(type(layer) is nn.Linear for layer in model)
    with pytest.raises(ValueError, match="one scale a row for mode='int8'"):
        layer_of("w8a8-min").thaw_int8_()


@pytest.mark.parametrize("scheme", ["w4a8-g32-min", "w4a16-g32-min"])
def test_convolutions_and_embeddings(scheme):
    float_conv, images = nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, 7, 7)
    conv = qk.QuantConv2d.from_float(float_conv, scheme)
    whole = nn.functional.conv2d(images, conv.weight.dequantize(), conv.bias, padding=1)
    torch.testing.assert_close(conv(images), whole, rtol=0, atol=0.02 * whole.abs().max().item())
    embedding = qk.QuantEmbedding.from_float(nn.Embedding(11, K), scheme)
    assert_same_bits(embedding(torch.tensor([3, 5])), embedding.dequantize()[[3, 5]])


def test_rows_with_infinities_of_bfloat16():
    """Inf times a code and Inf times a minimum may cancel, where Inf times the weight does not."""
    layer = layer_of("w8a16-min").bfloat16()
    x = torch.randn(16, K, dtype=torch.bfloat16)
    x[3, 5], x[7, 0] = torch.inf, torch.nan
    out, expected = layer(x), x.float() @ layer.dequantize().t()
    assert torch.equal(out[3].isinf(), expected[3].isinf()) and torch.equal(out[3] > 0, expected[3] > 0)
    assert out[7].isnan().all() and out[[0, 1, 2, 4, 5, 6, 8]].isfinite().all()
