"""A layer of a checkpoint as a model wants it: in which scheme, and its tensors, read when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..checkpoints.checkpoint import LayerWeight
from ..convert.schemes import SchemeRules, matches
from ..formats.scheme import QuantScheme
from ..system import heap

Activations = Literal["int8", "float"]
ACTIVATIONS = ("int8", "float")


@dataclass(frozen=True)
class Wishes:
    """What a caller wants of the layers of a checkpoint.

    Attributes:
        rules: schemes that were asked for; None: what the checkpoint says.
        of_embeddings: the scheme of embeddings, if one was asked for.
        skip, include: patterns of the layers that are to be in float, or not; as in `quantize_`.
        activations: "int8" or "float", for layers whose scheme nobody asked for; None: what the checkpoint says.
        act_group_size: of int8 activations that the checkpoint says nothing of.
    """

    rules: SchemeRules | None = None
    of_embeddings: QuantScheme | None = None
    skip: Sequence[str] = ()
    include: Sequence[str] | None = None
    activations: Activations | None = None
    act_group_size: int | None = None

    def scheme(self, stored: QuantScheme, names: Iterable[str], lookup: bool) -> QuantScheme | None:
        """The scheme of a layer in the model; None: it is to be in float.

        Args:
            stored: its scheme in the checkpoint.
            names: of the layer in the model.
            lookup: it is an embedding.
        """
        names = list(names)

        def named(patterns: Iterable[str]) -> bool:
            return any(matches(pattern, name) for pattern in patterns for name in names)

        if named(self.skip) or (self.include is not None and not named(self.include)):
            return None
        if lookup and self.of_embeddings is not None:
            return self.of_embeddings
        if self.rules is not None and not lookup:
            return self.rules.of(names)
        if self.rules is not None and self.rules.by_pattern and self.rules.of(names) is None:
            return None
        return self.with_activations(stored)

    def with_activations(self, stored: QuantScheme) -> QuantScheme:
        """The stored weight with the activations that are wanted."""
        if self.activations == "float":
            return stored.of_floats
        if self.activations == "int8" and not stored.int_activations:
            return replace(stored, act_bits=8, act_group_size=self.act_group_size)
        return stored


class LayerTensors:
    """The tensors of one layer by name, which are read together when the first is asked for, and each given once.

    Args:
        names: of the tensors that will be asked for.
        read: reads the values.
        lock: held while values are read, so that one layer at a time is unpacked.
    """

    def __init__(self, names: Sequence[str], read: Callable[[], LayerWeight], lock: threading.Lock) -> None:
        self.names, self._read, self._lock = tuple(names), read, lock
        self._values: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._values:
                values = self._read()
                found = {**values.weight._asdict(), "x_scale": values.x_scale, "input_order": values.input_order}
                self._values = {key: found[key] for key in self.names}
                heap.trim()  # what was needed to unpack it, which the heap would keep
            return self._values.pop(name)


class LazyTensor:
    """A tensor that is read when it is indexed, as a slice of safetensors is."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self._read = torch.Size(shape), dtype, read

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: object) -> Tensor:
        return self._read()[index]  # type: ignore[index]
