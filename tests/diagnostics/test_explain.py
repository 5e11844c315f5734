"""What `explain` says of a model's layers, and `quantize_(never_slower=True)`."""

import itertools
import json
import time

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import _native
from qkernels.diagnostics import explain
from qkernels.kernels import ops
from qkernels.profiling.layers import time_layers


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.twin, self.down = nn.Linear(96, 160), nn.Linear(96, 160), nn.Linear(160, 64, bias=False)


def test_one_row_for_each_shape_and_number_of_rows():
    found = explain.explain(Model(), "w8a8", (1, 80), seconds=0.001)
    assert [(t.layers, t.shape, t.m) for t in found.timings] == [
        (("up", "twin"), (160, 96), 1),
        (("up", "twin"), (160, 96), 80),
        (("down",), (64, 160), 1),
        (("down",), (64, 160), 80),
    ]
    for timing in found.timings:
        assert 0 < timing.limit_seconds and 0 < timing.seconds and 0 < timing.float_seconds
        assert timing.kernel == ("row_dot" if timing.m == 1 else "int_matmul")
        assert timing.limited_by in str(found) and timing.layers[0] in str(found)
    assert json.loads(json.dumps(found.to_dict()))["timings"][0]["layers"] == ["up", "twin"]


def test_quantized_layers_keep_their_scheme():
    model = Model()
    qk.quantize_(model, "w4a16-g32", include=["up"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = explain.explain(model, rows=(2,), seconds=0.001)
    assert [(t.layers, t.scheme, t.kernel) for t in found.timings] == [(("up",), "w4a16-g32", "float_dot")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "w8a8", "rows": ()}, "rows must be at least 1, got nothing"),
        ({"scheme": "w8a8", "rows": (0,)}, "rows must be at least 1, got 0"),
        ({"scheme": "w8a9"}, "w8a9"),
        ({}, "model has no quantized linear layer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain.explain(Model(), **arguments)


def test_layers_on_other_devices_cannot_be_timed():
    with pytest.raises(
        ValueError, match=r"layer 'up' is on meta; only layers on the CPU can be timed\. There it runs on reference"
    ):
        time_layers([(["up"], nn.Linear(8, 8, device="meta"))], qk.QuantScheme.parse("w8a8"), (1,), 0.001)


def test_never_slower_leaves_what_is_faster_in_float(monkeypatch):
    """The quantized product of one shape is delayed for real; its layers stay in float, with both times."""
    linear = ops.linear

    def delayed(x, qweight, *rest):
        if qweight.shape[0] == 64:
            time.sleep(0.01)
        return linear(x, qweight, *rest)

    monkeypatch.setattr(ops, "linear", delayed)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 64))
    report = qk.quantize_(model, "w8a8", never_slower=True, strict=True)
    reason = {row.name: row.reason for row in report.rows}["1"]
    assert reason.startswith("float is faster: ") and "at M = " in reason
    assert type(model[1]) is nn.Linear


def test_choice_depends_on_the_rows_and_the_work(each_isa):
    for scheme in ("w8a8", "w8a8-ag32", "w4a8", "w4a8-g32", "w8a16"):
        choices = [_native.choose_linear(scheme, m, 4096, 4096, threads=2) for m in range(1, 200)]
        drivers = [choice["driver"] for choice in choices]
        assert len(list(itertools.groupby(drivers))) == len(set(drivers)), "a range of rows each"
        assert drivers[0].endswith("_dot") and not drivers[-1].endswith("_dot")
        assert drivers[-1].startswith("float") == scheme.endswith("a16")
        assert all(choice["threads"] == 2 for choice in choices)
        assert len({(choice["driver"], choice["reason"]) for choice in choices}) == len(set(drivers))
        assert _native.choose_linear(scheme, 1, 8, 8, threads=2)["threads"] == 1


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_layers_whose_weight_is_trained_are_timed_as_they_multiply(mode):
    model = Model()
    qk.quantize_(model, "w8a8", mode=mode)
    found = explain.explain(model, rows=(2,), seconds=0.001)
    assert [(t.layers, t.scheme, t.kernel) for t in found.timings] == [
        (("up", "twin"), "w8a8", "row_dot"),
        (("down",), "w8a8", "row_dot"),
    ]
