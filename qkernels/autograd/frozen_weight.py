"""`FrozenWeight`: the `weight` of a layer that stores integers and scales."""

from __future__ import annotations

from operator import itemgetter, methodcaller
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..formats.storage import FLOAT_DTYPES, QuantizedWeight, restore_features
from ..kernels import ops
from .input_order import gather_features
from .layer_calls import refuse_write
from .weight_products import ReadOnly

_aten = torch.ops.aten


class Layer(Protocol):
    """A layer that has a quantized weight."""

    def quantized_weight(self) -> QuantizedWeight: ...


class FrozenWeight(ReadOnly):
    """The weight of a frozen layer as others see it: read-only, of the layer's compute dtype, without a copy.

    Products with it run the layer's kernel, with its gradients: `F.linear(x, w, bias)`, `x @ w.T`, `w @ x`, `mm`,
    `addmm`, and the same with a slice of rows `w[a:b]`. Looking up rows (`F.embedding`, `w[indices]`) dequantizes those
    rows. Every other operation sees the values rounded to `dtype` and returns plain tensors; so does `w.clone()`. A
    write raises RuntimeError, also one through a view such as `w[0]`.

    A layer makes one each time that `layer.weight` is read. It holds references to the layer's tensors, is no
    `nn.Parameter`, and is in no state dict. Pickling it stores the values.

    Example:
        >>> layer, x = qk.QuantLinear.from_float(nn.Linear(8, 4), "w8a8"), torch.ones(2, 8)
        >>> torch.equal(torch.nn.functional.linear(x, layer.weight, layer.bias), layer(x))
        True

    Attributes:
        stored: the canonical storage of [N, K]; None: `floats` are held instead (a view, or a copy written to).
        scheme, in_features, column_scales, x_scale: as in `quant_linear`.
        input_order: int32 [K], the feature that each stored column multiplies; None: in order.
        grad_mode: its `grad_dtype`, a name that means something else on tensors.
        transposed: True if the shape is [K, N].
        floats: a plain tensor, in place of the stored weight.
        writable: True for a copy (of another dtype or device), which is no layer's weight.
    """

    writable: bool
    # transformers initializes the tensors without this mark.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        stored: QuantizedWeight | None,
        scheme: str,
        in_features: int,
        dtype: torch.dtype,
        grad_dtype: str = "float",
        column_scales: Tensor | None = None,
        transposed: bool = False,
        floats: Tensor | None = None,
        writable: bool = False,
        *,
        x_scale: Tensor | None = None,
        input_order: Tensor | None = None,
    ) -> FrozenWeight:
        shape: tuple[int, ...]
        strides: tuple[int, ...]
        if stored is not None:
            shape, strides, device = (stored.qweight.shape[0], in_features), (in_features, 1), stored.qweight.device
            if transposed:
                shape, strides = shape[::-1], strides[::-1]
        elif floats is not None:
            shape, strides, dtype, device = floats.shape, floats.stride(), floats.dtype, floats.device
        else:
            raise TypeError("FrozenWeight takes a stored weight or floats, got neither")
        weight = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)
        weight.stored, weight.scheme, weight.in_features, weight.grad_mode = stored, scheme, in_features, grad_dtype
        weight.column_scales, weight.transposed, weight.floats = column_scales, transposed, floats
        weight.writable, weight.x_scale, weight.input_order = writable, x_scale, input_order
        return weight

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = ("column_scales", "floats", "x_scale", "input_order")
        tensors: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        if self.stored is not None:
            for name, tensor in self.stored._asdict().items():
                tensors[name] = tensor
                setattr(self, name, tensor)
        context = (self.scheme, self.in_features, self.dtype, self.grad_mode, self.transposed, self.writable)
        return [name for name, tensor in tensors.items() if tensor is not None], context

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> FrozenWeight:
        scheme, in_features, dtype, grad_dtype, transposed, writable = context
        stored = None
        if "qweight" in inner:
            stored = QuantizedWeight(inner["qweight"], inner["scales"], inner.get("zeros"))
        scales, floats = inner.get("column_scales"), inner.get("floats")
        rest = (scales, transposed, floats, writable)
        more = {name: inner.get(name) for name in ("x_scale", "input_order")}
        return cls(stored, scheme, in_features, dtype, grad_dtype, *rest, **more)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.dequantize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize().clone()

    def dequantize(self) -> Tensor:
        """The values as they are multiplied, rounded to `dtype`: a plain tensor of this shape."""
        if self.stored is None:
            assert self.floats is not None
            return self.floats
        values = ops.dequantize_weight(*self.stored, self.in_features, self.scheme).to(self.dtype)
        values = restore_features(values, self.input_order)
        return values.t() if self.transposed else values

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weight, or a plain tensor of the values of a view: collectives read the memory of contiguous tensors."""
        return self if self.floats is None else self.floats.clone(memory_format=torch.contiguous_format)

    def is_of(self, layer: Layer) -> bool:
        """True if this is the whole weight of the layer."""
        own, stored = self.stored, layer.quantized_weight()
        if own is None or own.qweight is not stored.qweight:
            return False
        return all(  # of floats each is a view, made when it was read
            mine is its or (mine is not None and its is not None and mine.data_ptr() == its.data_ptr())
            for mine, its in zip(own, stored, strict=True)
        )

    @property
    def multiplies(self) -> bool:
        """True for a whole matrix, which a kernel multiplies."""
        return self.stored is not None

    def like(self, **changes: Any) -> FrozenWeight:
        """This weight with `changes` of the constructor's arguments."""
        given = {
            "stored": self.stored,
            "scheme": self.scheme,
            "in_features": self.in_features,
            "dtype": self.dtype,
            "grad_dtype": self.grad_mode,
            "column_scales": self.column_scales,
            "transposed": self.transposed,
            "floats": self.floats,
            "writable": self.writable,
            "x_scale": self.x_scale,
            "input_order": self.input_order,
        }
        return FrozenWeight(**{**given, **changes})

    def look_up(self, indices: Tensor) -> Tensor:
        """The dequantized rows at integer `indices` [...]: plain [..., K]."""
        assert self.stored is not None
        found = self.stored.map(lambda tensor: tensor.index_select(0, indices.reshape(-1)))
        values = ops.dequantize_weight(*found, self.in_features, self.scheme).to(self.dtype)
        values = restore_features(values, self.input_order)
        return values.reshape(*indices.shape, self.in_features)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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


