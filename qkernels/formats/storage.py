"""`QuantizedWeight`: the canonical storage of a weight, and what its integers are."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .scheme import QuantScheme

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# |qx| <= 127 and -128 <= qw <= 127, so |sum qx * qw| <= 131072 * 127 * 128 = 2^31 - 2^24.
MAX_REDUCTION = 131072


class QuantizedWeight(NamedTuple):
    """The canonical storage of a weight [N, K]; shapes in `QuantScheme.storage_shapes`."""

    qweight: Tensor  # int8 [N, K] or uint8 [N, ceil(K / 2)]
    scales: Tensor  # float32 [N, groups]
    zeros: Tensor | None  # [N, groups]: uint8 zero points (`-asym`), float32 minima (`-min`), else None

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The weight of `function(tensor)` for each tensor that there is, such as some rows of it."""
        zeros = None if self.zeros is None else function(self.zeros)
        return QuantizedWeight(function(self.qweight), function(self.scales), zeros)


def storage_dtypes(scheme: QuantScheme) -> dict[str, torch.dtype]:
    """Dtypes of the stored tensors by name."""
    zeros = torch.float32 if scheme.has_min else torch.uint8
    return {"qweight": scheme.weight_format.dtype, "scales": torch.float32, "zeros": zeros}


def weight_integers(qweight: Tensor, zeros: Tensor | None, in_features: int, scheme: str | QuantScheme) -> Tensor:
    """The integers a weight is multiplied as: int8 [N, K]; for 4 bits `nibble - zero` (-15..15), or the nibble."""
    scheme = QuantScheme.parse(scheme)
    stored = scheme.weight_format.unpack(qweight, in_features).to(torch.int8)
    if scheme.has_min:
        return stored
    if zeros is not None:
        return stored - expand_groups(zeros.to(torch.int8), scheme.group_size, in_features)
    offset = scheme.weight_format.offset
    return stored - offset if offset else stored


def expand_groups(per_group: Tensor, group_size: int | None, in_features: int) -> Tensor:
    """[R, groups] -> [R, K]: each group's value repeated over its columns."""
    if group_size is None:
        return per_group.expand(-1, in_features)
    return per_group.repeat_interleave(group_size, dim=1)[:, :in_features]


def restore_features(weight: Tensor, input_order: Tensor | None) -> Tensor:
    """[N, K] whose column j is that of feature `input_order[j]` -> in the order of the features; None: as it is."""
    if input_order is None:
        return weight
    return weight.index_select(1, input_order.argsort())


def dequantize_weight(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, scheme: str | QuantScheme
) -> Tensor:
    """float32 [N, K]: each integer times its group's scale, rounded; plus its group's minimum, rounded again."""
    scheme = QuantScheme.parse(scheme)
    integers = weight_integers(qweight, zeros, in_features, scheme).to(torch.float32)
    values = integers * expand_groups(scales, scheme.group_size, in_features)
    if scheme.has_min and zeros is not None:
        values = values + expand_groups(zeros, scheme.group_size, in_features)
    return values


class QuantizedRows(NamedTuple):
    """A matrix [M, N] with one scale a row."""

    integers: Tensor  # int8 [M, N]
    scales: Tensor  # float32 [M]

    @property
    def device(self) -> torch.device:
        return self.integers.device


class StoredWeight(NamedTuple):
    """A weight [N, K] as an operator reads it: its canonical storage, K and the scheme.

    The weights of E experts are one, too: its tensors begin with a dimension of E, and `expert` gives each.

    Attributes:
        x_scale: float32 [1], the scale of the activations that are multiplied with it, where an operator of an `a8s`
            scheme reads these; else None.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    in_features: int
    scheme: QuantScheme
    x_scale: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.qweight.shape[-2]

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def expert(self, index: int) -> StoredWeight:
        """The weight of one expert."""
        return self.map(itemgetter(index))

    def rows(self, index: slice | Tensor) -> StoredWeight:
        """The weight of these rows."""
        return self.map(itemgetter(index))

    def map(self, function: Callable[[Tensor], Tensor]) -> StoredWeight:
        """The weight of `function(tensor)` for each tensor that there is."""
        zeros = None if self.zeros is None else function(self.zeros)
        return self._replace(qweight=function(self.qweight), scales=function(self.scales), zeros=zeros)

    def integers(self) -> Tensor:
        """`weight_integers`: int8 [N, K]."""
        return weight_integers(self.qweight, self.zeros, self.in_features, self.scheme)

    def dequantize(self) -> Tensor:
        """`dequantize_weight`: float32 [N, K]."""
        return dequantize_weight(self.qweight, self.scales, self.zeros, self.in_features, self.scheme)
