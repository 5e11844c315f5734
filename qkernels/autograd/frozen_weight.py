"""`FrozenWeight`: what `layer.weight` is where the weight is stored as integers and scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..formats.storage import FLOAT_DTYPES, QuantizedWeight
from ..kernels import ops
from .weight_products import ReadOnly, refuse_write

_aten = torch.ops.aten


class FrozenWeight(ReadOnly, Tensor):
    """The weight of a frozen layer as others see it: read-only, of the layer's compute dtype, without a copy.

    Products with it run the layer's kernel, with its gradients: `F.linear(x, w, bias)`, `x @ w.T`, `w @ x`, `mm`,
    `addmm`, and the same with a slice of rows `w[a:b]`. Looking up rows (`F.embedding`, `w[indices]`) dequantizes those
    rows. Every other operation sees the values rounded to `dtype` and returns plain tensors; so does `w.clone()`. A
    write raises RuntimeError, also one through a view such as `w[0]`.

    A layer makes one each time that `layer.weight` is read. It holds references to the layer's tensors, is no
    `nn.Parameter`, and is in no state dict. Pickling it stores the values.

    Example:
        >>> layer = QuantLinear.from_float(nn.Linear(8, 4), "w8a8")
        >>> torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))
        True

    Attributes:
        storage: the canonical storage of [N, K]; None: `values` are held instead (a view, or a copy written to).
        transposed: whether its shape is [K, N].
        values: a plain tensor, in place of the storage.
        writable: whether it is a copy (of another dtype or device), which is no layer's weight.
    """

    # transformers initializes the tensors without this mark.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        storage: QuantizedWeight | None,
        scheme: str,
        in_features: int,
        dtype: torch.dtype,
        grad_dtype: str = "float",
        columns: Tensor | None = None,
        transposed: bool = False,
        values: Tensor | None = None,
        writable: bool = False,
    ):
        if storage is None:
            return Tensor._make_wrapper_subclass(
                cls, values.shape, strides=values.stride(), dtype=values.dtype, device=values.device
            )
        shape = (storage.qweight.shape[0], in_features)
        strides = (in_features, 1)
        if transposed:
            shape, strides = shape[::-1], strides[::-1]
        return Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=storage.qweight.device)

    def __init__(
        self,
        storage: QuantizedWeight | None,
        scheme: str,
        in_features: int,
        dtype: torch.dtype,
        grad_dtype: str = "float",
        columns: Tensor | None = None,
        transposed: bool = False,
        values: Tensor | None = None,
        writable: bool = False,
    ) -> None:
        self.storage, self.scheme, self.in_features, self.grad_mode = storage, scheme, in_features, grad_dtype
        self.columns, self.transposed, self.values, self.writable = columns, transposed, values, writable

    def __tensor_flatten__(self):
        tensors = {"columns": self.columns, "values": self.values}
        tensors.update(self.storage._asdict() if self.storage is not None else {})
        for name, tensor in tensors.items():
            if name in QuantizedWeight._fields:
                setattr(self, name, tensor)
        context = (self.scheme, self.in_features, self.dtype, self.grad_mode, self.transposed, self.writable)
        return [name for name, tensor in tensors.items() if tensor is not None], context

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        scheme, in_features, dtype, grad_dtype, transposed, writable = context
        storage = None
        if "qweight" in inner:
            storage = QuantizedWeight(*(inner.get(name) for name in QuantizedWeight._fields))
        columns, values = inner.get("columns"), inner.get("values")
        return cls(storage, scheme, in_features, dtype, grad_dtype, columns, transposed, values, writable)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol):
        return self.dequantize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.dequantize().clone()

    def dequantize(self) -> Tensor:
        """The values as they are multiplied, rounded to `dtype`: a plain tensor of this shape."""
        if self.storage is None:
            return self.values
        values = ops.dequantize_weight(*self.storage, self.in_features, self.scheme).to(self.dtype)
        return values.t() if self.transposed else values

    def is_of(self, layer: torch.nn.Module) -> bool:
        """Whether it is the whole weight of the layer."""
        own, stored = self.storage, layer.quantized_weight()
        if own is None or own.qweight is not stored.qweight or own.zeros is not stored.zeros:
            return False
        return own.scales.data_ptr() == stored.scales.data_ptr()  # each is a view made when it was read

    @property
    def multiplies(self) -> bool:
        """Whether it is a whole matrix that a kernel multiplies."""
        return self.storage is not None

    def like(self, **changes) -> FrozenWeight:
        """The same weight, but for `changes` of the constructor's arguments."""
        given = {
            "storage": self.storage,
            "scheme": self.scheme,
            "in_features": self.in_features,
            "dtype": self.dtype,
            "grad_dtype": self.grad_mode,
            "columns": self.columns,
            "transposed": self.transposed,
            "values": self.values,
            "writable": self.writable,
        }
        return FrozenWeight(**{**given, **changes})

    def rows(self, take) -> QuantizedWeight:
        """The storage of those rows that `take` takes from a tensor."""
        return QuantizedWeight(*(None if tensor is None else take(tensor) for tensor in self.storage))

    def look_up(self, indices: Tensor) -> Tensor:
        """The dequantized rows at integer `indices` [...]: plain [..., K]."""
        found = self.rows(lambda tensor: tensor.index_select(0, indices.reshape(-1)))
        values = ops.dequantize_weight(*found, self.in_features, self.scheme).to(self.dtype)
        return values.reshape(*indices.shape, self.in_features)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        weight = args[0] if args and isinstance(args[0], FrozenWeight) else None
        if weight is not None:
            result = _on_storage(func, weight, args[1:], kwargs)
            if result is not None:
                return result
        if func in (_aten.mm.default, _aten.addmm.default):
            result = _product_without_gradient(func, args, kwargs)
            if result is not None:
                return result
        return _on_values(func, args, kwargs)


