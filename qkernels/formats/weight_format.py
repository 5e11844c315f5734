"""`WeightFormat`: how the integers of a weight are stored, whatever scales and groups they have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class WeightFormat:
    """The integers of a weight in memory; a scheme adds groups, zero points and the activations.

    A stored value is the integer that is multiplied plus `offset`, or plus the zero point of its group.

    Attributes:
        bits: of a stored value.
        dtype: of `qweight`.
        least, greatest: the integers that rounding gives a weight without zero points. A stored int8 may also be
            -128, which other writers use.
        offset: what is added to them in memory.
        codes: the least and the greatest stored value that a weight with minima is rounded to.
        has_zeros: True if its groups may have zero points.
        group_sizes: how many of them may share a scale.
    """

    bits: int
    dtype: torch.dtype
    least: int
    greatest: int
    offset: int
    codes: tuple[int, int]
    has_zeros: bool
    group_sizes: tuple[int, ...] = (32, 64, 128)

    @property
    def largest(self) -> int:
        """The largest magnitude of an integer that is multiplied, with zero points or without."""
        return 2**self.bits - 1 if self.has_zeros else 2 ** (self.bits - 1)

    @property
    def per_byte(self) -> int:
        """Stored values in a byte."""
        return 8 // self.bits

    @property
    def zero_byte(self) -> int:
        """The byte whose integers are all 0, in a weight without zero points."""
        return sum(self.offset << self.bits * place for place in range(self.per_byte))

    def packed_columns(self, in_features: int) -> int:
        """Bytes of a row of `qweight` that holds `in_features` integers."""
        return -(-in_features // self.per_byte)

    def pack(self, stored: Tensor) -> Tensor:
        """Stored values [N, K] -> `qweight` [N, packed columns], the first of a byte in its low bits, padded with 0."""
        if self.per_byte == 1:
            return stored.to(self.dtype)
        stored = pad(stored.to(self.dtype), (0, -stored.shape[-1] % self.per_byte))
        packed = stored[..., 0 :: self.per_byte]
        for place in range(1, self.per_byte):
            packed = packed | (stored[..., place :: self.per_byte] << self.bits * place)
        return packed

    def unpack(self, qweight: Tensor, in_features: int) -> Tensor:
        """The inverse of `pack`: `qweight` [N, packed columns] -> stored values [N, in_features] of the same dtype."""
        if self.per_byte == 1:
            return qweight
        mask = 2**self.bits - 1
        parts = [qweight >> self.bits * place & mask for place in range(self.per_byte)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :in_features]


INT8 = WeightFormat(
    bits=8,
    dtype=torch.int8,
    least=-127,
    greatest=127,
    offset=0,
    codes=(-127, 127),
    has_zeros=False,
    group_sizes=(16, 32, 64, 128),
)
INT4 = WeightFormat(bits=4, dtype=torch.uint8, least=-8, greatest=7, offset=8, codes=(0, 15), has_zeros=True)
WEIGHT_FORMATS = {weight_format.bits: weight_format for weight_format in (INT8, INT4)}