class FrozenKernel(FrozenWeight):
    """The weight [O, C / groups, ...] of a frozen convolution as others see it: read-only, made float when it is used.

    Args:
        stored: the canonical storage of the matrix [O, K] of the kernels.
        scheme, in_features, dtype: as in `FrozenWeight`.
        shape: of the weight, of three or four dimensions.
    """

    @staticmethod
    def __new__(
        cls, stored: QuantizedWeight, scheme: str, in_features: int, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> FrozenKernel:
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=stored.qweight.device)
        weight.stored, weight.scheme, weight.in_features, weight.grad_mode = stored, scheme, in_features, "float"
        weight.column_scales, weight.transposed, weight.floats, weight.writable = None, False, None, False
        weight.input_order = None
        return weight

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        assert self.stored is not None
        tensors = {name: tensor for name, tensor in self.stored._asdict().items() if tensor is not None}
        vars(self).update(tensors)
        return [*tensors], (self.scheme, self.in_features, self.dtype, tuple(self.shape))

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> FrozenKernel:
        return cls(QuantizedWeight(inner["qweight"], inner["scales"], inner.get("zeros")), *context)

    def dequantize(self) -> Tensor:
        assert self.stored is not None
        rows = ops.dequantize_weight(*self.stored, self.in_features, self.scheme).to(self.dtype)
        return rows.unflatten(1, (*self.shape[2:], -1)).movedim(-1, 1).contiguous()

    @property
    def multiplies(self) -> bool:
        return False

    def like(self, **changes: Any) -> FrozenWeight:
        if "floats" in changes:
            return FrozenWeight(None, self.scheme, self.in_features, self.dtype, floats=changes["floats"])
        assert self.stored is not None
        return FrozenKernel(self.stored, self.scheme, self.in_features, self.dtype, tuple(self.shape))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0].like()
        return _on_values(func, args, kwargs or {})


def _on_storage(func: Any, weight: FrozenWeight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that the integers allow; None: another operation."""
    if func in (_aten.detach.default, _aten.alias.default):
        return weight.like()
    if weight.stored is None:
        return None
    if func is _aten._to_copy.default and kwargs.get("dtype", weight.dtype) in FLOAT_DTYPES:
        dtype, device = kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
        if torch.device(device).type == weight.device.type or weight.is_meta:
            return weight.like(dtype=dtype, writable=True)
        stored = weight.stored.map(lambda tensor: tensor.detach().to(device))
        others = {name: getattr(weight, name) for name in ("column_scales", "x_scale", "input_order")}
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in others.items()}
        return weight.like(stored=stored, **moved, dtype=dtype, writable=True)
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
        return weight.like(stored=None, column_scales=None, floats=row)
    if func is _aten.index_select.default and args[0] % 2 == 0:
        return weight.look_up(args[1])
    if func is _aten.index.Tensor and len(args[0]) == 1 and args[0][0].dtype in (torch.int64, torch.int32):
        indices = args[0][0]
        return weight.look_up(torch.where(indices < 0, indices + weight.shape[0], indices))
    if func is _aten.embedding.default:
        return weight.look_up(args[0])
    return None


def _slice(weight: FrozenWeight, start: int | None = None, end: int | None = None, step: int = 1) -> FrozenWeight:
    """Some rows as a weight. The column scales are those of all rows, and would be wrong here."""
    assert weight.stored is not None
    stored = weight.stored.map(itemgetter(slice(start, end, step)))
    return weight.like(stored=stored, column_scales=None, grad_dtype="float", writable=False)


def _product_without_gradient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`mm` and `addmm` with a transposed weight below autograd; None: the kernel does not compute this."""
    bias, x, weight = (None, *args[:2]) if func is _aten.mm.default else args[:3]
    stored = weight.stored if isinstance(weight, FrozenWeight) and weight.transposed else None
    if stored is None:
        return None
    if isinstance(x, FrozenWeight) or isinstance(bias, FrozenWeight) or kwargs or x.dtype not in FLOAT_DTYPES:
        return None
    x = gather_features(x, weight.input_order)
    if bias is None or bias.shape == weight.shape[1:]:
        return ops.linear(x, *stored, bias, weight.scheme, x_scale=weight.x_scale)
    return ops.linear(x, *stored, None, weight.scheme, x_scale=weight.x_scale) + bias


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        weight.floats, weight.stored, weight.column_scales = weight.dequantize().contiguous(), None, None
    floats = {id(weight.floats): weight for weight in written}
    result = func(
        *tree_map_only(FrozenWeight, methodcaller("dequantize"), args),
        **tree_map_only(FrozenWeight, methodcaller("dequantize"), kwargs),
    )
    if written:
        return tree_map_only(Tensor, lambda tensor: floats.get(id(tensor), tensor), result)
    if viewed is not None and not viewed.writable:  # a view of the weight must not take a write either
        return tree_map_only(Tensor, lambda tensor: viewed.like(stored=None, column_scales=None, floats=tensor), result)
    return result
