"""The blocks of GGUF tensors against the package gguf: random bytes, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from qkernels.checkpoints.gguf_blocks import BLOCK_TYPES, TARGETS, blocks_of, decode_rows, encode_rows, half_losses
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.formats.scheme import QuantScheme
from qkernels.formats.storage import QuantizedWeight, dequantize_weight

# Where a block has its float16 numbers: random bits there would be infinities too.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_rows(kind: str, rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Random bytes of that type, the float16 numbers of both signs and without infinities."""
    block_type, rng = BLOCK_TYPES[kind], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, block_type.block_bytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        numbers = rng.standard_normal((rows, blocks, 1)).astype(np.float16) * np.float16(0.1)
        raw[..., at : at + 2] = numbers.view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (64, 2)])
def test_the_values_of_blocks_are_those_of_gguf(kind, rows, blocks):
    block_type, raw = BLOCK_TYPES[kind], random_rows(kind, rows, blocks)
    expected = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    weight, scheme = decode_rows(kind, raw), QuantScheme.parse(block_type.scheme)
    found = dequantize_weight(*weight, blocks * block_type.block, scheme)
    assert found.shape == expected.shape and np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", TARGETS)
def test_blocks_come_back_with_the_same_bytes(kind):
    raw, scheme = random_rows(kind, 9, 4), QuantScheme.parse(BLOCK_TYPES[kind].scheme)
    blocks = blocks_of(decode_rows(kind, raw), 4 * 32, scheme)
    assert torch.equal(encode_rows(kind, blocks), raw)


def test_scales_that_float16_rounds_are_a_loss_and_infinite_ones_an_error():
    weight = QuantizedWeight(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[1.0001]]), None)
    with pytest.raises(LossError, match=r"layer.scales: 1 of 1 scales that float16 cannot hold"):
        half_losses(weight, "layer", Losses())
    losses = Losses("report")
    half_losses(weight, "layer", losses)
    assert losses.entries[0].changed == 1
    with pytest.raises(ValueError, match="layer has scales of 70000, which float16 cannot hold"):
        half_losses(weight._replace(scales=torch.tensor([[7e4]])), "layer", losses)
