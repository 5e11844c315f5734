"""Arguments of the operators' schemas, bundled for the functions that are written in Python.

A schema takes a weight as several arguments: `qweight`, `scales`, `zeros`, the scheme's code, `in_features` where x
does not tell it, and `x_scale` of static activations. Checks, fake kernels, the reference and Triton's plans take one
`StoredWeight` in their place, and one `QuantizedRows` in the place of a quantized gradient and its scales.
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
    # A matrix x has K columns, and images [N, H, W, C] have C channels; a check tells if it is neither.
    in_features = args[places["in_features"]] if "in_features" in places else (args[0].shape or (0,))[-1]
    qweight, scales, zeros = args[weight : weight + 3]
    dropped = {places["scheme"], places.get("in_features"), places.get("x_scale")}
    rest = [value for place, value in enumerate(args) if place >= weight + 3 and place not in dropped]
    if "geometry" in places:  # after bias
        rest[1] = ConvGeometry(*rest[1])
        in_features = rest[1].in_features(in_features)
    before = (QuantizedRows(*args[:2]), *args[2:weight]) if "q_grad" in places else args[:weight]
    x_scale = args[places["x_scale"]] if places.get("x_scale", len(args)) < len(args) else None
    return *before, StoredWeight(qweight, scales, zeros, in_features, scheme, x_scale), *rest


class ConvGeometry(NamedTuple):
    """How the kernel of a convolution moves over images [N, H, W, C]: what `torch.nn.Conv2d` says in pairs.

    Attributes:
        left, right, top, bottom: columns and rows of zeros around each image.
        groups: of channels, and of output channels.
    """

    kernel_height: int
    kernel_width: int
    stride_height: int = 1
    stride_width: int = 1
    dilation_height: int = 1
    dilation_width: int = 1
    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
    groups: int = 1

    def in_features(self, channels: int) -> int:
        """K: values of a patch in one group."""
        return self.kernel_height * self.kernel_width * (channels // max(self.groups, 1))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for images of this size."""
        rows = self.top + height + self.bottom - self.dilation_height * (self.kernel_height - 1) - 1
        columns = self.left + width + self.right - self.dilation_width * (self.kernel_width - 1) - 1
        return rows // self.stride_height + 1, columns // self.stride_width + 1


class LossOptions(NamedTuple):
    """The keywords of `linear_cross_entropy`; see there."""

    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
