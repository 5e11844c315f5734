"""The state dict of a layer of mode "int8": the integers and scales of its `Int8Weight`."""

from __future__ import annotations

import warnings
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor

from ..autograd.int8_weight import Int8Weight
from ..distributed.dtensors import is_dtensor, with_local

_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "lerp", "addcmul", "addcdiv", "subtract", "multiply", "divide")


class StateScales(Tensor):
    """The scales of an `Int8Weight` in a state dict: they mean a weight only together with its integers.

    An average of state dicts, of the floats alone, would pair the averaged scales with the integers of one of them. So
    arithmetic on these scales raises RuntimeError. Reading, copying, loading and saving is as for any tensor, and
    `as_subclass(torch.Tensor)` gives a plain one.
    """

    @staticmethod
    def of(scales: Tensor) -> Tensor:
        """A guarded alias of the scales. A DTensor stays as it is."""
        return scales.as_subclass(StateScales) if type(scales) is Tensor else scales

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        name = name.removeprefix("foreach_").removesuffix("_")
        if name.removeprefix("i").removeprefix("r") in _ARITHMETIC or name in _ARITHMETIC:
            raise RuntimeError(
                f"{func.__name__} of scales in a state dict of mode 'int8': an average of state dicts must average "
                "integers and scales together. Average the parameters, as torch.optim.swa_utils.AveragedModel does"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        kept = name in ("clone", "detach", "deepcopy", "to", "cpu", "cuda")
        return result.as_subclass(cls) if kept and type(result) is Tensor else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


def _local(weight: Tensor) -> Int8Weight:
    """The `Int8Weight` of a parameter, or of this process's shard of a DTensor."""
    return cast(Int8Weight, getattr(weight, "_local_tensor", weight))


def state_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """qweight and scales, detached, of a parameter: DTensors if it is one (FSDP)."""
    local = _local(weight)
    qweight, scales = local.qweight.detach(), local.scales.detach()
    if local is weight:
        return qweight, scales
    assert is_dtensor(weight)
    return with_local(weight, qweight), with_local(weight, scales, 1)


def load_parts(weight: Tensor, qweight: Tensor, scales: Tensor, assign: bool, name: str) -> Tensor:
    """The parameter after loading a state dict: with `assign` a new one on the given tensors, else they are copied."""
    qweight, scales = qweight.detach(), scales.detach()
    local = _local(weight)
    if assign and local is weight:
        plain = Int8Weight(qweight, scales.as_subclass(Tensor), weight.dtype)
        return torch.nn.Parameter(plain, requires_grad=weight.requires_grad)
    if local.is_meta and not qweight.is_meta:
        warnings.warn(
            f"for {name}weight: copying from a non-meta tensor in the state dict to a parameter on the meta device "
            "does nothing. Pass assign=True, or call to_empty(device=...) on the module before",
            stacklevel=2,
        )
    with torch.no_grad():
        for own, given in zip(state_parts(weight), (qweight, scales), strict=True):
            own.copy_(given)
    return weight
