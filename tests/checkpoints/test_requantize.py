"""Other schemes for the layers of a checkpoint: exact where the integers are kept, a loss by the policy elsewhere."""

import pytest
import torch

from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.requantize import dequantize, keeps_integers, requantized
from qkernels.formats.rules import quantize_weight
from qkernels.formats.scheme import QuantScheme

K = 160  # the last group of 64 and of 128 is shorter


def checkpoint(scheme: str, ordered: bool = False) -> tuple[Checkpoint, list[str]]:
    """A layer "up", and the names of the layers that were read."""
    torch.manual_seed(0)
    parsed, read = QuantScheme.parse(scheme), []
    weight = quantize_weight(torch.randn(6, K), parsed)
    order = torch.randperm(K).to(torch.int32) if ordered else None
    x_scale = torch.tensor([0.5]) if parsed.static_activations else None

    def reader() -> LayerWeight:
        read.append("up")
        return LayerWeight(weight, x_scale, order)

    layer = CheckpointLayer("up", K, 6, parsed, "", (), reader, ordered, source="raw")
    plain = FloatTensor((6, K), torch.bfloat16, lambda: torch.ones(6, K, dtype=torch.bfloat16))
    return Checkpoint("memory", {}, {"up": layer}, {"down.weight": plain, "norm.weight": plain}), read


def weight_of(layer: CheckpointLayer) -> torch.Tensor:
    return dequantize(layer.read(), layer.in_features, layer.scheme)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("w8a16", "w8a8"),
        ("w4a16-g32-asym", "w4a8-g32-asym-ag32"),
        ("w8a8s", "w8a16"),
        ("w8a8s", "w8a8s-g64"),
        ("w8a16", "w8a16-g32"),
        ("w8a16-g128", "w8a8-g16"),
        ("w4a16-g128-asym", "w4a16-g64-asym"),
        ("w4a16-g64", "w4a16-g64-asym"),
        ("w4a16", "w8a16-g128"),
        ("w4a16-g64-asym", "w8a16-g64"),
        ("w4a16-asym", "w8a8-g32"),
    ],
)
def test_integers_that_are_kept(old, new, ordered):
    before, read = checkpoint(old, ordered)
    after = requantized(before, {"up": new}, Losses())
    assert read == [] and before.layers["up"].scheme.name == old
    layer = after.layers["up"]
    assert layer.scheme.name == new and layer.has_input_order == ordered and layer.source is None
    values = layer.read()
    assert (values.x_scale is not None) == layer.scheme.static_activations
    assert torch.equal(weight_of(layer), weight_of(before.layers["up"]))


@pytest.mark.parametrize(
    ("old", "new"),
    [("w8a16", "w4a16"), ("w8a16-g32", "w8a16-g64"), ("w4a16-g32-asym", "w4a16-g32"), ("w8a16-g32", "w4a16-g32-asym")],
)
def test_integers_that_are_not(old, new):
    before, read = checkpoint(old, ordered=True)
    for policy in ("refuse", "report"):
        with pytest.raises(
            LossError, match=rf"up.weight: {old} does not keep its integers as {new}; pass on_loss='req"
        ):
            requantized(before, {"up": new}, Losses(policy))
    losses = Losses("requantize")
    layer = requantized(before, {"up": new}, losses).layers["up"]
    assert read == [] and losses.entries == [] and not layer.has_input_order
    exact = weight_of(before.layers["up"])
    expected = quantize_weight(exact, new)
    assert all(a is b or torch.equal(a, b) for a, b in zip(layer.read().weight, expected, strict=True))
    (entry,) = losses.entries
    largest = (weight_of(layer) - exact).abs().max() / exact.abs().max()
    assert entry.tensor == "up.weight" and entry.largest == pytest.approx(float(largest))


def test_what_keeps_integers_keeps_them_to_the_bit():
    names = [name for name in QuantScheme.names() if "a16" in name]
    kept = [(a, b) for a in names for b in names if keeps_integers(QuantScheme.parse(a), QuantScheme.parse(b))]
    assert all((name, name) in kept for name in names) and len(kept) > 2 * len(names)
    for old, new in kept:
        before, _ = checkpoint(old)
        assert torch.equal(
            weight_of(requantized(before, {"up": new}, Losses()).layers["up"]), weight_of(before.layers["up"])
        )


def test_columns_are_put_in_order_where_that_is_asked_for():
    before, _ = checkpoint("w8a16", ordered=True)
    with pytest.raises(LossError):
        requantized(before, {"up": "w8a16"}, Losses(), ordered=True)
    layer = requantized(before, {"up": "w8a16"}, Losses("requantize"), ordered=True).layers["up"]
    exact = weight_of(before.layers["up"])
    assert layer.read().input_order is None and (weight_of(layer) - exact).abs().max() < exact.abs().max() / 127


def test_floats_are_quantized_when_they_are_named():
    before, _ = checkpoint("w8a8")
    after = requantized(before, {"down": "w4a8-g32"}, Losses())
    assert list(after.layers) == ["up", "down"] and list(after.floats) == ["norm.weight"]
    assert after.layers["up"] is before.layers["up"]
    assert torch.equal(weight_of(after.layers["down"]), torch.ones(6, K))


@pytest.mark.parametrize(
    ("schemes", "words"),
    [
        ({"sideways": "w8a8"}, "schemes must name quantized layers or modules with a float matrix, got 'sideways'"),
        ({"up": "w8a8s"}, "up has no scale for the static activations of w8a8s"),
        ({"down": "w8a8s"}, "down has no scale for the static activations of w8a8s"),
        ({"up": "w8a9"}, "unknown scheme 'w8a9'"),
    ],
)
def test_what_cannot_be_is_refused(schemes, words):
    with pytest.raises(ValueError, match=words):
        requantized(checkpoint("w8a8")[0], schemes, Losses("requantize"))
