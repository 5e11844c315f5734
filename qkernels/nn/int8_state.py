"""What a layer of mode "int8" has in a state dict: the integers and scales of its `Int8Weight`."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..autograd.int8_weight import Int8Weight

_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "lerp", "addcmul", "addcdiv", "subtract", "multiply", "divide")


class StateScales(Tensor):
    """The scales of an `Int8Weight` in a state dict: they mean a weight only together with its integers.

    An average of state dicts, of the floats alone, would pair the averaged scales with the integers of one of them. So
    arithmetic on these scales raises RuntimeError. Reading, copying, loading and saving is as for any tensor, and
    `as_subclass(torch.Tensor)` gives a plain one.
    """

    @staticmethod
    def of(scales: Tensor) -> Tensor:
        """The same memory, guarded. A DTensor stays as it is."""
        return scales.as_subclass(StateScales) if type(scales) is Tensor else scales

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
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

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor)


def state_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """qweight and scales, detached, of a parameter: DTensors if it is one (FSDP)."""
    local = getattr(weight, "_local_tensor", weight)
    parts = (local.qweight.detach(), local.scales.detach())
    if local is weight:
        return parts
    from torch.distributed.tensor import DTensor

    shapes = (weight.shape, torch.Size((weight.shape[0], 1)))
    return tuple(
        DTensor.from_local(
            part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(shape[1], 1)
        )
        for part, shape in zip(parts, shapes, strict=True)
    )


def load_parts(weight: Tensor, qweight: Tensor, scales: Tensor, assign: bool, name: str) -> Tensor:
    """The parameter after loading a state dict: with `assign` a new one on the given tensors, else they are copied."""
    qweight, scales = qweight.detach(), scales.detach()
    local = getattr(weight, "_local_tensor", weight)
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
