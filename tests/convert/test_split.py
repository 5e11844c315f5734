"""Layers of several weights: split when one is quantized, a row for each, and joined again."""

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk
from qkernels.nn.adapters import _ADAPTERS, CompositeAdapter, SplitLayer

K = 32


class Gated(nn.Module):
    """Somebody's layer of two matrices and a bias: tanh(x @ up.T + up_bias) @ down, and a norm."""

    def __init__(self, features: int = K) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2 * features, features) / features**0.5)
        self.up_bias = nn.Parameter(torch.randn(2 * features))
        self.down = nn.Parameter(torch.randn(features, 2 * features) / features**0.5)
        self.norm = nn.LayerNorm(features)
        self.label = "mine"

    def forward(self, x):
        return self.norm(torch.tanh(x @ self.up.T + self.up_bias) @ self.down.T)


class SplitGated(SplitLayer):
    def forward(self, x):
        return self.norm(self.down(torch.tanh(self.up(x))))


def _linear(weight, bias=None) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight, layer.bias = weight, bias
    return layer


class GatedAdapter(CompositeAdapter):
    def split(self, layer):
        twin = SplitGated()
        twin.up, twin.down = _linear(layer.up, layer.up_bias), _linear(layer.down)
        twin.norm = layer.norm
        return twin

    def join(self, twin, float_type):
        layer = float_type.__new__(float_type)
        nn.Module.__init__(layer)
        layer.up, layer.up_bias, layer.down = twin.up.weight, twin.up.bias, twin.down.weight
        layer.norm = twin.norm
        return layer


@pytest.fixture(autouse=True)
def registered():
    """The class is known for a test, and nothing of it is left afterwards."""
    before = dict(_ADAPTERS)
    qk.register_adapter(Gated, GatedAdapter())
    yield
    _ADAPTERS.clear()
    _ADAPTERS.update(before)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, K), Gated()).requires_grad_(True)


def test_each_weight_has_its_row_with_bytes_and_error():
    model = model_of()
    report = qk.quantize_(model, "w8a8", strict=True)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["0", "1.up", "1.down"] and report.quantized_share == 1
    assert (rows["1.up"].kind, rows["1.up"].shape) == ("Gated", (2 * K, K))
    assert (rows["1.down"].bytes_before, rows["1.down"].bytes_after) == (4 * 2 * K * K, 2 * K * K + 4 * K)
    assert all(0 < row.weight_error < 0.02 for row in report.rows)
    assert isinstance(model[1], SplitGated) and isinstance(model[1].up, qk.QuantLinear)
    assert model[1].label == "mine"


def test_it_computes_what_linear_layers_compute():
    model = model_of()
    wanted = SimpleNamespace(up=_linear(model[1].up, model[1].up_bias), down=_linear(model[1].down))
    up, down = (qk.QuantLinear.from_float(layer, "w4a8-g32") for layer in (wanted.up, wanted.down))
    x = torch.randn(3, K)
    expected = model[1].norm(down(torch.tanh(up(x))))
    qk.quantize_(model, "w4a8-g32")
    assert_same_bits(model[1](x), expected)


@pytest.mark.parametrize(
    "patterns, left",
    [
        ({"skip": ["1.down"]}, ["1.down"]),
        ({"skip": ["up"]}, ["1.up"]),
        ({"include": ["1"]}, ["0"]),
        ({"skip": ["1"]}, ["1.up", "1.down"]),
    ],
)
def test_patterns_match_the_layer_and_its_parameters(patterns, left):
    model = model_of()
    report = qk.quantize_(model, "w8a8", strict=True, **patterns)
    assert [row.name for row in report.left] == left
    assert isinstance(model[1], Gated) == (len(left) == 2)
    x = torch.randn(3, K)
    torch.testing.assert_close(model(x), model_of()(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_there_and_back(mode):
    model, x = model_of().eval(), torch.randn(3, K)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    bias, norm = model[1].up_bias, model[1].norm
    before = model(x)
    qk.quantize_(model, "w8a8", mode)
    assert not model[1].training and not model[1].up.training
    torch.testing.assert_close(model(x), before, atol=0.1, rtol=0.1)
    assert set(model.state_dict()) >= {"1.up.bias", "1.norm.weight"}
    qk.dequantize_(qk.freeze_(model))
    assert type(model[1]) is Gated and model[1].up_bias is bias and model[1].norm is norm
    assert model[1].label == "mine" and not model[1].training and "float_type" not in vars(model[1])
    torch.testing.assert_close(model(x), before, atol=0.1, rtol=0.1)
    assert len(calls) == 3


def test_nothing_is_split_before_all_is_checked():
    model = model_of()
    with torch.no_grad():
        model[1].down[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"weight of '1.down' must be finite.*nothing was changed"):
        qk.quantize_(model, "w8a8")
    assert type(model[1]) is Gated
    with torch.device("meta"):
        report = qk.quantize_(nn.Sequential(Gated()), "w8a8", strict=True)
    assert {row.note for row in report.rows} == {"without values: on the meta device"}
    with pytest.raises(TypeError, match="model is itself a Gated"):
        qk.quantize_(Gated(), "w8a8")


def test_a_layer_that_computes_something_else_stays():
    class Other(Gated):
        def forward(self, x):
            return super().forward(x) + 1

    for layer in (Other(), Gated()):
        if type(layer) is Gated:
            layer.forward = lambda x: x
        report = qk.quantize_(nn.Sequential(nn.Linear(K, K), layer), "w8a8")
        assert [row.name for row in report.left] == ["1.up", "1.down"]
        assert {row.reason for row in report.left} <= {
            "Other is a subclass of Gated: its forward may compute something else",
            "forward is replaced on the instance",
        }


def test_a_weight_that_is_tied_stays():
    model = model_of()
    model[0].weight = nn.Parameter(torch.randn(2 * K, K))
    model[1].up = model[0].weight
    report = qk.quantize_(model, "w8a8")
    assert {row.name: row.reason for row in report.left} == {"0": "tied to 1", "1.up": "tied to 0"}
    assert model[0].weight is model[1].up.weight


def test_a_layer_in_two_places_is_split_once():
    layer = Gated()
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = qk.quantize_(model, "w8a8", strict=True)
    assert [row.name for row in report.rows] == ["a.up", "a.down"] and model["a"] is model["b"]
    qk.dequantize_(model)
    assert type(model["a"]) is Gated and model["a"] is model["b"]
