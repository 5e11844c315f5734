"""`Storage`: the frozen weight of `QuantLinear` and `QuantEmbedding`, in the canonical storage of its scheme."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, QuantizedWeight, storage_dtypes
from ..formats.validate import STORAGE, storage_problems
from ..kernels import ops
from .stored_parameter import ScalesView, StoredParameter, float_scales, plain, reinterpret, store


class Storage(nn.Module):
    """A module whose frozen weight is the parameters `qweight`, `scales` and `zeros`.

    The parameter registered as `scales` holds the bits of the float32 scales (see `stored_parameter.py`); the
    attribute, the state dict and `quantized_weight` show them as float32, and either form can be assigned or loaded.
    `zeros` is None for symmetric schemes. In the modes "qat" and "int8" the names do not exist, but for the learned
    scales of "qat".
    """

    scheme: QuantScheme
    mode: str
    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    zeros: nn.Parameter | None  # uint8 [N, groups], asymmetric schemes only
    float_type: type[nn.Module]  # what was quantized, and what `dequantize_` makes of the layer again
    leading: tuple[int, ...] = ()  # (E,) if the weight is those of E experts: [E, N, K]
    COMPUTE_DTYPES: tuple[torch.dtype, ...] = FLOAT_DTYPES

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(N, K), or (E, N, K) of E experts."""
        return *self.leading, self.out_features, self.in_features

    @property
    def qweight(self) -> Tensor:
        """Integers of the weight; in mode "int8" they are no parameter of their own, but the state dict holds them."""
        qweight = self._parameters.get("qweight")
        if qweight is None and self.mode == "int8":
            return self.quantized_weight().qweight
        if qweight is None:
            raise AttributeError(f"{type(self).__name__} has no qweight in mode {self.mode!r}")
        return qweight

    @property
    def scales(self) -> Tensor:
        """Float32 scales [N, groups]; of a frozen weight a view, through which it can be changed in place.

        In a model that FSDP has sharded it is the parameter, which holds the bits; `quantized_weight` shows floats.
        """
        scales = self._parameters.get("scales")
        if scales is None and self.mode == "int8":
            return self.quantized_weight().scales
        if scales is None:
            raise AttributeError(f"{type(self).__name__} has no scales in mode {self.mode!r}")
        # FSDP, whose parameter is of another class, must find here what is registered.
        return ScalesView.of(scales) if isinstance(scales, StoredParameter) else scales

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None and name in STORAGE and self.mode == "frozen":
            param = store(param)
        super().register_parameter(name, param)

    def _allocate(self, device: torch.device | str | None) -> None:
        """Register the parameters of a frozen weight, without values."""
        self._sample: Tensor | None = None
        shapes, dtypes = self.scheme.storage_shapes(self.in_features, self.out_features), storage_dtypes(self.scheme)
        for name in STORAGE:
            shape = (*self.leading, *shapes.get(name, ()))
            tensor = torch.empty(shape, dtype=dtypes[name], device=device) if name in shapes else None
            self.register_parameter(name, None if tensor is None else store(tensor))

    @torch.no_grad()
    def _set_to_zero(self) -> None:
        """Make the frozen weight zero: integers that stand for 0, with scales of 1."""
        qweight, scales, zeros = self._frozen_weight()
        qweight.fill_(self.scheme.weight_format.zero_byte if self.scheme.symmetric else 0)
        scales.fill_(1.0)
        if zeros is not None:
            zeros.zero_()

    def _keep(self, weight: QuantizedWeight) -> None:
        """Make the tensors the parameters of the frozen weight; a parameter is shared with the layer that owns it."""
        self._sample = None
        for name, tensor in zip(STORAGE, weight, strict=True):
            self.register_parameter(name, None if tensor is None else store(tensor))

    def _frozen_weight(self) -> QuantizedWeight:
        """The frozen weight as the kernels read it."""
        own: dict[str, Any] = self._parameters
        scales = own["scales"]
        return QuantizedWeight(
            own["qweight"], float_scales(scales) if scales.dtype == torch.int32 else scales, own["zeros"]
        )

    def storage_problems(self) -> dict[str, str]:
        """By the name of each tensor of a frozen weight that does not fit its scheme: why (see `validate.py`)."""
        return self._problems(self.quantized_weight()._asdict())

    def _problems(self, tensors: Mapping[str, object]) -> dict[str, str]:
        return storage_problems(tensors, self.in_features, self.out_features, self.scheme, leading=self.leading)

    def _check_weight(self, weight: QuantizedWeight) -> None:
        """Raise ValueError, naming the tensor, unless `weight` is the canonical storage of this scheme and shape."""
        tensors = weight._asdict()
        for name, problem in self._problems(tensors).items():
            raise ValueError(f"{name} {problem}")
        for name, tensor in tensors.items():
            if tensor is not None and tensor.device != weight.qweight.device:
                raise ValueError(f"{name} must be on {weight.qweight.device}, got {tensor.device}")

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Take over the storage of a quantized weight [N, K]; parameters are shared with the layer that owns them.

        Raises:
            ValueError: naming the tensor that does not fit; the layer is left as it was.
        """
        self._check_weight(weight)
        with torch.inference_mode(False):
            self._take(weight)

    def _take(self, weight: QuantizedWeight) -> None:
        """`set_weight` of a weight that the kernels made."""
        self._keep(weight)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as it is multiplied, in the canonical storage."""
        own: dict[str, Any] = self._parameters
        scales = own["scales"]
        return QuantizedWeight(
            own["qweight"], reinterpret(scales, torch.float32) if scales.dtype == torch.int32 else scales, own["zeros"]
        )

    def storage_bytes(self) -> int:
        """Bytes of the weight that the layer keeps (without the bias)."""
        return sum(t.numel() * t.element_size() for t in self.quantized_weight() if t is not None)

    def dequantize(self) -> Tensor:
        """The weight as it is multiplied: float32 [N, K], or [E, N, K] of E experts."""
        rows = self.quantized_weight().map(lambda tensor: tensor.flatten(0, -2))
        weight = ops.dequantize_weight(*rows, self.in_features, self.scheme)
        return weight.view(self.weight_shape) if self.leading else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Storage:
        """Move everything, but cast neither integers nor scales (`.half()`, `.to(torch.bfloat16)`, `.type(dtype)`)."""
        scales = self._parameters.get("scales")
        exact = {id(self._buffers.get("column_scales"))} | (set() if scales is None else {id(scales), id(scales.grad)})
        device = next(tensor for tensor in self._parameters.values() if tensor is not None).device
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        if not dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__} computes in float32, bfloat16 or float16, got {dtype}")
        if dtype not in self.COMPUTE_DTYPES:
            warnings.warn(
                f"{type(self).__name__} multiplies float32, bfloat16 or float16: it stays in float32 under a cast to "
                f"{dtype}, and refuses such inputs; use .float(), or the float model",
                stacklevel=3,
            )
            dtype = torch.float32
        self.compute_dtype = dtype

        def move(tensor: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():  # of a trained weight that was read: it becomes a plain one
                moved = fn(tensor)
                moved = moved.detach() if moved is tensor else moved
            if id(tensor) in exact or not tensor.is_floating_point():
                wanted = tensor.dtype
            else:
                wanted = moved.dtype if moved.dtype in FLOAT_DTYPES else torch.float32
            if moved.dtype == wanted:
                return moved
            return (tensor if wanted == tensor.dtype else moved).to(device=moved.device, dtype=wanted)

        super()._apply(move, recurse)
        for name in STORAGE:  # torch may have made new parameters
            if self.mode == "frozen" and type(parameter := self._parameters[name]) is nn.Parameter:
                self._parameters[name] = store(parameter)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The state dict holds the canonical storage."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mode != "frozen":
            return
        self._refuse_truncated()
        for name, tensor in self.quantized_weight()._asdict().items():
            if keep_vars and isinstance(self._parameters[name], StoredParameter):
                destination[prefix + name] = getattr(self, name)
            elif tensor is not None:
                destination[prefix + name] = plain(tensor).detach()

    @torch.no_grad()
    def _refuse_truncated(self) -> None:
        """Raise RuntimeError if an average over a former state dict truncated the integers: each is 1 nearer to 0."""
        qweight = self._parameters["qweight"]
        if not isinstance(qweight, StoredParameter) or qweight.is_meta or qweight.numel() == 0:
            return
        values = plain(qweight).flatten()[:: max(1, qweight.numel() // 256)].to(torch.int16)
        before, self._sample = self._sample, values
        if before is None or before.shape != values.shape or before.device != values.device:
            return
        change = values - before
        if change.any() and ((change == 0) | (change == -before.sign())).all():
            raise RuntimeError(
                f"the integers of this {type(self).__name__} were averaged in place and truncated by torch: an average "
                "over a state dict must copy what is not floating point, and the layer must be loaded anew"
            )

    def _storage_errors(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Why the tensors of a state dict cannot be this layer's weight; none at all are no error."""
        given = {name: state_dict.get(prefix + name) for name in STORAGE}
        if all(tensor is None for tensor in given.values()):
            return []
        if isinstance(given["scales"], Tensor) and given["scales"].dtype == torch.int32:  # a parameter
            given["scales"] = reinterpret(given["scales"].detach(), torch.float32)
        problems = self._problems(given)
        return [f"{prefix}{name} {problem}" for name, problem in problems.items()]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict whose storage has been checked."""
        self._sample = None
        scales = state_dict.get(prefix + "scales")
        if self.mode == "frozen" and scales is not None and scales.dtype != torch.int32:
            state_dict = {**state_dict, prefix + "scales": reinterpret(scales.detach(), torch.int32)}
        super()._load_from_state_dict(state_dict, prefix, *args)
