"""The blocks of GGUF tensors: to the canonical storage of a weight, and from it.

The layouts are those of https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. Half of a byte is a
code of 4 bits; in all blocks of 32 the low halves are the first 16 columns, the high halves the last 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, expand_groups
from .losses import Losses

_WEIGHTS = 1 << 18  # of a weight that are converted at once
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Blocks(NamedTuple):
    """Blocks as integers.

    Attributes:
        codes: [R, K]: uint8 0..15 of 4-bit weights, int8 of 8-bit ones.
        scales: float32 [R, groups].
        mins: float32 [R, groups] or None: what is added to code * scale.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None = None


class BlockType(NamedTuple):
    """A type of tensor that has a canonical storage.

    Attributes:
        scheme: of the weight, with float activations.
        block, block_bytes: values and bytes of a block.
        decode: blocks uint8 [B, bytes of a block] -> `Blocks` of B rows of one block each.
    """

    scheme: str
    block: int
    block_bytes: int
    decode: Callable[[Tensor], Blocks]


def _half(raw: Tensor) -> Tensor:
    """uint8 [B, 2 n] -> float32 [B, n], each two bytes a float16."""
    return raw.contiguous().view(torch.float16).to(torch.float32)


def _halves(raw: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2 n]: the low halves of all bytes, then the high ones."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """uint8 [B, 4] -> [B, 32]: bit i of the word at 16, for column i."""
    bits = raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def _q8_0(raw: Tensor) -> Blocks:
    return Blocks(raw[:, 2:].view(torch.int8), _half(raw[:, :2]))


def _q4_0(raw: Tensor) -> Blocks:
    return Blocks(_halves(raw[:, 2:]), _half(raw[:, :2]))


def _q4_1(raw: Tensor) -> Blocks:
    return Blocks(_halves(raw[:, 4:]), _half(raw[:, :2]), _half(raw[:, 2:4]))


def _q5_0(raw: Tensor) -> Blocks:
    codes = _halves(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return Blocks(codes.view(torch.int8) - 16, _half(raw[:, :2]))


def _q5_1(raw: Tensor) -> Blocks:
    codes = _halves(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return Blocks(codes.view(torch.int8), _half(raw[:, :2]), _half(raw[:, 2:4]))


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and mins of 8 groups of a K block, 6 bits each, times the two of the block: float32 [B, 8]."""
    scales, mins, high = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    sub_scales = torch.cat((scales & 63, high & 15 | scales >> 6 << 4), dim=-1)
    sub_mins = torch.cat((mins & 63, high >> 4 | mins >> 6 << 4), dim=-1)
    both = _half(raw[:, :4])
    return both[:, :1] * sub_scales, -(both[:, 1:] * sub_mins)


def _q4_k(raw: Tensor) -> Blocks:
    return Blocks(_halves(raw[:, 16:].unflatten(-1, (4, 32))).flatten(-2), *_k_scales(raw))


