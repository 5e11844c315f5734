"""Calibrated rounding (GPTQ): same format, smaller error of the outputs."""

from collections import UserDict

import pytest
import reference_ops
import torch
from torch import nn

import qkernels as qk
from qkernels.ptq import gptq
from qkernels.ptq.inputs import InputStatistics, collect_input_statistics


def statistics(x: torch.Tensor, scheme: str = "w4a16") -> InputStatistics:
    """What `collect_input_statistics` sums up over inputs x [T, K]."""
    return collect_input_statistics(layer := nn.Linear(x.shape[1], 1), [layer], [x], scheme)[id(layer)]


def plain(columns: int) -> InputStatistics:
    return InputStatistics(torch.eye(columns), torch.zeros(columns))


SCHEMES = ["w4a16", "w4a16-asym", "w4a8-g32", "w4a8-g32-asym", "w4a16-g128-asym"]


def layer(rows: int = 48, columns: int = 200, tokens: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and correlated inputs [T, K], as activations of a model are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(tokens, columns // 4, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x + 0.3 * torch.randn(x.shape, generator=generator)


def output_error(x: torch.Tensor, weight: torch.Tensor, stored: qk.QuantizedWeight, scheme: str) -> float:
    dequantized = qk.dequantize_weight(*stored, weight.shape[1], scheme)
    return ((x @ (dequantized - weight).t()).norm() / (x @ weight.t()).norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_change_less_than_by_rounding_to_nearest(scheme):
    weight, x = layer()
    nearest = qk.quantize_weight(weight, scheme)
    calibrated = gptq.quantize_weight(weight, scheme, statistics(x, scheme))
    for name, expected, actual in zip(nearest._fields, nearest, calibrated, strict=True):
        if expected is not None:
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), name
    # Half of the error at least, also on inputs that were not seen.
    _, unseen = layer(tokens=900)
    for inputs in (x, unseen[500:]):
        assert output_error(inputs, weight, calibrated, scheme) < 0.5 * output_error(inputs, weight, nearest, scheme)


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8-g32-asym"])
def test_errors_of_int8_activations_are_filtered_out(scheme):
    """One input channel is so large that the others are little more than their own rounding errors."""
    weight, x = layer()
    x[:, 3] *= 300
    _, unseen = layer(tokens=900)
    unseen[:, 3] *= 300
    calibrated = gptq.quantize_weight(weight, scheme, statistics(x, scheme))
    nearest = qk.quantize_weight(weight, scheme)
    errors = [
        (reference_ops.linear(unseen, *stored, None, scheme) - unseen @ weight.t()).norm()
        for stored in (calibrated, nearest)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("columns", [1, 31, 129])
def test_any_number_of_columns(columns):
    weight = torch.randn(5, columns)
    stored = gptq.quantize_weight(weight, "w4a8-g32-asym", plain(columns))
    out = reference_ops.linear(torch.randn(3, columns), *stored, None, "w4a8-g32-asym")
    assert out.shape == (3, 5) and out.isfinite().all()


def test_uncorrelated_inputs_leave_only_the_choice_of_ranges():
    """With x xT = 1 nothing can be made up for elsewhere: the weight's error is at most that of the full ranges."""
    weight, _ = layer()
    scheme = "w4a16-g32-asym"
    stored = gptq.quantize_weight(weight, scheme, plain(weight.shape[1]))
    nearest = qk.quantize_weight(weight, scheme)
    errors = [(qk.dequantize_weight(*w, weight.shape[1], scheme) - weight).norm() for w in (stored, nearest)]
    assert errors[0] <= errors[1]


def test_input_that_was_always_zero():
    weight, x = layer()
    x[:, 7] = 0
    stored = gptq.quantize_weight(weight, "w4a8-g32", statistics(x, "w4a8-g32"))
    assert qk.dequantize_weight(*stored, weight.shape[1], "w4a8-g32").isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "gram", "quant_error", "message"),
    [
        ("w8a16", torch.eye(8), torch.zeros(8), "scheme must have 4-bit weights, got w8a16"),
        ("w4a16-min", torch.eye(8), torch.zeros(8), "scheme must have no minima, got w4a16-min"),
        ("w4a8", torch.eye(7), torch.zeros(8), r"statistics.gram must be finite and of shape \[8, 8\]"),
        ("w4a8", torch.full((8, 8), torch.nan), torch.zeros(8), "statistics.gram must be finite"),
        ("w4a8", torch.eye(8), torch.zeros(7), r"statistics.quant_error must be finite and of shape \[8\], got \[7\]"),
    ],
)
def test_bad_arguments(scheme, gram, quant_error, message):
    with pytest.raises(ValueError, match=message):
        gptq.quantize_weight(torch.randn(3, 8), scheme, InputStatistics(gram, quant_error))


class Model(nn.Module):
    """Two layers that run, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(64, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.dropout(torch.relu(self.first(x))))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x}], ids=["tensor", "mapping"])
def test_quantize_with_calibration(wrap):
    _, x = layer(columns=64)
    expected = Model().eval()(x)
    errors = {}
    for name, batches in (("nearest", None), ("calibrated", [wrap(x[:250]), wrap(x[250:])])):
        model = Model().train()
        if batches is None:
            qk.quantize_(model, "w4a16-g32")
        else:
            with pytest.warns(UserWarning, match="unused saw no calibration input"):
                report = qk.quantize_(model, "w4a16-g32", calibration=batches)
            assert len(report.quantized) == 3
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        errors[name] = (model.eval()(x) - expected).norm().item()
    assert errors["calibrated"] < 0.7 * errors["nearest"]


def test_moments_are_sums_over_all_tokens():
    model = Model()
    x = torch.randn(3, 5, 64)
    flat = x.flatten(0, 1)
    q, scales = qk.quantize_activation(flat, "w8a8")
    for scheme, quant_error in (("w4a16", torch.zeros(64)), ("w8a8", (q * scales - flat).square().sum(dim=0))):
        seen = collect_input_statistics(model, [model.first], [x[:2], x[2:]], scheme)[id(model.first)]
        torch.testing.assert_close(seen.gram, flat.t() @ flat)
        torch.testing.assert_close(seen.quant_error, quant_error)


def test_moments_are_float32_sums_under_autocast():
    model, x = Model(), torch.randn(3, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        seen = collect_input_statistics(model, [model.first], [x], "w4a16")[id(model.first)]
    flat = x.flatten(0, 1)
    torch.testing.assert_close(seen.gram, flat.t() @ flat)


def test_what_cannot_be_calibrated_changes_nothing():
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="calibration must be None for w8a16"):
        qk.quantize_(model, "w8a16", calibration=[torch.randn(2, 64)])
    with pytest.raises(ValueError, match="calibration input of 'first' must be finite"):
        qk.quantize_(model, "w4a8", calibration=[torch.full((2, 64), torch.inf)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Timed(nn.Module):
    """A layer that gets a vector, as those of time embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.out = nn.Linear(8, 64), nn.Linear(64, 16)

    def forward(self, x, scale=1.0):
        return self.out(x * scale + self.time(torch.ones(8)))


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
DATA = torch.utils.data.TensorDataset(X, torch.zeros(8))


@pytest.mark.parametrize(
    "batches",
    [
        [X], (X,), iter([X]), [{"x": X}], [(X, torch.zeros(8))], [[X, torch.zeros(8)]],
        [UserDict({"x": X})],
        torch.utils.data.DataLoader(DATA, batch_size=8),
    ],
    ids=["list", "tuple", "iterator", "mapping", "pair", "pair as a list", "UserDict", "DataLoader"],
)  # fmt: skip
def test_inputs_in_every_usual_form_calibrate_alike(batches):
    torch.manual_seed(0)
    model, reference = Timed(), Timed()
    reference.load_state_dict(model.state_dict())
    qk.quantize_(reference, "w4a8-g32", calibration=[X])
    qk.quantize_(model, "w4a8-g32", calibration=batches)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (
            X,
            TypeError,
            r"calibration must be an iterable of batches, got one batch, a tensor of shape \[8, 64\]; pass",
        ),
        ({"x": X}, TypeError, "calibration must be an iterable of batches, got one batch, dict; pass"),
        ("some text", TypeError, "calibration must be an iterable of batches, got a string; tokenize it"),
        (X.numpy(), TypeError, "calibration must be an iterable of batches such as .* got ndarray"),
        (3, TypeError, "calibration must be an iterable of batches such as .* got int"),
        (["some text"], TypeError, r"calibration\[0\] must be a tensor, a mapping .* got str; tokenize texts first"),
        ([X, X.numpy()], TypeError, r"calibration\[1\] must be a tensor, .* got ndarray; torch.as_tensor"),
        ([[1, 2, 3]], TypeError, r"calibration\[0\] must be a tensor, .* got list of int"),
        ([["a", "b"]], TypeError, r"calibration\[0\] must be a tensor, .* got list of str; tokenize"),
        ([], ValueError, "calibration must hold at least one batch, got an empty list"),
        (iter([]), ValueError, "calibration must hold at least one batch, got none"),
    ],
)
def test_inputs_in_another_form_are_refused_and_nothing_changes(batches, error, message):
    model = Timed()
    with pytest.raises(error, match=message):
        qk.quantize_(model, "w4a8-g32", calibration=batches)
    assert type(model.time) is type(model.out) is nn.Linear


@pytest.mark.parametrize(
    ("scheme", "advice"),
    [("w8a8", "smooth_"), ("w8a8-ag32", "smooth_"), ("w8a16", ""), ("w4a8-g32-min", "-asym in the place of -min")],
)
def test_8_bit_weights_and_minima_are_not_calibrated(scheme, advice):
    with pytest.raises(ValueError, match=f"calibration must be None for {scheme}: .*{advice}"):
        qk.quantize_(Timed(), scheme, calibration=[X])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pruned_weight_stays_pruned_and_its_outputs_are_better_than_by_rounding(scheme):
    weight, x = layer()
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight[pruned] = 0
    calibrated = gptq.quantize_weight(weight, scheme, statistics(x, scheme))
    assert not qk.dequantize_weight(*calibrated, weight.shape[1], scheme)[pruned].any()
    nearest = qk.quantize_weight(weight, scheme)
    _, unseen = layer(tokens=900)
    errors = [output_error(unseen[500:], weight, stored, scheme) for stored in (calibrated, nearest)]
    assert errors[0] < 0.9 * errors[1]
