"""Nested tensors of layout `torch.jagged` through quantized layers."""

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk


def jagged(parts, **options):
    return torch.nested.nested_tensor(parts, layout=torch.jagged, **options)


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_a_linear_layer_is_applied_to_each_part(mode):
    layer = qk.QuantLinear.from_float(nn.Linear(40, 24), "w8a8", mode=mode)
    parts = [torch.randn(3, 40), torch.randn(0, 40), torch.randn(5, 40)]
    x = jagged(parts, requires_grad=True)
    out = layer(x)
    for part, expected in zip(out.unbind(), map(layer, parts), strict=True):
        assert_same_bits(part, expected)
    torch.testing.assert_close((out + layer(x)).values(), 2 * out.values())  # of the same structure
    out.values().square().sum().backward()
    leaf = torch.cat(parts).requires_grad_()
    layer(leaf).square().sum().backward()
    assert_same_bits(x.grad.values(), leaf.grad)


def test_an_embedding_and_what_is_refused():
    embedding = qk.QuantEmbedding.from_float(nn.Embedding(10, 8), "w8a8")
    ids = [torch.tensor([1, 2]), torch.tensor([3])]
    for part, expected in zip(embedding(jagged(ids)).unbind(), map(embedding, ids), strict=True):
        assert_same_bits(part, expected)
    layer = qk.QuantLinear.from_float(nn.Linear(8, 8), "w8a8")
    with pytest.raises(TypeError, match=r"layout torch\.jagged .* got layout torch\.strided"):
        layer(torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)]))
    with pytest.raises(TypeError, match="last dimension is not the ragged one"):
        layer(jagged([torch.randn(3, 8), torch.randn(2, 8)]).transpose(1, 2))
