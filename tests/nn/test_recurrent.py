"""Quantized recurrent layers compute what torch's do, with quantized products."""

import copy
import itertools

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import qkernels as qk
from qkernels.nn.recurrent import RecurrentAdapter

IN, HIDDEN, STEPS, BATCH = 6, 9, 7, 4

LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="tanh", **options),
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
OPTIONS = [
    {},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True, "bidirectional": True, "bias": False},
]


def equal(actual, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    elif expected is not None:
        assert type(actual) is type(expected)
        for one, other in zip(actual, expected, strict=True):
            equal(one, other)


def sequences(batch_first):
    """Inputs of all forms, with the batch that the state has."""
    x = torch.randn(BATCH, STEPS, IN)
    yield x if batch_first else x.transpose(0, 1), [BATCH]
    yield torch.randn(STEPS, IN), []
    for lengths in ([3, 7, 1, 5], [7, 5, 3, 3]):
        ordered = lengths == sorted(lengths, reverse=True)
        yield pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=ordered), [BATCH]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", [*LAYERS, "projected"])
def test_inputs_and_states_of_all_forms(kind):
    """The twin, in float still, against the layer."""
    for options in OPTIONS:
        torch.manual_seed(0)
        own = {"proj_size": 5} if kind == "projected" else {}
        layer = LAYERS["lstm" if own else kind](IN, HIDDEN, **options, **own)
        twin = RecurrentAdapter().split(layer)
        assert isinstance(twin, type(layer))
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        for x, batch in sequences(layer.batch_first):
            hx = torch.randn(rows, *batch, layer.proj_size or HIDDEN)
            hx = (hx, torch.randn(rows, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else hx
            for state in (None, hx):
                equal(twin(x, state), layer(x, state))
        joined = RecurrentAdapter().join(twin, type(layer))
        assert list(joined.state_dict()) == list(layer.state_dict()) and repr(joined) == repr(layer)
        equal(joined(x, hx), layer(x, hx))


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    for bias, x in itertools.product((True, False), (torch.randn(BATCH, IN), torch.randn(IN))):
        cell = CELLS[kind](IN, HIDDEN, bias=bias)
        twin = RecurrentAdapter().split(cell)
        h = torch.randn(*x.shape[:-1], HIDDEN)
        state = (h, 2 * h) if kind == "lstm" else h
        equal(twin(x, state), cell(x, state))
        equal(twin(x), cell(x))
        equal(RecurrentAdapter().join(twin, type(cell))(x, state), cell(x, state))
        with pytest.raises(RuntimeError, match=r"input must be \[batch, 6\] and .* \[batch, 9\]"):
            twin(torch.randn(BATCH, IN + 1), None)
        with pytest.raises(RuntimeError, match=r"input must be \[batch, 6\] and .* \[batch, 9\]"):
            twin(torch.randn(BATCH, IN), h if kind == "lstm" else (h, h))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_the_products_are_those_of_quantized_linear_layers(scheme):
    layer = nn.GRU(IN, HIDDEN)
    quantized = qk.QuantGRU.from_float(layer, scheme)
    x = torch.randn(STEPS, BATCH, IN)
    parts = []
    for kind in ("ih", "hh"):
        part = nn.Linear(1, 1)
        part.weight, part.bias = getattr(layer, f"weight_{kind}_l0"), getattr(layer, f"bias_{kind}_l0")
        parts.append(qk.QuantLinear.from_float(part, scheme))
    h = torch.zeros(BATCH, HIDDEN)
    for step in x:
        r, z, n = parts[0](step).chunk(3, dim=-1)
        hr, hz, hn = parts[1](h).chunk(3, dim=-1)
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        n = torch.tanh(n + r * hn)
        h = n + z * (h - n)
    torch.testing.assert_close(quantized(x)[1][0], h, atol=1e-6, rtol=1e-6)


class Tagger(nn.Module):
    def __init__(self, kind="lstm"):
        super().__init__()
        self.recurrent = LAYERS[kind](32, 48, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.cell, self.head = CELLS[kind](96, 32), nn.Linear(32, 5)

    def forward(self, x):
        self.recurrent.flatten_parameters()  # as many do
        out = self.recurrent(x)[0]
        state = self.cell(out[:, -1])
        return self.head(state[0] if isinstance(state, tuple) else state)


def tagger_and_input(kind="lstm"):
    torch.manual_seed(0)
    return Tagger(kind).eval(), torch.randn(8, 10, 32)


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_models_are_quantized_trained_saved_and_dequantized(kind, mode):
    model, x = tagger_and_input(kind)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    report = qk.quantize_(model, "w8a8", mode, strict=True)
    assert len(report.quantized) == 11 and report.quantized_share == 1
    assert report.rows[1].name == "recurrent.hh_l0" and report.rows[1].kind == type(model.recurrent).float_type.__name__
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    float_model, float_leaf = tagger_and_input(kind)[0], x.clone().requires_grad_()
    float_model(float_leaf).square().sum().backward()
    assert (leaf.grad - float_leaf.grad).norm() < 0.3 * float_leaf.grad.norm()
    if mode != "frozen":
        for name in ("weight_ih_l0", "weight_hh_l1", "bias_hh_l0_reverse"):
            actual, wanted = (getattr(each.recurrent, name).grad for each in (model, float_model))
            assert (actual - wanted).norm() < 0.3 * wanted.norm()
    out = model(x)
    other, _ = tagger_and_input(kind)
    qk.quantize_(other, "w8a8", mode)
    if mode == "qat":
        other.load_state_dict(before)  # of the float model
        assert_same_bits(other(x), out)
    other.load_state_dict(model.state_dict())
    assert_same_bits(qk.freeze_(other)(x), out)
    assert_same_bits(copy.deepcopy(other)(x), out)
    qk.dequantize_(other)
    assert list(other.state_dict()) == list(before) and type(other.recurrent) is type(float_model.recurrent)
    assert (other(x) - expected).norm() < 0.05 * expected.norm()
    equal(other.recurrent(x)[0], RecurrentAdapter().split(other.recurrent)(x)[0])


def test_calibration_and_skipping_reach_the_products():
    model, x = tagger_and_input()
    expected, errors = model(x), []
    for calibration in (None, [torch.randn(16, 10, 32) for _ in range(4)]):
        quantized = copy.deepcopy(model)
        assert qk.quantize_(quantized, "w4a8-g32", calibration=calibration, strict=True).warnings == []
        errors.append((quantized(x) - expected).norm())
    assert errors[1] < errors[0]
    qk.quantize_(model, "w8a8", skip=["recurrent.hh_*", "cell"])
    assert type(model.recurrent.hh_l0) is nn.Linear and isinstance(model.recurrent.ih_l0, qk.QuantLinear)
    assert type(model.cell) is nn.LSTMCell
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_dropout_between_layers_is_that_of_training():
    layer = qk.QuantLSTM.from_float(nn.LSTM(IN, HIDDEN, num_layers=2, dropout=0.5).eval(), "w8a8")
    x = torch.randn(STEPS, BATCH, IN)
    assert_same_bits(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_packed_results_are_those_of_each_sequence():
    layer = qk.QuantLSTM.from_float(nn.LSTM(IN, HIDDEN, batch_first=True, bidirectional=True), "w8a8")
    x, lengths = torch.randn(BATCH, STEPS, IN), [3, 7, 1, 5]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    out, (h, c) = layer(packed)
    assert isinstance(out, PackedSequence)
    padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
    for row, length in enumerate(lengths):
        alone, (h_alone, c_alone) = layer(x[row : row + 1, :length])
        assert_same_bits(padded[row, :length], alone[0])
        assert_same_bits(h[:, row], h_alone[:, 0])
        assert_same_bits(c[:, row], c_alone[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    layer = nn.LSTM(IN, HIDDEN)
    x = torch.randn(STEPS, BATCH, IN)
    expected = layer(x)[0]
    half = qk.QuantLSTM.from_float(copy.deepcopy(layer).to(dtype), "w8a8")
    out = half(x.to(dtype))[0]
    assert out.dtype == dtype and (out - expected).norm() < 0.05 * expected.norm()
    with torch.autocast("cpu", dtype):
        out = qk.QuantLSTM.from_float(layer, "w8a8")(x)[0]
    assert out.dtype == dtype and (out - expected).norm() < 0.05 * expected.norm()
    assert qk.QuantLSTM.from_float(layer, "w8a8").to(dtype)(x.to(dtype))[0].dtype == dtype


def test_compiled_code_computes_the_same():
    layer, x = qk.QuantGRU.from_float(nn.GRU(IN, HIDDEN), "w8a8"), torch.randn(3, BATCH, IN)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


class Mine(nn.LSTM):
    def forward(self, *args):
        return super().forward(*args)


def test_what_is_not_known_stays_in_float_with_the_reason():
    model = nn.ModuleList([Mine(IN, HIDDEN), nn.LSTM(IN, HIDDEN), nn.Linear(4, 4)])
    nn.utils.prune.l1_unstructured(model[1], "weight_hh_l0", 0.5)
    reasons = [row.reason for row in qk.quantize_(model, "w8a8").left]
    assert reasons[0] == "Mine is a subclass of nn.LSTM: its forward may compute something else"
    assert reasons[2:] == ["parametrized weight"] * 2
    with pytest.raises(TypeError, match="Mine is a subclass"):
        qk.QuantLSTM.from_float(model[0], "w8a8")
    with pytest.raises(TypeError, match=r"must be an nn\.LSTM, got GRU"):
        qk.QuantLSTM.from_float(nn.GRU(2, 3), "w8a8")


@pytest.mark.parametrize(
    ("x", "hx", "words"),
    [
        (torch.randn(3, 4, IN + 1), None, r"input must have 6 features, got shape \[12, 7\]"),
        (torch.randn(IN), None, "2 or 3 dimensions, got 1"),
        (torch.randn(0, 4, IN), None, "at least one step"),
        (torch.randn(3, 4, IN), (torch.zeros(1, 3, HIDDEN),) * 2, r"hx must have the shapes \[\(1, 4, 9\), \(1, 4"),
    ],
)
def test_wrong_shapes_are_refused(x, hx, words):
    with pytest.raises(RuntimeError, match=words):
        qk.QuantLSTM.from_float(nn.LSTM(IN, HIDDEN), "w8a8")(x, hx)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_pruned_layers_without_biases_stay_in_float(kind):
    model = nn.ModuleList([kind(4, 4, bias=False)])
    name = next(iter(model[0]._parameters))
    torch.nn.utils.prune.l1_unstructured(model[0], name, 0.5)
    with pytest.warns(UserWarning, match="nothing was quantized"):
        report = qk.quantize_(model, "w8a8")
    assert type(model[0]) is kind and {row.reason for row in report.rows} == {"parametrized weight"}
