"""Products with `layer.weight`: whoever multiplies the weight of a layer gets the product that the layer computes.

Parents of a layer, losses and adapters read its weight, and some multiply it themselves. The tensors here see the
functions they are passed to. A frozen layer's is a `FrozenWeight`; `follow` makes one of the parameter that is trained.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, QuantizedWeight
from ..kernels import ops
from .frozen import quant_linear
from .input_order import gather_features
from .int8_weight import Int8Weight, Int8WeightView
from .layer_calls import autocast_dtype, check_input, refuse_write
from .trained import trained_linear


class Operand(Tensor):
    """A tensor that is the weight of a layer, or rows of it: its products are those of the layer.

    Attributes:
        transposed: True if its shape is [K, N].
    """

    transposed = False

    @property
    def multiplies(self) -> bool:
        """True if a kernel multiplies it."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _torch_function(func, args, kwargs or {})


class ReadOnly(Operand):
    """An operand that refuses writes: `FrozenWeight`, which documents the attributes."""

    stored: QuantizedWeight | None
    floats: Tensor | None
    scheme: str
    in_features: int
    grad_mode: str
    column_scales: Tensor | None
    x_scale: Tensor | None
    input_order: Tensor | None

    def dequantize(self) -> Tensor:
        raise NotImplementedError

    def like(self, **changes: Any) -> ReadOnly:
        raise NotImplementedError


class TrainedLayer(Protocol):
    """A layer of mode "qat" or "int8"; the parameter `scales`, if there is one, holds the learned scales."""

    scheme: QuantScheme
    grad_dtype: str
    _parameters: dict[str, nn.Parameter | None]

    def _activation_scale(self) -> Tensor | None: ...


class _Product(NamedTuple):
    """How a trained weight is multiplied: the scheme, `grad_dtype`, the learned scales if any, and its layer."""

    scheme: QuantScheme
    grad_dtype: str
    scales: Tensor | None
    layer: Callable[[], TrainedLayer | None]


class _Trained(Operand):
    """A trained weight, or rows of it, whose products are those of its layer: the base of the classes below.

    Attributes:
        product: how it is multiplied; None (after a copy): like any tensor.
    """

    product: _Product | None = None

    @property
    def multiplies(self) -> bool:
        return self.product is not None and self.dim() == 2

    def rounded(self) -> Tensor:
        """The values that are multiplied, with a gradient that passes straight through to this weight."""
        own = self.unwrapped if isinstance(self, TracedWeight) else self
        weight = (own.t() if self.transposed else own).detach()
        if not isinstance(weight, Int8Weight):
            assert self.product is not None
            scheme, _, scales, _ = self.product
            rows = weight.movedim(1, -1).flatten(1)  # of the kernels of a convolution; a matrix as it is
            if scales is None:
                stored = ops.quantize_weight(rows, scheme)
            else:
                stored = QuantizedWeight(ops.quantize_weight_scaled(rows, scales, scheme), scales.detach(), None)
            rows = ops.dequantize_weight(*stored, rows.shape[1], scheme).to(weight.dtype)
            weight = rows.view(len(rows), *weight.shape[2:], -1).movedim(-1, 1)
        else:
            weight = weight.dequantize()
        weight = weight.t() if self.transposed else weight
        with torch._C.DisableTorchFunctionSubclass():
            return own + (weight - own.detach()) if own.requires_grad and torch.is_grad_enabled() else weight


