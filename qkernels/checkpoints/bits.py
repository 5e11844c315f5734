"""Codes of a few bits in a dense stream, low bits first, as GPTQ, compressed-tensors, MLX and ONNX pack them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def unpack_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes of a stream.

    Args:
        words: integers of any size [..., W], whose bytes are the stream.
        bits: of a code, 1 to 8.
        count: codes in each row of the stream.

    Returns:
        uint8 [..., count].

    Raises:
        ValueError: if the words hold fewer codes.
    """
    # Of a dimension of 1 any stride is contiguous, but not any has a view of bytes: the flat words have.
    stream = words.flatten().view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * words.element_size())
    if stream.shape[-1] * 8 < count * bits:
        raise ValueError(f"words must hold {count} codes of {bits} bits a row, got {stream.shape[-1]} bytes")
    if 8 % bits == 0:  # no code lies in two bytes
        places = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes = (stream.unsqueeze(-1) >> places & (1 << bits) - 1).flatten(-2)
        return codes[..., :count].contiguous()
    first = torch.arange(count) * bits
    low, shift = first // 8, (first % 8).to(torch.int32)
    wide = pad(stream, (0, 1)).to(torch.int32)
    both = wide[..., low] | wide[..., low + 1] << 8
    return (both >> shift & (1 << bits) - 1).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_codes`: codes [..., n] below 2^bits -> int32 words [..., ceil(n * bits / 32)]."""
    count = codes.shape[-1]
    words = -(-count * bits // 32)
    if 8 % bits == 0:
        per_byte = 8 // bits
        codes = pad(codes.to(torch.uint8), (0, words * 4 * per_byte - count)).unflatten(-1, (-1, per_byte))
        stream = codes[..., 0]
        for place in range(1, per_byte):
            stream = stream | codes[..., place] << bits * place
        return stream.flatten().view(torch.int32).view(*codes.shape[:-2], words)
    stream = torch.zeros((*codes.shape[:-1], words * 4 + 1), dtype=torch.int32)
    first = torch.arange(count) * bits
    wide = codes.to(torch.int32) << (first % 8).to(torch.int32)
    stream.index_add_(-1, first // 8, wide & 0xFF)  # the bits of different codes do not meet: a sum is an or
    stream.index_add_(-1, first // 8 + 1, wide >> 8)
    flat = stream[..., :-1].to(torch.uint8).flatten().view(torch.int32)
    return flat.view(*codes.shape[:-1], words)
