"""Layers with a float weight that is quantized in each forward: their state, and where training starts from."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk
from qkernels import QuantLinear, quantize_weight
from qkernels.kernels import ops

N, K = 33, 130
SCHEME = "w4a8-g32"


def float_layer() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(K, N)


def test_state_dict_is_that_of_a_linear():
    linear = float_layer()
    layer = QuantLinear.from_float(linear, SCHEME, mode="qat")
    assert layer.weight is linear.weight
    assert list(layer.state_dict()) == ["weight", "bias"]
    nn.Linear(K, N).load_state_dict(layer.state_dict())
    assert layer.storage_bytes() == 4 * N * K


def test_new_layer_is_initialized_like_a_linear():
    torch.manual_seed(2)
    layer = QuantLinear(K, N, scheme="w8a8", mode="qat")
    torch.manual_seed(2)
    linear = nn.Linear(K, N)
    assert_same_bits(layer.weight.detach(), linear.weight.detach())
    assert_same_bits(layer.bias.detach(), linear.bias.detach())


def test_non_finite_weight_is_an_error():
    layer = QuantLinear.from_float(float_layer(), SCHEME, mode="qat")
    with torch.no_grad():
        layer.weight[3, 4] = torch.nan
    with pytest.raises(RuntimeError, match="weight must be finite"):
        layer(torch.randn(2, K))
    with pytest.raises(RuntimeError, match="weight must be finite"):
        layer.freeze_()
    assert layer.mode == "qat" and layer.weight is not None


@pytest.mark.parametrize("weight_scale", ["absmax", "learned"])
def test_set_weight_makes_its_values_the_float_weight(weight_scale):
    linear = float_layer()
    layer = QuantLinear.from_float(linear, SCHEME, mode="qat", weight_scale=weight_scale)
    before = linear.weight.detach().clone()
    weight = quantize_weight(torch.randn(N, K), SCHEME)
    layer.set_weight(weight)
    expected = ops.dequantize_weight(*weight, K, SCHEME)
    assert_same_bits(layer.weight.detach(), expected)
    assert layer.weight.requires_grad and layer.weight is not linear.weight
    assert_same_bits(linear.weight.detach(), before)
    assert_same_bits(layer.quantized_weight().qweight, weight.qweight)
    if weight_scale == "learned":
        assert layer.scales.requires_grad
        assert_same_bits(layer.scales.detach(), weight.scales)


def test_calibrated_training_starts_from_the_calibrated_weight():
    torch.manual_seed(7)
    linear, inputs = float_layer(), torch.randn(200, 4) @ torch.randn(4, K)
    frozen, trained = nn.Sequential(copy.deepcopy(linear)), nn.Sequential(copy.deepcopy(linear))
    qk.quantize_(frozen, SCHEME, calibration=[inputs])
    report = qk.quantize_(trained, SCHEME, "qat", weight_scale="learned", calibration=[inputs])
    assert_same_bits(trained[0].quantized_weight().qweight, frozen[0].qweight)
    assert_same_bits(trained(inputs).detach(), frozen(inputs).detach())
    assert report.rows[0].weight_error > 0
    trained(inputs).square().sum().backward()
    assert trained[0].weight.grad.any() and trained[0].scales.grad.any()


def test_dtype_moves():
    layer = QuantLinear.from_float(float_layer(), SCHEME, mode="qat").bfloat16()
    assert layer.weight.dtype == layer.compute_dtype == torch.bfloat16
    assert layer(torch.randn(3, K).bfloat16()).dtype == torch.bfloat16
