"""Weights of unsigned codes with scales by groups, as weight-only files state them, in the canonical storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.scheme import GROUP_SIZES, QuantScheme
from ..formats.storage import QuantizedWeight, dequantize_weight, expand_groups
from ..formats.weight_format import INT4, WEIGHT_FORMATS
from .losses import Losses
from .requantize import quantize_again


@dataclass(frozen=True)
class GroupedCodes:
    """How a file states a weight [N, K]: `w = (code - zero) * scale`, by groups along K.

    Codes of 1 to 4 bits are stored as 4, unless their groups are those of 8-bit weights alone; all others as 8. What
    has 8 bits then is the difference to the zero point, or, of 8-bit codes, has a float minimum in its place.

    Attributes:
        bits: of a code: 1 to 8.
        group_size: codes that share a scale; None: those of a row.
        symmetric: the zero point of every group is 2^(bits - 1), and is not given.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    @property
    def problem(self) -> str | None:
        """Why no scheme has these codes; None: one has."""
        if self.group_size is not None and self._stored[1] is None:
            return f"no scheme has groups of {self.group_size}"
        return None

    @property
    def _stored(self) -> tuple[int, int | None]:
        """Bits of a scheme, and the largest of its groups that all groups consist of."""
        formats = [bits for bits in sorted(WEIGHT_FORMATS) if bits >= self.bits]
        for bits in formats:
            sizes = [size for size in WEIGHT_FORMATS[bits].group_sizes if (self.group_size or 1) % size == 0]
            if sizes:
                return bits, max(sizes)
        return formats[0], None

    @property
    def scheme(self) -> QuantScheme:
        """What they are stored as; where no scheme has them, what they are quantized again to."""
        bits, group = self._stored
        if self.group_size is not None and group is None:
            group = min(GROUP_SIZES)
        if self.symmetric or self.bits < bits == 8:
            return QuantScheme(bits, 16, group)
        return QuantScheme(bits, 16, group, "min" if bits == 8 else "zero_point")

    def store(self, name: str, codes: Tensor, scales: Tensor, zeros: Tensor | None, losses: Losses) -> QuantizedWeight:
        """The canonical storage in `scheme`.

        Args:
            name: of the layer.
            codes: uint8 [N, K].
            scales: float32 [N, groups].
            zeros: uint8 [N, groups]; None where `symmetric`.
            losses: takes what a requantization changes.

        Raises:
            LossError: if it must be quantized again and the policy does not allow that.
        """
        scheme, in_features = self.scheme, codes.shape[1]
        if self.problem is not None:
            losses.need_requantization(name, self.problem)
            return quantize_again(f"{name}.weight", self._floats(codes, scales, zeros), scheme, losses)
        if scheme.has_min:
            return self._with_minima(name, codes, scales, zeros, losses)
        if scheme.weight_bits == 4:
            codes = codes if zeros is not None else codes + (INT4.offset - self._half)
            return self.store_nibbles(INT4.pack(codes), scales, zeros, in_features)
        return self._bytes(codes, scales, zeros)

    @property
    def _half(self) -> int:
        return 1 << self.bits - 1

    def _integers(self, codes: Tensor, zeros: Tensor | None) -> Tensor:
        """int16 [N, K]: codes less their zero points."""
        zero = self._half if zeros is None else expand_groups(zeros.to(torch.int16), self.group_size, codes.shape[1])
        return codes.to(torch.int16) - zero

    def _floats(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """float32 [N, K]: the weights."""
        return self._integers(codes, zeros) * expand_groups(scales, self.group_size, codes.shape[1])

    def _with_minima(
        self, name: str, codes: Tensor, scales: Tensor, zeros: Tensor | None, losses: Losses
    ) -> QuantizedWeight:
        """Codes of 8 bits: `(code - zero) * scale` as `(code - 128) * scale + (128 - zero) * scale`.

        With scales that were bfloat16 or float16 no sum is rounded.
        """
        in_features, center = codes.shape[1], torch.zeros_like(scales) if zeros is None else self._half - zeros.float()
        integers, minima = self._integers(codes, None).to(torch.int8), center * scales
        weight = QuantizedWeight(integers, self.split(scales, in_features), self.split(minima, in_features))
        kept = dequantize_weight(*weight, in_features, self.scheme)
        losses.changed(f"{name}.weight", "weights that float minima round", self._floats(codes, scales, zeros), kept)
        return weight

    def store_nibbles(self, qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int) -> QuantizedWeight:
        """As `store`, of codes of 4 bits that lie as the canonical storage has them, uint8 [N, ceil(K / 2)]."""
        if self.scheme.weight_bits == 8:
            return self._bytes(INT4.unpack(qweight, in_features), scales, zeros)
        zeros = None if zeros is None else self.split(zeros, in_features)
        return QuantizedWeight(qweight.contiguous(), self.split(scales, in_features), zeros)

    def _bytes(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> QuantizedWeight:
        integers = self._integers(codes, zeros).to(torch.int8)
        return QuantizedWeight(integers, self.split(scales, codes.shape[1]), None)

    def split(self, per_group: Tensor, in_features: int) -> Tensor:
        """[N, groups] of the file -> [N, groups] of the scheme, which may be smaller."""
        stored = self.scheme.group_size
        if self.group_size is None or stored is None or self.group_size == stored:
            return per_group.contiguous()
        groups = self.scheme.weight_groups(in_features)
        return per_group.repeat_interleave(self.group_size // stored, dim=1)[:, :groups].contiguous()


def stored_codes(weight: QuantizedWeight, in_features: int, scheme: QuantScheme) -> Tensor:
    """The inverse of `store`: unsigned codes, uint8 [N, K]; those of a symmetric weight are around 2^(bits - 1)."""
    if scheme.weight_bits == 8:
        return weight.qweight.view(torch.uint8) ^ 0x80
    return INT4.unpack(weight.qweight, in_features)


def half_scales(name: str, scales: Tensor, losses: Losses) -> Tensor:
    """The scales of a layer as float16, which weight-only formats hold.

    Raises:
        LossError: if some are rounded and the policy does not allow that.
        ValueError: if some are too large.
    """
    half = scales.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError(f"{name}.scales must be at most 65504 for float16, got {float(scales.abs().max()):g}")
    losses.changed(f"{name}.scales", "scales that float16 cannot hold", scales, half)
    return half


def input_order(name: str, indices: Tensor, group_size: int) -> Tensor | None:
    """The permutation of input features that sorts them by their groups; None if they are in order.

    Args:
        name: of the tensor.
        indices: int64 [K], the group of each feature.
        group_size: features that each group must have, but the last.

    Raises:
        ValueError: if groups have other sizes.
    """
    in_order = torch.arange(len(indices)) // group_size
    if torch.equal(indices, in_order):
        return None
    sorted_indices, order = indices.sort(stable=True)
    if not torch.equal(sorted_indices, in_order):
        raise ValueError(f"{name} must give each group {group_size} input features, and the last the rest")
    return order


def minima_of(name: str, exact: Tensor, losses: Losses) -> Tensor:
    """The floats that the groups of a layer add, as the canonical storage holds them: float32 [N, groups].

    Args:
        name: of the layer.
        exact: float64 [N, groups].
        losses: takes what float32 rounds.

    Raises:
        LossError: if it rounds some and the policy does not allow that.
    """
    kept = exact.to(torch.float32)
    losses.changed(f"{name}.zeros", "minima that float32 cannot hold", exact, kept)
    return kept
