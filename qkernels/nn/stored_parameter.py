"""The parameters of a frozen weight: integers to everybody, so that nothing that is meant for floats changes them.

They are parameters, not buffers, because FSDP shards those and DDP does not send them in each step. Code that looks
for floats (a model's dtype, casts, mixed precision) passes over integers; so the float32 scales are registered as
their bits, int32 of the same shape. Averaging a model, which torch would truncate for integers, leaves equal integers
as they are and is refused otherwise.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..distributed.dtensors import is_dtensor, with_local

# An average of equal bytes, computed in float32, is that far from them; one of bytes that differ is not.
_ROUNDING = 6e-5
# An average of equal scales is that far from them, relative to their bits.
_BITS_ROUNDING = 1e-6
# The bits of a scale that rounding gives are greater in magnitude (it is at least 2^-96 / 15), and a scale is smaller.
_LEAST_BITS = 2.0**27

_ADVICE = (
    "the integers of a frozen quantized weight cannot {what}: train adapters, or quantize with mode='qat' or "
    "mode='int8'; code for the other parameters must skip those that are not is_floating_point()"
)
_NO_GRADIENT = "only Tensors of floating point dtype can require gradients: " + _ADVICE.format(what="be trained")


def reinterpret(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.view(dtype)` for an element of the same size; also of a DTensor, whose shards are viewed."""
    if not is_dtensor(tensor):
        return float_scales(tensor) if dtype == torch.float32 else tensor.view(dtype)
    return with_local(tensor, tensor.to_local().view(dtype))


def plain(tensor: Tensor) -> Tensor:
    """An alias of a stored tensor that is an ordinary tensor; any other tensor as it is."""
    return Tensor.detach(tensor).as_subclass(Tensor) if isinstance(tensor, _Constant) else tensor


_set_data = Tensor.data.__set__  # type: ignore[attr-defined]


class _Constant(Tensor):
    """The base of a parameter and its aliases: they never require a gradient."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        return self

    @property
    def _fsdp_flattened(self) -> bool:
        """What FSDP1 asks of each parameter before it flattens all of them into one float tensor."""
        if sys._getframe(2).f_code.co_name == "_get_orig_params":  # others ask of what FSDP1 is told to leave out
            raise NotImplementedError(
                "FullyShardedDataParallel (FSDP1) cannot shard the integers of a frozen quantized weight; use "
                "torch.distributed.fsdp.fully_shard, or leave them out with ignored_states="
            )
        return False


class _Integers(_Constant):
    """Integers, or the bits of scales: writes of averages are checked."""

    def detach(self) -> Tensor:
        return Tensor.detach(self).as_subclass(StoredTensor)

    def clone(self, *args: Any, **kwargs: Any) -> Tensor:
        return Tensor.clone(self, *args, **kwargs).as_subclass(StoredTensor)

    @property
    def data(self) -> Tensor:
        return plain(self)  # which shares the version counter: what is derived from the values can notice a write

    @data.setter
    def data(self, value: Tensor) -> None:
        integers = self._integers(value)
        if integers is not None:
            _set_data(self, plain(integers))

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Take over integers of the same dtype, or float32 scales; leave the tensor as it is for their own average."""
        integers = self._integers(source)
        if integers is not None:
            Tensor.copy_(self, plain(integers), non_blocking)
        return self

    def lerp_(self, end: Tensor, weight: Any) -> Tensor:
        if self.shape == end.shape and torch.equal(self, end):
            return self
        raise RuntimeError(_ADVICE.format(what="be averaged with others"))

    def _integers(self, values: Tensor) -> Tensor | None:
        """The integers to write for `values`; None for an average of equal integers, which changes nothing."""
        if isinstance(values, Tensor) and values.dtype.is_floating_point and not values.is_meta and not self.is_meta:
            if self.dtype == torch.int32 and values.dtype == torch.float32:
                values = values.detach()
                # Other writers' scales may be 0 or, all of them, so small that their bits are small, too.
                tiny_average = bool(plain(self).any()) and self._is_average(values)
                if not tiny_average and not bool((values.abs() >= _LEAST_BITS).any()):
                    return values.contiguous().view(torch.int32)
            if self._is_average(values):
                return None
        if not isinstance(values, Tensor) or values.dtype != self.dtype:
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"expected {self.dtype}, got {got}: " + _ADVICE.format(what="be cast or averaged"))
        return values

    def _is_average(self, source: Tensor) -> bool:
        if source.numel() == 0:
            return True
        mine = plain(self).to(source.device)
        if self.dtype != torch.int32:
            return source.shape == mine.shape and bool((source - mine).abs_().amax() <= _ROUNDING)
        mine, rounding = mine.to(torch.float64), max(_BITS_ROUNDING, torch.finfo(source.dtype).eps)
        return source.shape == mine.shape and bool(((source - mine).abs() <= rounding * mine.abs()).all())


