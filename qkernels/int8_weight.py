"""`Int8Weight`: a weight that is int8 and can be trained, because it passes for a float tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import ops
from .stochastic import WEIGHT, draw_seed

_aten = torch.ops.aten


class Int8Weight(Tensor):
    """A weight [N, K] held as int8 with a float32 scale for each row; it reports a float dtype.

    An optimizer updates it in place. Such an operation is carried out on the dequantized weight, a temporary, and its
    result is rounded stochastically to int8, so that updates far below a step are not lost: the mean over the random
    numbers is the float result. Any other operation sees the dequantized weight and returns a plain tensor.

    Attributes:
        qweight: int8 [N, K].
        scales: float32 [N, 1].
    """

    @staticmethod
    def __new__(cls, qweight: Tensor, scales: Tensor, dtype: torch.dtype):
        return Tensor._make_wrapper_subclass(cls, qweight.shape, dtype=dtype, device=qweight.device)

    def __init__(self, qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.qweight, self.scales = qweight, scales

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self):
        return ["qweight", "scales"], [self.dtype]

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        return cls(inner["qweight"], inner["scales"], *context)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def dequantize(self) -> Tensor:
        """The weight as it is multiplied, rounded to the reported dtype."""
        return ops.dequantize_weight(self.qweight, self.scales, None, self.shape[1], "w8a16").to(self.dtype)

    def store(self, values: Tensor) -> None:
        """Take over float values [N, K], rounded stochastically with a seed from torch's default generator."""
        qweight, scales = ops.quantize_rows(values, None, draw_seed(), WEIGHT)
        self.qweight.copy_(qweight)
        self.scales.copy_(scales.unsqueeze(1))

    def _like(self, qweight: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
        return type(self)(qweight, scales, dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in (_aten.detach.default, _aten.alias.default):
            return first._like(first.qweight, first.scales)
        if func is _aten.clone.default:
            return first._like(first.qweight.clone(), first.scales.clone())
        if func is _aten._to_copy.default and kwargs.get("dtype", first.dtype).is_floating_point:
            moved = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
            inner = (_aten._to_copy.default(tensor, **moved) for tensor in (first.qweight, first.scales))
            return first._like(*inner, kwargs.get("dtype"))
        if func is _aten.copy_.default and isinstance(first, cls) and isinstance(args[1], cls):
            first.qweight.copy_(args[1].qweight)
            first.scales.copy_(args[1].scales)
            return first
        return _on_floats(func, args, kwargs)


def _on_floats(func, args, kwargs):
    """Run an operation on dequantized weights, and store those that it wrote to."""
    floats: dict[int, Tensor] = {}

    def dequantized(weight: Int8Weight) -> Tensor:
        return floats.setdefault(id(weight), weight.dequantize())

    result = func(*tree_map_only(Int8Weight, dequantized, args), **tree_map_only(Int8Weight, dequantized, kwargs))
    written = {}
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for weight in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(weight, Int8Weight):
                    weight.store(floats[id(weight)])
                    written[id(floats[id(weight)])] = weight
    return tree_map_only(Tensor, lambda tensor: written.get(id(tensor), tensor), result)
