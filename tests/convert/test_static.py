"""Static activations: calibration in one call, and `prepare_` and `convert_` around a loop of one's own."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk
from qkernels.ptq.observers import MinMaxObserver, PercentileObserver


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
        self.head, self.unused = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def inputs(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator) for _ in range(count)]


def calibrated(scheme: str = "w8a8s", mode: str = "frozen", **options) -> nn.Module:
    model = Net()
    qk.quantize_(model, scheme, mode, skip=["unused"], calibration=inputs(), **options)
    return model


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", MinMaxObserver])
def test_one_call_gives_what_prepare_and_convert_give(observer):
    once = calibrated(observer=observer)
    steps = qk.prepare_(Net(), "w8a8s", observer=observer, skip=["unused"])
    floats = Net()
    for x in inputs():
        assert_same_bits(steps(x), floats(x))
    steps = pickle.loads(pickle.dumps(copy.deepcopy(steps)))
    report = qk.convert_(steps)
    for key, tensor in once.state_dict().items():
        assert_same_bits(tensor, steps.state_dict()[key], key)
    rows = {row.name: row for row in report.rows}
    assert rows["body.0"].x_scale == once.body[0].x_scale.item() and 0 <= rows["body.0"].clipped_share < 0.05
    assert f"x_scale {rows['body.0'].x_scale:.4g}" in str(report) and "skipped by pattern" in str(report)
    assert report.to_dict()["rows"][0]["x_scale"] == rows["body.0"].x_scale
    assert not any(module._forward_pre_hooks for module in steps.modules())


def test_the_scale_is_that_of_the_layers_input():
    model = calibrated(observer="minmax")
    seen = torch.cat(inputs()).abs().max()
    assert model.body[0].x_scale.item() == (seen / 127).item()


def test_the_output_is_close_and_saturates():
    model, floats = calibrated(), Net()
    x = torch.cat(inputs())
    assert (model(x) - floats(x)).norm() < 0.03 * floats(x).norm()
    assert_same_bits(model(1e9 * x.sign()), model(1e6 * x.sign()))


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_layers_that_saw_nothing_stay_and_are_named(mode):
    model = Net()
    with pytest.warns(UserWarning, match="unused saw no calibration input and stays in float"):
        report = qk.quantize_(model, "w8a8s", mode, calibration=inputs())
    assert type(model.unused) is nn.Linear and "saw no calibration input" in report.left[0].reason
    before = Net()
    with pytest.raises(ValueError, match="strict=True, and nothing was changed: unused stays in float"):
        qk.quantize_(before, "w8a8s", calibration=inputs(), strict=True)
    assert type(before.head) is nn.Linear


def test_four_bit_weights_are_calibrated_too():
    model, nearest = calibrated("w4a8s-g32"), Net()
    qk.quantize_(nearest, "w4a8s-g32", skip=["unused"], calibration=inputs()[:1])
    x, floats = torch.cat(inputs()), Net()
    assert model.body[0].x_scale.item() > 0
    rounded = qk.quantize_weight(floats.body[0].weight, "w4a8s-g32")
    assert not torch.equal(model.body[0].qweight, rounded.qweight)  # chosen for these inputs
    assert (model(x) - floats(x)).norm() < 0.2 * floats(x).norm()


def test_without_data_it_is_refused_with_what_to_do():
    for call, message in (
        (lambda: qk.quantize_(Net(), "w8a8s"), r"calibration must be sample inputs for w8a8s.*prepare_"),
        (lambda: qk.quantize_(Net(), "w8a8s", calibration=[]), "at least one batch"),
        (lambda: qk.QuantLinear.from_float(nn.Linear(4, 4), "w8a8s"), "x_scale is missing for w8a8s"),
        (lambda: qk.QuantLinear.from_float(nn.Linear(4, 4), "w8a8", x_scale=torch.ones(1)), "no static activations"),
        (lambda: qk.convert_(Net()), "model must be prepared"),
        (lambda: qk.convert_(qk.prepare_(Net())), "saw no input"),
        (lambda: qk.prepare_(qk.prepare_(Net())), "prepared already"),
        (lambda: qk.quantize_(qk.prepare_(Net()), "w8a8"), "prepared already"),
        (lambda: qk.prepare_(Net(), "w8a8"), "must have static activations"),
        (lambda: qk.prepare_(nn.ReLU()), "no layer to prepare"),
        (lambda: qk.QuantEmbedding(8, 4, "w8a8s"), "scheme must be w8a8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_nan_in_the_calibration_names_the_layer():
    broken = [torch.full((2, 32), torch.nan)]
    model = Net()
    with pytest.raises(ValueError, match=r"calibration input of 'body.0': an observed input must be finite"):
        qk.quantize_(model, "w8a8s", calibration=broken)
    assert type(model.head) is nn.Linear and not model.body[0]._forward_pre_hooks
    with pytest.raises(ValueError, match=r"calibration input of 'body.0'"):
        qk.prepare_(Net())(broken[0])


@pytest.mark.parametrize("mode", ["qat", "int8"])
@pytest.mark.parametrize("weight_scale", ["absmax", "learned"])
def test_training_keeps_or_learns_the_scale_and_freezing_keeps_the_bits(mode, weight_scale):
    if mode == "int8" and weight_scale == "learned":
        return
    model = calibrated(mode=mode, weight_scale=weight_scale)
    x, target = inputs()[0], Net()(inputs()[1]).detach()
    before, losses = model.body[0].x_scale.clone(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        losses.append((model(x) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(before, model.body[0].x_scale) == (weight_scale == "absmax")
    out, state = model(x), model.state_dict()
    fresh = calibrated(mode=mode, weight_scale=weight_scale)
    fresh.load_state_dict(state)
    assert_same_bits(fresh(x), out)
    qk.freeze_(model)
    assert_same_bits(model(x), out)
    assert model.body[0].x_scale.requires_grad is False and model.body[0].mode == "frozen"


def test_state_dicts_are_checked():
    state, model = calibrated().state_dict(), calibrated()
    for value, message in (
        (torch.tensor([torch.nan]), "must be finite"),
        (torch.zeros(1), r"at least 2\^-96"),
        (torch.ones(2), r"of shape \[1\]"),
    ):
        with pytest.raises(RuntimeError, match=f"head.x_scale .*{message}"):
            model.load_state_dict({**state, "head.x_scale": value})
    del state["head.x_scale"]
    with pytest.raises(RuntimeError, match=r"head\.x_scale is missing for w8a8s"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="x_scale must be finite"):
        model.head.set_x_scale(torch.tensor([torch.inf]))
    with pytest.raises(RuntimeError, match="x_scale is given, but w8a8 has no static activations"):
        qk.QuantLinear(16, 4, scheme="w8a8").load_state_dict(calibrated().head.state_dict())


def test_casts_moves_and_copies_leave_the_scale_alone():
    model = calibrated()
    scale, x = model.head.x_scale.clone(), torch.randn(3, 16)
    expected = model.head(x)
    twin = copy.deepcopy(model)
    for changed in (twin.half().float(), twin.to(torch.bfloat16), pickle.loads(pickle.dumps(model))):
        assert_same_bits(changed.head.x_scale.detach(), scale.detach())
    assert_same_bits(model.head(x), expected)
    assert all(not p.is_floating_point() for n, p in model.named_parameters() if n.endswith("x_scale"))
    restored = qk.dequantize_(copy.deepcopy(model))
    assert type(restored.head) is nn.Linear


def test_a_tied_head_and_its_embedding_stay_dynamic():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(20, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.mix(self.table(ids)))

    model = Tied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = qk.quantize_(model, "w8a8s", embeddings=True, calibration=[torch.arange(20)])
    assert {row.name: row.scheme for row in report.rows} == {"table": "w8a8", "mix": "w8a8s", "head": "w8a8"}


def test_products_of_the_parent_are_those_of_the_layer():
    for mode in ("frozen", "qat", "int8"):
        layer, x = calibrated(mode=mode).head, torch.randn(5, 16)
        assert_same_bits(torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x), mode)


def test_the_loss_of_a_static_head():
    head = calibrated().head
    hidden, target = torch.randn(6, 16, requires_grad=True), torch.tensor([0, 1, 2, 3, -100, 1])
    loss = qk.linear_cross_entropy(hidden, head, target)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(head(hidden), target).item(), rel=1e-5)
    loss.backward()
    assert hidden.grad.isfinite().all() and hidden.grad[0].any()


def test_an_observer_of_ones_own():
    model = calibrated(observer=lambda: PercentileObserver(90.0))
    narrow, wide = model.body[0].x_scale, calibrated(observer="minmax").body[0].x_scale
    assert narrow < 0.7 * wide


def test_convolutions_and_attention_are_calibrated_too():
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 16, 3)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(self.conv(images).flatten(2).mT)

    torch.manual_seed(1)
    images = torch.randn(4, 3, 8, 8)
    floats = Seen().eval()
    expected = floats(images)
    model, steps = Seen().eval(), qk.prepare_(Seen().eval())
    report = qk.quantize_(model, "w8a8s", calibration=[images])
    assert {row.scheme for row in report.quantized} == {"w8a8s"} and len(report.quantized) == 5
    assert (model(images) - expected).norm() < 0.05 * expected.norm()
    steps(images)
    qk.convert_(steps)
    assert_same_bits(steps(images), model(images))


def test_schemes_by_pattern():
    schemes = {"head": "w8a8s", "unused": None, "*": "w4a8-g32"}
    with pytest.raises(ValueError, match="calibration must be sample inputs for w8a8s"):
        qk.quantize_(Net(), schemes)
    model, steps = Net(), qk.prepare_(Net(), schemes)
    report = qk.quantize_(model, schemes, calibration=inputs())
    assert [row.scheme for row in report.quantized] == ["w4a8-g32", "w4a8-g32", "w8a8s"]
    steps(inputs()[0])
    assert [row.scheme for row in qk.convert_(steps).quantized] == ["w4a8-g32", "w4a8-g32", "w8a8s"]


def test_never_slower_times_layers_of_static_activations():
    model = Net()
    report = qk.quantize_(model, "w8a8s", skip=["unused"], calibration=inputs(), never_slower=True)
    reasons = {(row.reason or "").partition(":")[0] for row in report.rows}
    assert reasons <= {"", "float is faster", "skipped by pattern"}


def test_layers_of_one_weight_have_scales_of_their_own():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    x = 5 * torch.randn(64, 16)
    expected = model(x)
    seen = [x.abs().max().item(), model[1](model[0](x)).max().item()]
    report = qk.quantize_(model, "w8a8s", embeddings=True, calibration=[x])
    assert model[0].qweight is model[2].qweight
    assert [row.x_scale * 127 for row in report.rows] == pytest.approx(seen, rel=1e-5)
    assert [model[at].x_scale.item() * 127 for at in (0, 2)] == pytest.approx(seen, rel=1e-5)
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_pruned_layers_are_calibrated_and_moved(mode):
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False)), torch.randn(2, 4, 6, 6)
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    expected = model(x)
    qk.quantize_(model, "w8a8s", mode, calibration=[x])
    assert (model.to("cpu")(x) - expected).norm() < 0.05 * expected.norm()
    assert model[0].x_scale.item() * 127 == pytest.approx(x.abs().max().item(), rel=1e-5)


def test_a_conversion_that_is_refused_can_be_repeated():
    model, x = qk.prepare_(nn.Sequential(nn.Linear(8, 8))), torch.randn(3, 8)
    model(x)
    weight = model[0].weight
    before, weight.data = weight.data, weight.data * torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        qk.convert_(model)
    weight.data = before
    assert qk.convert_(model).rows[0].x_scale * 127 == pytest.approx(x.abs().max().item(), rel=1e-5)


def test_dequantize_ends_the_watch_of_a_prepared_model():
    model = qk.prepare_(Net())
    model(inputs()[0])
    qk.dequantize_(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(qk.quantize_(model, "w8a8").quantized) > 0


def test_warnings_of_convert_name_the_line_that_called_it():
    model = qk.prepare_(Net())
    model(inputs()[0])
    with pytest.warns(UserWarning) as caught:
        qk.convert_(model)
    assert {warning.filename for warning in caught} == {__file__}
