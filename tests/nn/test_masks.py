"""Pruned layers: what a mask makes 0 is 0 in the integers, whatever is done afterwards."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import qkernels as qk
from qkernels.formats.storage import weight_integers
from qkernels.nn.masks import find_pruning

SCHEMES = ("w8a8", "w8a16-g64", "w4a8-g32", "w4a8-g32-asym")


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return self.mask * weight


def unstructured(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def structured(layer):
    prune.ln_structured(layer, "weight", 0.25, n=2, dim=0)


def repeated(layer):
    prune.random_unstructured(layer, "weight", 0.25)
    prune.ln_structured(layer, "weight", 0.25, n=2, dim=1)


def everywhere(layer):
    prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.6)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Mask((torch.rand(layer.weight.shape) > 0.5).float()))


def two_of_four(layer):
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(layer)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()


WAYS = (unstructured, structured, repeated, everywhere, parametrized, two_of_four)
X = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


def pruned_model(way, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    with torch.no_grad():  # a weight that has a graph cannot be copied
        way(model[0])
    return model, model[0].weight.detach() == 0


def train(model, optimizer=torch.optim.AdamW, steps=3):
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad and p.dim() == 2], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.arange(48) % 4).backward()
        optimizer.step()


def integers(layer):
    qweight, _, zeros = layer.quantized_weight()
    return weight_integers(qweight, zeros, layer.in_features, layer.scheme)


def assert_zero(layer, zeros):
    assert zeros.any() and not integers(layer)[zeros].any() and not layer.dequantize()[zeros].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_frozen_layers_have_the_zeros_and_no_mask(way, scheme):
    model, zeros = pruned_model(way)
    reference = copy.deepcopy(model[0]).weight.detach()
    report = qk.quantize_(model, scheme)
    assert report.rows[0].note == f"pruned: {100 * zeros.double().mean():.1f} % zeros stay"
    assert report.rows[0].note in str(report) and report.rows[1].note is None
    assert_zero(model[0], zeros)
    for tensor, expected in zip(model[0].quantized_weight(), qk.quantize_weight(reference, scheme), strict=True):
        if tensor is not None:
            assert_same_bits(tensor, expected)
    assert list(model[0].state_dict()) == list(qk.QuantLinear(64, 40, True, scheme).state_dict())
    assert not model[0]._forward_pre_hooks and type(model[0]) is qk.QuantLinear


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("scheme", "mode", "scale"),
    [*((scheme, "qat", "absmax") for scheme in SCHEMES), ("w4a8-g32", "qat", "learned"), ("w8a8", "int8", "absmax")],
)
def test_training_and_freezing_keep_the_zeros(way, scheme, mode, scale):
    model, zeros = pruned_model(way)
    row = qk.quantize_(model, scheme, mode, weight_scale=scale).rows[0]
    assert row.note.endswith("zeros stay, also in training")
    before = integers(model[0]).clone()
    train(model)
    assert_zero(model[0], zeros)
    assert not torch.equal(integers(model[0]), before)
    out = model(X)
    qk.freeze_(model)
    assert_same_bits(model(X), out)
    assert_zero(model[0], zeros)
    assert not model[0]._buffers.get("weight_mask") and not model[0]._forward_pre_hooks
    qk.dequantize_(model)
    assert type(model[0]) is nn.Linear and not model[0].weight[zeros].any()


@pytest.mark.parametrize("way", WAYS)
def test_a_qat_layer_computes_and_trains_as_the_pruned_float_layer(way):
    model, _ = pruned_model(way)
    quantized = copy.deepcopy(model)
    qk.quantize_(quantized, "w8a8", "qat")
    assert list(quantized.state_dict()) == list(model.state_dict())
    for each in (model, quantized):
        each(X).square().sum().backward()
    ours, expected = (find_pruning(each[0]).original for each in (quantized, model))
    assert torch.equal(ours.grad == 0, expected.grad == 0)
    assert (ours.grad - expected.grad).norm() < 0.1 * expected.grad.norm()
    qk.dequantize_(quantized)  # from a layer that is pruned still
    quantized(X)
    assert type(quantized[0]) is nn.Linear and quantized[0].weight.is_leaf


def test_products_with_the_weight_of_a_pruned_qat_layer_are_those_of_the_layer():
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(64, 32), "weight", 0.5))
    qk.quantize_(model, "w4a8-g32", "qat")
    layer, x = model[0], torch.randn(5, 64)
    expected = layer(x)
    assert torch.equal(F.linear(x, layer.weight, layer.bias), expected)
    assert torch.equal(torch.addmm(layer.bias, x, layer.weight.t()), expected)
    F.linear(x, layer.weight).sum().backward()
    own = layer.weight_orig.grad.clone()
    layer.weight_orig.grad = None
    layer(x).sum().backward()
    assert torch.equal(own, layer.weight_orig.grad) and not own[layer.weight_mask == 0].any()


@pytest.mark.parametrize("way", WAYS)
def test_qat_layers_are_pruned_like_float_layers(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    qk.quantize_(model, "w4a8-g32", "qat")
    way(model[0])
    zeros = model[0].weight.detach() == 0
    train(model)
    assert_zero(model[0], zeros)
    out = model(X)
    assert_same_bits(qk.freeze_(model)(X), out)


def test_masks_are_made_permanent_by_the_tools_of_torch():
    model, zeros = pruned_model(unstructured)
    qk.quantize_(model, "w8a8", "qat")
    train(model)
    prune.remove(model[0], "weight")
    assert_zero(model[0], zeros)
    assert isinstance(model[0].weight, nn.Parameter)
    model, zeros = pruned_model(parametrized)
    qk.quantize_(model, "w8a8", "qat")
    train(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert_zero(model[0], zeros)


def test_a_removed_mask_is_kept_when_frozen_and_warned_of_when_trained():
    model, zeros = pruned_model(unstructured)
    prune.remove(model[0], "weight")
    qk.quantize_(copied := copy.deepcopy(model), "w4a8-g32-asym")
    assert_zero(copied[0], zeros)
    with pytest.warns(UserWarning, match=r"no mask, .* zeros: 0 \(50 % are exactly 0\); .*before"):
        qk.quantize_(copied := copy.deepcopy(model), "w8a8", "int8")
    prune.custom_from_mask(model[0], "weight", model[0].weight != 0)  # what the warning tells
    assert qk.quantize_(model, "w8a8", "int8").warnings == []
    train(model)
    assert_zero(model[0], zeros)


def test_optimizers_that_mix_weights_cannot_fill_the_integers():
    model, zeros = pruned_model(unstructured)
    qk.quantize_(model, "w8a8", "int8")
    train(model, torch.optim.Muon)
    assert_zero(model[0], zeros)
    assert not model[0].weight.grad[zeros].any()


def test_int8_masks_are_in_the_state_dict():
    model, zeros = pruned_model(unstructured)
    qk.quantize_(model, "w8a8", "int8")
    train(model)
    saved = copy.deepcopy(model.state_dict())
    assert torch.equal(saved["0.weight_mask"], ~zeros)
    other = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    qk.quantize_(other, "w8a8", "int8")
    other.load_state_dict(saved)
    train(other)
    assert_zero(other[0], zeros)
    frozen = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    qk.quantize_(frozen, "w8a8")
    frozen.load_state_dict(saved)
    assert_zero(frozen[0], zeros)
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight_mask"'):
        model.load_state_dict(frozen.state_dict())


def test_copies_and_compiled_models_keep_their_masks():
    model, zeros = pruned_model(unstructured)
    qk.quantize_(model, "w8a8", "int8")
    copied = copy.deepcopy(model)
    train(copied)
    assert_zero(copied[0], zeros)
    assert_same_bits(torch.compile(model, backend="aot_eager")(X), model(X))


@pytest.mark.parametrize("mode", ["frozen", "int8"])
def test_a_layer_without_a_float_weight_is_not_pruned(mode):
    layer = qk.QuantLinear.from_float(nn.Linear(64, 40), "w8a8", mode=mode)
    out = layer(X)
    with pytest.raises(RuntimeError, match="cannot be pruned: prune the float layer before quantize_"):
        prune.l1_unstructured(layer, "weight", 0.5)
    assert_same_bits(layer(X), out)


@pytest.mark.parametrize(
    ("mode", "mask", "words"),
    [
        ("frozen", torch.ones(40, 64, dtype=torch.bool), "mode must be \"int8\", got 'frozen'"),
        ("int8", torch.ones(40, 64), "mask must be bool"),
        ("int8", torch.ones(64, dtype=torch.bool), r"of shape \[40, 64\], got torch.bool of shape \[64\]"),
    ],
)
def test_keep_zeros_checks_its_mask(mode, mask, words):
    with pytest.raises(ValueError, match=words):
        qk.QuantLinear(64, 40, mode=mode).keep_zeros(mask)


def test_pruned_conv1d_of_transformers():
    transformers = pytest.importorskip("transformers")
    for mode in ("frozen", "qat", "int8"):
        model = nn.Sequential(transformers.pytorch_utils.Conv1D(40, 64), nn.Linear(40, 4))
        prune.l1_unstructured(model[0], "weight", 0.5)
        zeros = model[0].weight.detach().t() == 0
        assert len(qk.quantize_(model, "w8a8", mode).quantized) == 2
        if mode != "frozen":
            train(model)
        assert_zero(qk.freeze_(model)[0], zeros)
        qk.dequantize_(model)
        assert type(model[0]) is transformers.pytorch_utils.Conv1D


def test_hooks_of_the_user_stay_and_can_be_removed():
    model, _ = pruned_model(unstructured)
    seen = []
    handle = model[0].register_forward_pre_hook(lambda layer, args: seen.append(type(layer)))
    qk.quantize_(model, "w8a8", "qat")
    model(X)
    handle.remove()
    model(X)
    assert seen == [qk.QuantLinear] and len(model[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_pruned_convolutions(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    zeros = {place: model[place].weight == 0 for place in (0, 2)}
    assert [row.note is None for row in qk.quantize_(model, "w8a8", mode).rows] == [False, False]
    if mode != "frozen":
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        for _ in range(3):
            model(torch.randn(4, 3, 8, 8)).square().sum().backward()
            optimizer.step()
    qk.dequantize_(qk.freeze_(model))
    assert not any(model[place].weight[where].any() for place, where in zeros.items())


def test_a_layer_without_parameters_of_its_own_is_moved_and_cast():
    layer = nn.Linear(16, 16, bias=False)
    parametrize.register_parametrization(layer, "weight", Mask(torch.rand(16, 16) < 0.5))
    model = nn.Sequential(layer)
    qk.quantize_(model, "w8a8", mode="qat")
    x = torch.randn(3, 16)
    expected = model(x)
    assert not [own for own in model[0]._parameters.values() if own is not None]
    assert_same_bits(model.to("cpu")(x), expected)
    assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16