class TrainedWeight(_Trained, nn.Parameter):
    """A float weight of mode "qat" that was read as `layer.weight`. See `follow`.

    Called as accelerate calls the class of a parameter, to make another one, it makes a plain parameter.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(data.as_subclass(Tensor), requires_grad)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


class TrainedInt8Weight(_Trained, Int8Weight):  # type: ignore[misc]
    """A weight of mode "int8" that was read as `layer.weight`. See `follow`."""


class TrainedInt8View(_Trained, Int8WeightView):  # type: ignore[misc]
    """The transpose of a `TrainedInt8Weight`."""


class TrainedView(_Trained, Tensor):
    """Rows of a `TrainedWeight`, perhaps transposed or cast, or a float weight that pruning computes."""


class TracedWeight(_Trained):
    """A trained weight, or rows of it, in a program that torch.export records, where no class can change.

    It sees the functions that it is passed to, as the classes above do, and hands the tensor that it stands for to
    those that are no products.

    Args:
        rows: the weight, or rows of it, as the parameter is shaped.
        scheme, grad_dtype, scales: as in `trained_linear`.
        x_scale: float32 [1], the scale of static activations.
        transposed: True for the transpose of the rows.
    """

    rows: Tensor
    scheme: QuantScheme
    grad_mode: str
    scales: Tensor | None
    x_scale: Tensor | None

    @staticmethod
    def __new__(
        cls,
        rows: Tensor,
        scheme: QuantScheme,
        grad_dtype: str,
        scales: Tensor | None,
        x_scale: Tensor | None,
        transposed: bool = False,
    ) -> TracedWeight:
        shape, strides = tuple(rows.shape), tuple(rows.stride())
        if transposed:
            shape, strides = shape[::-1], strides[::-1]
        weight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=rows.dtype, device=rows.device, requires_grad=rows.requires_grad
        )
        weight.rows, weight.scheme, weight.grad_mode, weight.scales = rows, scheme, grad_dtype, scales
        weight.x_scale, weight.transposed = x_scale, transposed
        return weight

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def unwrapped(self) -> Tensor:
        """The tensor that this stands for."""
        with torch._C.DisableTorchFunctionSubclass():  # of a parameter that was read before
            if not self.transposed:
                return self.rows
            return (self.rows.dequantize() if isinstance(self.rows, Int8Weight) else self.rows).t()

    @property
    def multiplies(self) -> bool:
        return self.rows.dim() == 2

    @property
    def product(self) -> _Product:  # type: ignore[override]
        return _Product(self.scheme, self.grad_mode, self.scales, _no_layer)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = [name for name in ("rows", "scales", "x_scale") if getattr(self, name) is not None]
        return names, (self.scheme, self.grad_mode, self.transposed)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> TracedWeight:
        scheme, grad_dtype, transposed = context
        return cls(inner["rows"], scheme, grad_dtype, inner.get("scales"), inner.get("x_scale"), transposed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_untraced(args), **_untraced(kwargs or {}))


def _no_layer() -> None:
    """In place of a reference to the layer."""


def _untraced(values: Any) -> Any:
    if isinstance(values, TracedWeight):
        return values.unwrapped
    if isinstance(values, list):
        return [_untraced(value) for value in values]
    if isinstance(values, tuple):
        return tuple([_untraced(value) for value in values])
    if isinstance(values, dict):
        return {name: _untraced(value) for name, value in values.items()}
    return values


_FOLLOWED: dict[type, type] = {nn.Parameter: TrainedWeight, Int8Weight: TrainedInt8Weight}


def follow(weight: Tensor, layer: TrainedLayer) -> Tensor:
    """Let products of a trained weight outside of its layer be those of the layer, and return the weight.

    A parameter, which an optimizer updates, stays the object that it is; its class becomes a subclass that sees the
    functions it is passed to. What pruning computes is viewed as one. `F.linear`, `matmul`, `mm` and `addmm` with it,
    with rows of it or with its transpose run `trained_linear`; other products see the rounded values. Some functions,
    such as `torch.cat`, take the values from where no product can be seen: they warn. Under `torch.export` the result
    is a `TracedWeight`; `torch.compile` leaves the read, and what is done with the weight, to eager code.
    """
    if torch.compiler.is_exporting():
        x_scale = layer._activation_scale() if layer.scheme.static_activations else None
        scales = layer._parameters.get("scales")
        return TracedWeight(weight, layer.scheme, layer.grad_dtype, scales, x_scale)
    return _change_class(weight, layer)


def _change_class(weight: Tensor, layer: TrainedLayer) -> Tensor:
    kind = _FOLLOWED.get(type(weight))
    if kind is not None:
        weight.__class__ = kind
    elif type(weight) is Tensor and not torch._C._are_functorch_transforms_active():  # what a mask has computed
        weight = weight.as_subclass(TrainedView)
    if isinstance(weight, _Trained):
        product = weight.product
        scales = layer._parameters.get("scales")
        known = product is not None and product.layer() is layer and product.scales is scales
        if product is None or not known or (product.scheme, product.grad_dtype) != (layer.scheme, layer.grad_dtype):
            weight.product = _Product(layer.scheme, layer.grad_dtype, scales, weakref.ref(layer))
    return weight


# torch.compiler.disable sets these attributes, too, but imports Dynamo.
_change_class._torchdynamo_disable = True  # type: ignore[attr-defined]
_change_class._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    'the weight of a quantized layer of mode "qat" or "int8" is read outside of its layer, and its products must be '
    "seen there; compile without fullgraph=True, call the layer in place of reading its weight, or freeze_(model)"
)


def _torch_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = _HANDLERS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func in _PRODUCTS:
        args = tuple(_rounded(value) for value in args)
        kwargs = {name: _rounded(value) for name, value in kwargs.items()}
    elif func in _HIDING:
        _warn_hidden(func, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if _exports() and (func.__name__ != "__get__" or func in _VALUES):
            args, kwargs = tree_map_only(ReadOnly, functools.partial(_value, func), (args, kwargs))
        return func(*_untraced(args), **_untraced(kwargs))


def _exports() -> bool:
    """True while torch.export runs Python code, whose operations ask no `__torch_dispatch__` of a tensor."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _value(func: Any, weight: ReadOnly) -> Tensor:
    """What a function that is exported gets for a frozen weight."""
    name = func.__name__
    if name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
        raise refuse_write(name)
    return weight.dequantize()


