"""Arguments of the operators' schemas, bundled for the functions that are written in Python.

A schema takes a weight as several arguments: `qweight`, `scales`, `zeros`, the scheme's code, and `in_features` where x
does not tell it. Checks, fake kernels, the reference and Triton's plans take one `StoredWeight` in their place, and one
`QuantizedRows` in the place of a quantized gradient and its scales.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedRows, StoredWeight


@cache
def names(operator: str) -> tuple[str, ...]:
    """The names of the arguments in the operator's schema."""
    return tuple(argument.name for argument in getattr(torch.ops.qkernels, operator).default._schema.arguments)


@cache
def _places(operator: str) -> dict[str, int]:
    return {name: place for place, name in enumerate(names(operator))}


def scheme_of(operator: str, args: tuple[Any, ...]) -> QuantScheme | None:
    """The scheme of a call; None if the operator takes none.

    Raises:
        ValueError: if the code is that of no scheme.
    """
    place = _places(operator).get("scheme")
    if place is None:
        return None
    given = args[place]
    return QuantScheme.from_code(given) if isinstance(given, int) else QuantScheme.parse(given)


def bundle(operator: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments of a call, with the scheme parsed, and one `StoredWeight` instead of its parts.

    Args:
        operator: its name in `torch.ops.qkernels`.
        args: as its schema has them; the scheme may also be a name or a `QuantScheme`.

    Raises:
        ValueError: if the scheme is none.

    Example:
        `bundle("linear", (x, qweight, scales, zeros, bias, code, None))` is
        `(x, StoredWeight(qweight, scales, zeros, x.shape[1], scheme), bias, None)`.
    """
    scheme, places = scheme_of(operator, args), _places(operator)
    if scheme is None:
        return args
    if "qweight" not in places:
        return tuple(scheme if place == places["scheme"] else value for place, value in enumerate(args))
    weight = places["qweight"]
    # A matrix x has K columns; a check tells if it is none.
    in_features = args[places["in_features"]] if "in_features" in places else (args[0].shape or (0,))[-1]
    qweight, scales, zeros = args[weight : weight + 3]
    dropped = {places["scheme"], places.get("in_features")}
    rest = (value for place, value in enumerate(args) if place >= weight + 3 and place not in dropped)
    before = (QuantizedRows(*args[:2]), *args[2:weight]) if "q_grad" in places else args[:weight]
    return *before, StoredWeight(qweight, scales, zeros, in_features, scheme), *rest


class LossOptions(NamedTuple):
    """The keywords of `linear_cross_entropy`; see there."""

    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