def _refusing(name: str) -> Callable[..., Tensor]:
    in_place = getattr(Tensor, name)

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return in_place(self, *args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(_ADVICE.format(what=f"be changed by the floats of {name}")) from error

    method.__name__ = name
    return method


for _name in ("add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "__iadd__", "__isub__", "__imul__"):
    setattr(_Integers, _name, _refusing(_name))


class StoredTensor(_Integers):
    """An alias or a copy of a `StoredParameter`, such as those in a state dict; it is saved as an ordinary tensor."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]


class StoredParameter(_Integers, nn.Parameter):
    """Integers of a frozen weight, or the bits of its float32 scales.

    Args:
        data: an integer tensor, or float32 scales.
        requires_grad: must be False.

    Raises:
        TypeError: for other floats.
        RuntimeError: if it is to require a gradient.
    """

    _view: weakref.ReferenceType[ScalesView] | None = None  # the one in use, if there is one

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> nn.Parameter:  # type: ignore[misc]
        if data.dtype == torch.float32:
            data = reinterpret(data.detach(), torch.int32)
        if data.dtype.is_floating_point:
            raise TypeError(f"scales must be torch.float32, got {data.dtype}: a cast loses bits")
        if requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        if type(data) not in (Tensor, nn.Parameter, StoredTensor, StoredParameter):  # such as DTensor and FakeTensor
            return nn.Parameter(data, requires_grad=False)
        return Tensor._make_subclass(cls, plain(data), False)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return StoredParameter, (plain(self),)


def float_scales(bits: Tensor) -> Tensor:
    """The float32 scales in int32 `bits`. To torch.jit.trace, which has no word for that view, they are a constant."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined]
        return bits.view(torch.float32)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return bits.detach().view(torch.float32)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


class ScalesView(_Constant, nn.Parameter):
    """Float32 scales: a view of the `StoredParameter` that is registered under their name, and passes for it."""

    bits: StoredParameter

    @staticmethod
    def of(bits: StoredParameter) -> ScalesView:
        """The view of `bits`: one object as long as it is in use, so that tied scales are one object too."""
        view = None if bits._view is None else bits._view()
        if view is None or view.data_ptr() != bits.data_ptr():
            view = Tensor._make_subclass(ScalesView, float_scales(plain(bits)), False)
            view.bits, bits._view = bits, weakref.ref(view)
        return view

    @property
    def data(self) -> Tensor:
        return Tensor.detach(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype != torch.float32:
            raise TypeError(f"scales must be torch.float32, got {value.dtype}")
        self.bits.data = plain(value).contiguous().view(torch.int32)
        _set_data(self, plain(self.bits).view(torch.float32))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return nn.Parameter(Tensor.clone(self), requires_grad=False)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return nn.Parameter(plain(self), requires_grad=False).__reduce_ex__(protocol)


def store(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter of a frozen weight; a parameter that is one already is shared."""
    if isinstance(tensor, StoredParameter):
        return tensor
    if isinstance(tensor, ScalesView):
        return tensor.bits
    if is_dtensor(tensor) and isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        return tensor
    if tensor.is_inference():  # which could not be saved for a gradient
        with torch.inference_mode(False):
            tensor = tensor.clone()
    parameter = StoredParameter(tensor)
    vars(parameter).update(vars(tensor))  # marks such as those of transformers
    return parameter


torch.serialization.add_safe_globals([StoredParameter])
