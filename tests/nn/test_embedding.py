"""`QuantEmbedding`, and embeddings and heads that share one storage."""

import copy
import gc

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk
from qkernels import QuantScheme
from qkernels.convert.selection import NOT_ASKED


class Tied(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 48, padding_idx=0)
        self.mix = nn.Linear(48, 48)
        self.head = nn.Linear(48, 300, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16-g32", "w4a8-asym", "w4a8-g32-asym", "w4a16", "w4a8-g32-min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_dequantized_weight(scheme, dtype):
    embedding = nn.Embedding(70, 35, padding_idx=3).to(dtype)
    layer = qk.QuantEmbedding.from_float(embedding, scheme)
    expected = qk.dequantize_weight(*qk.quantize_weight(embedding.weight, scheme), 35, scheme)
    assert_same_bits(layer.dequantize(), expected)
    for ids in (torch.randint(0, 70, (4, 5)), torch.tensor(7), torch.tensor([], dtype=torch.int64)):
        out = layer(ids)
        assert_same_bits(out, expected[ids].to(dtype))
        assert not out.requires_grad
    assert isinstance(layer, nn.Embedding) and "weight" not in layer._parameters and layer.padding_idx == 3
    assert not any(p.requires_grad for p in layer.parameters())
    with pytest.raises(IndexError):
        layer(torch.tensor([70]))
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))


def test_casts_keep_the_scales():
    layer = qk.QuantEmbedding.from_float(nn.Embedding(70, 35), "w8a8")
    before = layer.scales.clone()
    layer.bfloat16()
    assert_same_bits(layer.scales.data, before)
    assert layer(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
@pytest.mark.parametrize("bias", [False, True])
def test_tied_head_shares_the_storage(scheme, bias):
    model = Tied(bias)
    separate = copy.deepcopy(model)
    separate.head.weight = nn.Parameter(separate.head.weight.detach().clone())
    qk.quantize_(separate, scheme, embeddings=True)
    report = qk.quantize_(model, scheme, strict=True, embeddings=True)
    ids = torch.randint(0, 300, (2, 9))
    assert_same_bits(model(ids), separate(ids))
    for name in ("qweight", "scales", "zeros"):
        assert getattr(model.head, name) is getattr(model.embed, name)
    assert [row.name for row in report.quantized] == ["embed", "mix", "head"]
    assert report.bytes_after == model.embed.storage_bytes() + model.mix.storage_bytes()
    assert report.bytes_before == (300 * 48 + 48 * 48) * 4
    assert report.rows[0].weight_error == report.rows[2].weight_error > 0


def test_one_copy_is_in_memory():
    model = Tied()
    qk.quantize_(model, "w8a8", embeddings=True)
    for changed in (copy.deepcopy(model), model.bfloat16(), model.to("cpu")):
        assert changed.head.qweight is changed.embed.qweight
        assert changed.head.scales is changed.embed.scales and changed.head.scales.dtype == torch.float32
    gc.collect()
    floats = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.shape == (300, 48)]
    assert {t.data_ptr() for t in floats if t.is_floating_point()} == set()


def test_state_dict_round_trip():
    model, other = Tied(), Tied()
    qk.quantize_(model, "w4a8-g32-asym", embeddings=True)
    qk.quantize_(other, "w4a8-g32-asym", embeddings=True)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 300, (2, 9))
    assert_same_bits(other(ids), model(ids))
    assert other.head.qweight is other.embed.qweight
    bad = {**model.state_dict(), "embed.scales": torch.ones(300, 1)}
    with pytest.raises(RuntimeError, match=r"embed.scales must be torch.float32 of shape \[300, 2\]"):
        other.load_state_dict(bad)


@pytest.mark.parametrize("skip", ["embed", "head"])
def test_a_skipped_twin_keeps_both_in_float(skip):
    model = Tied()
    report = qk.quantize_(model, "w8a8", skip=[skip], embeddings=True)
    other = "head" if skip == "embed" else "embed"
    assert {row.name: row.reason for row in report.left} == {
        skip: "skipped by pattern",
        other: f"tied to {skip}",
    }
    assert model.head.weight is model.embed.weight


def test_embeddings_stay_in_float_unless_asked_for():
    report = qk.quantize_(Tied(), "w8a8")
    assert {row.name: row.reason for row in report.left} == {"embed": NOT_ASKED, "head": "tied to embed"}


def test_reasons_for_float():
    model = nn.ModuleDict({"norm": nn.Embedding(9, 4, max_norm=1.0), "bag": nn.EmbeddingBag(9, 4)})
    with pytest.warns(
        UserWarning, match="nothing was quantized: norm: max_norm changes the weight; bag: nn.EmbeddingBag"
    ):
        report = qk.quantize_(model, "w8a8", embeddings=True)
    assert [row.name for row in report.rows] == ["norm", "bag"]
    assert report.rows[0].reason == "max_norm changes the weight"
    with pytest.raises(TypeError, match="max_norm"):
        qk.QuantEmbedding.from_float(model["norm"], "w8a8")
    with pytest.raises(TypeError, match=r"must be an nn.Embedding, got Linear"):
        qk.QuantEmbedding.from_float(nn.Linear(3, 3), "w8a8")


def test_loss_of_an_embedding_as_head():
    model = Tied()
    qk.quantize_(model, "w8a8", embeddings=True)
    hidden, target = torch.randn(6, 48), torch.randint(0, 300, (6,))
    assert_same_bits(
        qk.linear_cross_entropy(hidden, model.embed, target), qk.linear_cross_entropy(hidden, model.head, target)
    )


def test_scheme_is_parsed():
    assert qk.QuantEmbedding(5, 4, "w8a8").scheme == QuantScheme.parse("w8a8")
    with pytest.raises(ValueError, match="w8a9"):
        qk.QuantEmbedding(5, 4, "w8a9")


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_embeddings_are_refused_where_weights_are_trained(mode):
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))
    with pytest.raises(ValueError, match=f"embeddings must be False for mode='{mode}'"):
        qk.quantize_(model, "w8a8", mode, embeddings=True)
    assert type(model[0]) is nn.Embedding
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="embeddings must be False"):
        qk.QKernelsConfig("w8a8", mode=mode, embeddings=True)