def _rounded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_rounded(item) for item in value)
    is_kernels = isinstance(value, _Trained) and value.dim() > 2 and value.product is not None
    return value.rounded() if is_kernels or (isinstance(value, _Trained) and value.multiplies) else value


def _warn_hidden(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        for weight in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(weight, _Trained) and weight.product is not None:
                layer = weight.product.layer() or "a layer"
                warnings.warn(
                    f"{func.__name__} takes the weight of {layer} as floats, so what is computed with the result is "
                    "not quantized; keep that layer in float with skip=[its name]",
                    stacklevel=4,
                )
                return


def _multiply(x: Tensor, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` for W [N, K] (the weight, not transposed), as the layer computes it: [..., N]."""
    dtype = autocast_dtype(x.device.type)
    if isinstance(weight, ReadOnly):
        assert weight.stored is not None
        check_input(x, weight.in_features)
        args = (weight.scheme, dtype, weight.grad_mode, weight.column_scales, weight.x_scale)
        return quant_linear(gather_features(x, weight.input_order), weight.stored, bias, *args)
    if isinstance(weight, TracedWeight):
        check_input(x, weight.rows.shape[1])
        own = (weight.scheme, dtype, weight.grad_mode, weight.scales, weight.x_scale)
        return trained_linear(x, weight.rows, bias, *own)
    assert isinstance(weight, _Trained) and weight.product is not None
    scheme, grad_dtype, scales, layer = weight.product
    rows = weight.t() if weight.transposed else weight
    check_input(x, rows.shape[1])
    owner = layer()
    x_scale = None if owner is None or not scheme.static_activations else owner._activation_scale()
    return trained_linear(x, rows, bias, scheme, dtype, grad_dtype, scales, x_scale)


def _is_operand(value: Any) -> TypeGuard[Operand]:
    return isinstance(value, Operand) and value.multiplies


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_operand(weight) or weight.transposed or not _is_factor(input):
        return NotImplemented
    return _multiply(input, weight, bias)


def _is_factor(value: Any) -> bool:
    return not isinstance(value, Operand) and value.dtype in FLOAT_DTYPES


def _matmul(input: Any, other: Any, *, out: Tensor | None = None) -> Any:
    if _is_operand(other) and other.transposed and _is_factor(input):
        result = _multiply(input, other)
    elif _is_operand(input) and not input.transposed and _is_factor(other):
        result = _multiply(other, input) if other.dim() == 1 else _multiply(other.mT, input).mT
    else:
        return NotImplemented
    return result if out is None else out.resize_(result.shape).copy_(result)


def _reversed_matmul(input: Any, other: Any) -> Any:
    return _matmul(other, input)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Any:
    plain = beta == alpha == 1 and input.shape == mat2.shape[1:]
    if plain and _is_operand(mat2) and mat2.transposed and _is_factor(mat1):
        result = _multiply(mat1, mat2, input)
    else:
        product = _matmul(mat1, mat2)
        if product is NotImplemented:
            return product
        result = beta * input + alpha * product
    return result if out is None else out.resize_(result.shape).copy_(result)


def _requires_grad(weight: Operand, value: bool = True) -> Any:
    if isinstance(weight, ReadOnly):
        if value:
            raise refuse_write("requires_grad_(True)")
        return weight
    return NotImplemented


def _assign_data(weight: Operand, value: Any) -> Any:
    if isinstance(weight, ReadOnly):
        raise refuse_write("weight.data = ...")
    return NotImplemented


def _assign_grad(weight: Operand, value: Any) -> Any:
    if isinstance(weight, ReadOnly) and value is not None:
        raise refuse_write("weight.grad = ...")
    return NotImplemented


def _on_dequantized(method: str) -> Callable[..., Any]:
    """A method that reads memory, which a `FrozenWeight` has none of: it sees the values."""

    def call(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(weight, ReadOnly):
            return getattr(weight.dequantize(), method)(*args, **kwargs)
        return NotImplemented

    return call


def _on_integers(method: str) -> Callable[..., Any]:
    """A method that asks for the memory: that of the stored integers."""

    def call(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(weight, ReadOnly):
            held = weight.floats if weight.stored is None else weight.stored.qweight
            return getattr(held, method)(*args, **kwargs)
        return NotImplemented

    return call


def _share_memory(weight: Operand) -> Any:
    return weight if isinstance(weight, ReadOnly) else NotImplemented


def _view(function: Any) -> Callable[..., Any]:
    """A function that gives rows of a trained weight, its transpose or a cast: the result multiplies as the weight."""

    def call(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, (_Trained, ReadOnly) if _exports() else _Trained) or not weight.multiplies:
            return NotImplemented
        rows = _row_slice(function, weight, args, kwargs)
        if rows is None:
            return NotImplemented
        if not isinstance(weight, _Trained):
            return _view_of_frozen(function, weight, rows, args, kwargs)
        if isinstance(weight, TracedWeight):
            return _view_of_traced(function, weight, rows, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(weight, *args, **kwargs)
            if result is weight or not result.is_floating_point():
                return result
            if isinstance(result, Int8Weight):
                result.__class__ = TrainedInt8Weight
            elif isinstance(result, Int8WeightView):
                result.__class__ = TrainedInt8View
            else:  # of an int8 weight too: the values of a row are rounded to the integers that they come from
                result = result.as_subclass(TrainedView)
        result.transposed = weight.transposed != (function in _TRANSPOSES)
        assert weight.product is not None
        scales = weight.product.scales
        result.product = weight.product._replace(scales=None if scales is None else scales[rows])
        return result

    return call


def _view_of_traced(
    function: Any, weight: TracedWeight, rows: slice, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    result, transposed = weight.rows, weight.transposed != (function in _TRANSPOSES)
    if function is Tensor.__getitem__ and isinstance(result, Int8Weight) and _exports():
        result = Int8Weight(result.qweight[rows], result.scales[rows], result.dtype)  # a view holds what is no input
    elif function not in _TRANSPOSES:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(result, *args, **kwargs)
        if not result.is_floating_point():
            return result.t() if weight.transposed else result
    scales = None if weight.scales is None else weight.scales[rows]
    return TracedWeight(result, weight.scheme, weight.grad_mode, scales, weight.x_scale, transposed)


def _view_of_frozen(function: Any, weight: ReadOnly, rows: slice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The view, in a program that is exported; NotImplemented for a cast or a copy, which need the values."""
    if function in _TRANSPOSES:
        return weight.like(transposed=not weight.transposed)
    if function is Tensor.__getitem__ and weight.stored is not None:
        stored = weight.stored.map(itemgetter(rows))
        return weight.like(stored=stored, column_scales=None, grad_dtype="float")
    cast = getattr(torch.empty(0, dtype=weight.dtype), function.__name__)(*args, **kwargs)
    same = cast.dtype in FLOAT_DTYPES and cast.device == weight.device
    return weight.like(dtype=cast.dtype) if same else NotImplemented


def _row_slice(function: Any, weight: Operand, args: tuple[Any, ...], kwargs: dict[str, Any]) -> slice | None:
    """The rows that the result of a function in `_VIEWS` has; None: it is not rows of the weight."""
    everything = slice(None)
    if function in _TRANSPOSES:
        axes = args[0] if args and isinstance(args[0], (list, tuple)) else args
        return everything if not axes or [axis % 2 for axis in axes] in ([0, 1], [1, 0]) else None
    if function is Tensor.__getitem__:
        sliced = isinstance(args[0], slice) and not weight.transposed
        return args[0] if sliced else None
    return everything


def _split(weight: Any, size: int | list[int] | tuple[int, ...], dim: int = 0) -> Any:
    """Parts of the rows, each of which multiplies as the weight."""
    if not _is_operand(weight) or weight.transposed or dim % 2:
        return NotImplemented
    rows = weight.shape[0]
    ends = list(itertools.accumulate(size)) if not isinstance(size, int) else [*range(size, rows, size), rows]
    if ends[-1] != rows:
        return NotImplemented  # torch raises the error
    return tuple(weight[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    return _split(weight, -(-weight.shape[0] // chunks), dim) if chunks > 0 else NotImplemented


def _narrow(weight: Any, dim: int, start: Any, length: int) -> Any:
    is_rows = _is_operand(weight) and not weight.transposed and dim % 2 == 0 and isinstance(start, int)
    if not is_rows or not 0 <= start <= start + length <= weight.shape[0]:
        return NotImplemented
    return weight[start : start + length]


_TRANSPOSES = (
    torch.t,
    Tensor.t,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.transpose,
    Tensor.transpose,
)
_CASTS = (Tensor.to, Tensor.float, Tensor.bfloat16, Tensor.half, Tensor.type_as, Tensor.contiguous)
# Attributes that are computed from the values.
_VALUES = tuple(getattr(Tensor, name).__get__ for name in ("data", "H", "mH", "real"))
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.mv, Tensor.mv)
_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys(_MATMULS, _matmul),
    Tensor.__rmatmul__: _reversed_matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **dict.fromkeys((torch.narrow, Tensor.narrow), _narrow),
    Tensor.requires_grad_: _requires_grad,
    Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
    Tensor.data.__set__: _assign_data,  # type: ignore[attr-defined]
    Tensor.grad.__set__: _assign_grad,  # type: ignore[union-attr]
    Tensor.share_memory_: _share_memory,
    **{
        getattr(Tensor, name): _on_dequantized(name)
        for name in ("numpy", "tolist", "__array__", "__dlpack__", "__contains__")
    },
    **{
        getattr(Tensor, name): _on_integers(name)
        for name in ("data_ptr", "untyped_storage", "is_shared", "__dlpack_device__")
    },
    **{function: _view(function) for function in (*_TRANSPOSES, *_CASTS, Tensor.__getitem__)},
}
_PRODUCTS = {
    F.linear,
    *_MATMULS,
    Tensor.__rmatmul__,
    *(getattr(space, name) for space in (torch, Tensor) for name in ("addmm", "bmm", "baddbmm", "inner")),
    torch.einsum,
    torch.tensordot,
    F.bilinear,
    F.conv1d,
    F.conv2d,
}
# Functions that take values of a trained weight to where no product is seen.
_HIDING = {
    torch.cat,
    torch.concat,
    torch.stack,
    torch.hstack,
    torch.vstack,
    torch.index_select,
    Tensor.index_select,
    torch.unsqueeze,
    Tensor.unsqueeze,
    F.embedding,
    F.multi_head_attention_forward,
}
