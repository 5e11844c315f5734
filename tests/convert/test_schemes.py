"""A mapping from patterns to schemes, in `quantize_`."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk

MIXED = {"head": None, "*.up": "w4a8-g32", "*": "w8a8"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(40, 32), Block(), nn.Linear(32, 40, bias=False)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


def schemes(report):
    return {row.name: row.scheme for row in report.rows}


@pytest.mark.parametrize("form", [MIXED, [[*item] for item in MIXED.items()]])
def test_the_first_pattern_that_matches_decides(form):
    model, ids = Net(), torch.randint(0, 40, (2, 5))
    expected = copy.deepcopy(model)
    report = qk.quantize_(model, form, strict=True)
    assert schemes(report) == {"embed": None, "block.up": "w4a8-g32", "block.down": "w8a8", "head": None}
    assert report.scheme == "w4a8-g32, w8a8" and "quantized to w4a8-g32, w8a8" in str(report)
    qk.quantize_(expected, "w4a8-g32", include=["up"])
    qk.quantize_(expected, "w8a8", include=["down"])
    assert_same_bits(model(ids), expected(ids))


def test_what_no_pattern_matches_stays_in_float():
    report = qk.quantize_(Net(), {"block": "w8a8"}, skip=["up"])  # the name of a module is a pattern, too
    assert schemes(report) == {"embed": None, "block.up": None, "block.down": "w8a8", "head": None}
    assert {row.reason for row in report.left} == {"not included", "skipped by pattern"}


def test_patterns_that_decide_nothing_are_warnings_and_with_strict_errors():
    with pytest.warns(UserWarning, match=r"scheme pattern 'mlp' matches no layer"):
        qk.quantize_(Net(), {"mlp": "w8a8", "*": "w8a8"})
    with pytest.warns(UserWarning, match=r"scheme pattern '\*\.up' decides about no layer: patterns before it"):
        report = qk.quantize_(Net(), {"*": "w8a8", "*.up": "w4a8-g32"})
    assert schemes(report)["block.up"] == "w8a8"
    with pytest.raises(ValueError, match="scheme pattern 'mlp' matches no layer"):
        qk.quantize_(Net(), {"mlp": "w8a8", "*": "w8a8"}, strict=True)


@pytest.mark.parametrize(
    ("scheme", "error", "message"),
    [
        ({}, ValueError, "a scheme to at least one pattern"),
        ({"*": None}, ValueError, "a scheme to at least one pattern"),
        ({"*": "w9a8"}, ValueError, "unknown scheme 'w9a8'"),
        ({1: "w8a8"}, TypeError, "must map patterns of layer names"),
        (["w8a8"], TypeError, "must map patterns of layer names"),
        ({"w8a8"}, TypeError, "got set"),
    ],
)
def test_bad_mappings_change_nothing(scheme, error, message):
    model = Net()
    with pytest.raises(error, match=message):
        qk.quantize_(model, scheme)
    assert type(model.head) is nn.Linear


def test_a_mode_must_fit_every_scheme():
    with pytest.raises(ValueError, match="8-bit weights with one scale a row for mode='int8', got w4a8-g32"):
        qk.quantize_(Net(), MIXED, "int8")
    model = Net()
    qk.quantize_(model, {"up": "w8a16", "*": "w8a8"}, "int8")
    assert (model.block.up.scheme.name, model.block.down.scheme.name) == ("w8a16", "w8a8")


def test_embeddings_get_the_scheme_of_their_pattern_or_their_own():
    assert schemes(qk.quantize_(Net(), {"embed": "w4a8-g32", "*": "w8a8"}, embeddings=True))["embed"] == "w4a8-g32"
    assert schemes(qk.quantize_(Net(), {"block": "w8a8"}, embeddings="w4a16"))["embed"] == "w4a16"
    assert schemes(qk.quantize_(Net(), {"embed": None, "*": "w8a8"}, embeddings="w4a16"))["embed"] is None
    tied = Net()
    tied.head.weight = tied.embed.weight
    report = qk.quantize_(tied, {"embed": "w4a8-g32", "*": "w8a8"}, embeddings=True)
    assert schemes(report)["head"] == "w4a8-g32" and tied.head.qweight is tied.embed.qweight


def test_calibration_concerns_the_4_bit_layers_and_never_slower_each_scheme():
    ids = [torch.randint(0, 40, (4, 16))]
    torch.manual_seed(0)
    calibrated = Net()
    nearest = copy.deepcopy(calibrated)
    qk.quantize_(calibrated, MIXED, calibration=ids)
    qk.quantize_(nearest, MIXED)
    assert not torch.equal(calibrated.block.up.qweight, nearest.block.up.qweight)
    assert torch.equal(calibrated.block.down.qweight, nearest.block.down.qweight)
    with pytest.raises(ValueError, match="calibration must be None for w8a8"):
        qk.quantize_(Net(), {"*": "w8a8"}, calibration=ids)
    report = qk.quantize_(Net(), MIXED, never_slower=True)
    assert all(row.reason is None or row.reason.startswith(("float is", "skipped", "embed")) for row in report.rows)