def _q5_k(raw: Tensor) -> Blocks:
    low = _halves(raw[:, 48:].unflatten(-1, (4, 32))).flatten(-2).unflatten(-1, (8, 32))
    high = raw[:, 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(-1) & 1
    return Blocks((low | high << 4).flatten(-2).view(torch.int8), *_k_scales(raw))


def _q6_k(raw: Tensor) -> Blocks:
    low = _halves(raw[:, :128].unflatten(-1, (2, 64)))
    high = raw[:, 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    codes = (low | high.flatten(-2) << 4).flatten(-2).view(torch.int8) - 32
    return Blocks(codes, _half(raw[:, 208:]) * raw[:, 192:208].view(torch.int8))


BLOCK_TYPES = {
    "Q8_0": BlockType("w8a16-g32", 32, 34, _q8_0),
    "Q4_0": BlockType("w4a16-g32", 32, 18, _q4_0),
    "Q5_0": BlockType("w8a16-g32", 32, 22, _q5_0),
    "Q4_1": BlockType("w4a16-g32-min", 32, 20, _q4_1),
    "Q5_1": BlockType("w8a16-g32-min", 32, 24, _q5_1),
    "Q4_K": BlockType("w4a16-g32-min", 256, 144, _q4_k),
    "Q5_K": BlockType("w8a16-g32-min", 256, 176, _q5_k),
    "Q6_K": BlockType("w8a16-g16", 256, 210, _q6_k),
}


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """All rows of a matrix, as many at once as make about a quarter of a million values."""
    step = max(_WEIGHTS // columns, 1)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def decode_rows(kind: str, raw: Tensor) -> QuantizedWeight:
    """The canonical storage of some rows.

    Args:
        kind: a type of `BLOCK_TYPES`.
        raw: uint8 [R, bytes of a row].

    Returns:
        Of R rows, under the scheme of the type: the values are those of `gguf.quants.dequantize`, bit for bit.
    """
    block_type, rows = BLOCK_TYPES[kind], raw.shape[0]
    blocks = block_type.decode(raw.reshape(-1, block_type.block_bytes))
    codes = blocks.codes.reshape(rows, -1)
    if codes.dtype == torch.uint8:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    mins = None if blocks.mins is None else blocks.mins.reshape(rows, -1)
    return QuantizedWeight(codes, blocks.scales.reshape(rows, -1), mins)


def _as_half(values: Tensor) -> Tensor:
    """float32 [B] -> uint8 [B, 2]."""
    return values.reshape(-1, 1).to(torch.float16).view(torch.uint8)


def _join(codes: Tensor) -> Tensor:
    """uint8 [B, 32] below 16 -> [B, 16]: the inverse of `_halves`."""
    return codes[:, :16] | codes[:, 16:] << 4


def _join_fifth(codes: Tensor) -> Tensor:
    """uint8 [B, 32] -> [B, 4]: the fifth bits."""
    bits = (codes >> 4).unflatten(-1, (4, 8)).to(torch.int32) << torch.arange(8, dtype=torch.int32)
    return bits.sum(-1).to(torch.uint8)


class Target(NamedTuple):
    """A type of blocks of 32 that is written.

    Attributes:
        least, greatest: of the integers that are multiplied with the scale.
        mins: True if each block has a float offset.
    """

    least: int
    greatest: int
    mins: bool


TARGETS = {
    "Q4_0": Target(-8, 7, False),
    "Q4_1": Target(0, 15, True),
    "Q5_0": Target(-16, 15, False),
    "Q5_1": Target(0, 31, True),
    "Q8_0": Target(-128, 127, False),
}


def blocks_of(values: QuantizedWeight, in_features: int, scheme: QuantScheme) -> Blocks:
    """Some rows of a weight as blocks of 32 columns.

    Args:
        values: rows of the canonical storage.
        in_features: K, a multiple of 32.
        scheme: of the weight; its groups are of 32, 64, 128 or all columns.

    Returns:
        `codes` int8 [R, K], the integers that are multiplied with the scale; `mins` of the schemes that have some.
    """
    codes = scheme.weight_format.unpack(values.qweight, in_features).to(torch.int8)
    per_group = (values.scales, *(() if values.zeros is None else (values.zeros,)))
    spread = [expand_groups(group, scheme.group_size, in_features)[:, ::32] for group in per_group]
    if values.zeros is None:
        return Blocks(codes - scheme.weight_format.offset, spread[0])
    if values.zeros.dtype == torch.uint8:
        return Blocks(codes, spread[0], -(spread[0] * spread[1]))
    return Blocks(codes, *spread)


def encode_rows(kind: str, blocks: Blocks) -> Tensor:
    """Rows of blocks as the bytes of a type.

    Args:
        kind: a type of `TARGETS` that holds these codes and mins.
        blocks: what `blocks_of` gives; scales and mins are rounded to float16.

    Returns:
        uint8 [R, bytes of a row].
    """
    rows, offset = blocks.codes.shape[0], 0 if kind == "Q8_0" else -TARGETS[kind].least
    codes = (blocks.codes + offset).view(torch.uint8).reshape(-1, 32)
    parts = [_as_half(blocks.scales)] + ([] if blocks.mins is None else [_as_half(blocks.mins)])
    if kind.startswith("Q5"):
        parts.append(_join_fifth(codes))
    parts.append(codes if kind == "Q8_0" else _join(codes & 15))
    return torch.cat(parts, dim=-1).reshape(rows, -1)


def half_losses(values: QuantizedWeight, name: str, losses: Losses) -> None:
    """Account for the scales and mins of a layer that blocks cannot hold.

    Raises:
        ValueError: for one that is infinite in float16.
        LossError: for one that float16 rounds, by the policy.
    """
    mins = values.zeros
    if mins is not None and mins.dtype == torch.uint8:
        mins = -(values.scales * mins)
    for what, exact in (("scales", values.scales), ("mins", mins)):
        if exact is not None:
            kept = exact.to(torch.float16).to(torch.float32)
            if not kept.isfinite().all():
                raise ValueError(f"{name} has {what} of {float(exact.abs().max()):g}, which float16 cannot hold")
            losses.changed(f"{name}.{what}", f"{what} that float16 cannot hold", exact, kept)