def _on_storage(func, weight: FrozenWeight, args, kwargs):
    """The result of an operation that the integers allow; None: another operation."""
    if func in (_aten.detach.default, _aten.alias.default):
        return weight.like()
    if weight.storage is None:
        return None
    if func is _aten._to_copy.default and kwargs.get("dtype", weight.dtype) in FLOAT_DTYPES:
        dtype, device = kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
        if torch.device(device).type == weight.device.type or weight.is_meta:
            return weight.like(dtype=dtype, writable=True)
        storage = weight.rows(lambda tensor: tensor.detach().to(device))
        columns = None if weight.columns is None else weight.columns.to(device)
        return weight.like(storage=storage, columns=columns, dtype=dtype, writable=True)
    swaps = (
        func is _aten.t.default
        or (func is _aten.transpose.int and {axis % 2 for axis in args} == {0, 1})
        or (func is _aten.permute.default and [axis % 2 for axis in args[0]] == [1, 0])
    )
    if swaps:
        return weight.like(transposed=not weight.transposed, writable=False)
    if weight.transposed:
        return None
    if func is _aten.slice.Tensor and (args[0] if args else 0) % 2 == 0:
        return _slice(weight, *args[1:])
    if func is _aten.split.Tensor and (args[1] if len(args) > 1 else 0) % 2 == 0:
        return [_slice(weight, start, start + args[0]) for start in range(0, weight.shape[0], args[0])]
    if func is _aten.select.int and args[0] % 2 == 0 and not weight.writable:
        index = range(weight.shape[0])[args[1]]
        row = _slice(weight, index, index + 1).dequantize()[0]
        return weight.like(storage=None, columns=None, values=row)
    if func is _aten.index_select.default and args[0] % 2 == 0:
        return weight.look_up(args[1])
    if func is _aten.index.Tensor and len(args[0]) == 1 and args[0][0].dtype in (torch.int64, torch.int32):
        indices = args[0][0]
        return weight.look_up(torch.where(indices < 0, indices + weight.shape[0], indices))
    if func is _aten.embedding.default:
        return weight.look_up(args[0])
    return None


def _slice(weight: FrozenWeight, start=None, end=None, step=1) -> FrozenWeight:
    """Rows of the weight as a weight. The columns' scales are those of all rows, and would be wrong here."""
    storage = weight.rows(lambda tensor: tensor[start:end:step])
    return weight.like(storage=storage, columns=None, grad_dtype="float", writable=False)


def _product_without_gradient(func, args, kwargs):
    """`mm` and `addmm` with a transposed weight below autograd; None: the kernel does not compute this."""
    bias, x, weight = (None, *args[:2]) if func is _aten.mm.default else args[:3]
    if not (isinstance(weight, FrozenWeight) and weight.multiplies and weight.transposed):
        return None
    if isinstance(x, FrozenWeight) or isinstance(bias, FrozenWeight) or kwargs or x.dtype not in FLOAT_DTYPES:
        return None
    if bias is None or bias.shape == weight.shape[1:]:
        return ops.linear(x, *weight.storage, bias, weight.scheme)
    return ops.linear(x, *weight.storage, None, weight.scheme) + bias


def _on_values(func, args, kwargs):
    """Run an operation on the dequantized values; a write to a weight is refused."""
    arguments = list(zip(func._schema.arguments, args, strict=False))
    arguments += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    viewed, written = None, []  # a copy that is written to, or viewed, holds its values from then on
    for argument, value in arguments:
        if argument.alias_info is None:
            continue
        for weight in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(weight, FrozenWeight):
                continue
            if not argument.alias_info.is_write:
                viewed = weight
            elif weight.writable:
                written.append(weight)
            else:
                raise refuse_write(f"{func} would write to it")
    for weight in written + ([viewed] if viewed is not None and viewed.writable else []):
        weight.values, weight.storage, weight.columns = weight.dequantize().contiguous(), None, None
    floats = {id(weight.values): weight for weight in written}
    result = func(
        *tree_map_only(FrozenWeight, FrozenWeight.dequantize, args),
        **tree_map_only(FrozenWeight, FrozenWeight.dequantize, kwargs),
    )
    if written:
        return tree_map_only(Tensor, lambda tensor: floats.get(id(tensor), tensor), result)
    if viewed is not None and not viewed.writable:  # a view of the weight must not take a write either
        return tree_map_only(Tensor, lambda tensor: viewed.like(storage=None, columns=None, values=tensor), result)
    return result
