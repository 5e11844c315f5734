"""`Storage`: the frozen weight of `QuantLinear` and `QuantEmbedding`, in the canonical storage of its scheme."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, QuantizedWeight, restore_features, storage_dtypes
from ..formats.validate import STORAGE, input_order_problem, storage_problems, x_scale_problem
from ..kernels import ops
from .stored_parameter import ScalesView, StoredParameter, float_scales, plain, reinterpret, store

# What may be float32, and is held as its bits.
_FLOATS = ("scales", "zeros", "x_scale")


class Storage(nn.Module):
    """A module whose frozen weight is the parameters `qweight`, `scales` and `zeros`.

    The parameter registered as `scales` holds the bits of the float32 scales (see `stored_parameter.py`), and so does
    `zeros` of a `-min` scheme; the attributes, the state dict and `quantized_weight` show them as float32, and either
    form can be assigned or loaded. `zeros` is None for symmetric schemes. In the modes "qat" and "int8" the names do
    not exist, but for the learned scales of "qat".
    """

    scheme: QuantScheme
    mode: str
    in_features: int
    out_features: int
    compute_dtype: torch.dtype
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

    @property
    def zeros(self) -> Tensor | None:
        """[N, groups]: uint8 zero points (`-asym`), or a view of float32 minima (`-min`); None for other schemes."""
        if "zeros" not in self._parameters:
            raise AttributeError(f"{type(self).__name__} has no zeros in mode {self.mode!r}")
        zeros = self._parameters["zeros"]
        return ScalesView.of(zeros) if self.scheme.has_min and isinstance(zeros, StoredParameter) else zeros

    @property
    def x_scale(self) -> Tensor | None:
        """Float32 [1]: the scale of static activations (`a8s` schemes), which calibration chose; None for others.

        It is a view, through which it can be changed in place; of a layer that learns its scales, the parameter.
        """
        x_scale = self._parameters.get("x_scale")
        return ScalesView.of(x_scale) if isinstance(x_scale, StoredParameter) else x_scale

    def set_x_scale(self, x_scale: Tensor) -> None:
        """Replace the scale of static activations by a float32 [1], which is copied.

        Raises:
            ValueError: if it does not fit, or the scheme has none.
        """
        if (problem := x_scale_problem(x_scale, self.scheme)) is not None:
            raise ValueError(f"x_scale {problem}")
        if self.scheme.static_activations:
            with torch.inference_mode(False):
                own = nn.Parameter(x_scale.detach().to(self._device()).clone(), requires_grad=self._learns_x_scale)
            self.register_parameter("x_scale", own)

    def _device(self) -> torch.device:
        """Where the layer is: `x_scale` is put there, and a weight that is computed is no parameter of its own."""
        return next(parameter.device for name, parameter in self.named_parameters() if name != "x_scale")

    @property
    def _learns_x_scale(self) -> bool:
        """Whether `x_scale` is trained, and a float parameter; else it is stored as `scales` of a frozen weight."""
        return False

    def _activation_scale(self) -> Tensor | None:
        """`x_scale` as the kernels read it."""
        own = self._parameters.get("x_scale")
        return float_scales(own) if own is not None and own.dtype == torch.int32 else own

    def _is_stored(self, name: str) -> bool:
        """Whether the parameter of this name is a constant, which is held as integers."""
        return self.mode == "frozen" if name in STORAGE else name == "x_scale" and not self._learns_x_scale

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if param is not None and self._is_stored(name):
            param = store(param)
        if name == "x_scale":  # torch refuses the name of an attribute that is there, unless it is a parameter's
            self._parameters.setdefault(name, None)
        super().register_parameter(name, param)

    def _allocate(self, device: torch.device | str | None) -> None:
        """Register the parameters of a frozen weight, without values."""
        self._sample: Tensor | None = None
        shapes, dtypes = self.scheme.storage_shapes(self.in_features, self.out_features), storage_dtypes(self.scheme)
        for name in STORAGE:
            shape = (*self.leading, *shapes.get(name, ()))
            tensor = torch.empty(shape, dtype=dtypes[name], device=device) if name in shapes else None
            self.register_parameter(name, None if tensor is None else store(tensor))

    def _allocate_x_scale(self, device: torch.device | str | None) -> None:
        """Register the scale of static activations, if the scheme has one, as 1."""
        if self.scheme.static_activations:
            x_scale = torch.ones(1, dtype=torch.float32, device=device)
            self.register_parameter("x_scale", nn.Parameter(x_scale, requires_grad=self._learns_x_scale))

    @torch.no_grad()
    def _set_to_zero(self) -> None:
        """Make the frozen weight zero: integers that stand for 0, with scales of 1."""
        qweight, scales, zeros = self._frozen_weight()
        qweight.fill_(self.scheme.weight_format.zero_byte if self.scheme.symmetric else 0)
        scales.fill_(1.0)
        if zeros is not None:
            zeros.zero_()
        if (order := self._buffers.get("input_order")) is not None:
            order.copy_(torch.arange(self.in_features))

    def _keep(self, weight: QuantizedWeight) -> None:
        """Make the tensors the parameters of the frozen weight; a parameter is shared with the layer that owns it."""
        self._sample = None
        for name, tensor in zip(STORAGE, weight, strict=True):
            self.register_parameter(name, None if tensor is None else store(tensor))

    def _frozen_weight(self) -> QuantizedWeight:
        """The frozen weight as the kernels read it."""
        return self._floats_by(float_scales)

    def _floats_by(self, view: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The parameters of the frozen weight, of which `view` makes floats where they are bits."""
        own: dict[str, Any] = self._parameters
        scales, zeros = own["scales"], own["zeros"]
        if scales.dtype == torch.int32:
            scales = view(scales)
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = view(zeros)
        return QuantizedWeight(own["qweight"], scales, zeros)

    def storage_problems(self) -> dict[str, str]:
        """By the name of each tensor of a frozen layer that does not fit its scheme: why (see `validate.py`)."""
        others = {"x_scale": self._activation_scale(), "input_order": self._buffers.get("input_order")}
        return self._problems({**self.quantized_weight()._asdict(), **others})

    def _problems(self, tensors: Mapping[str, object]) -> dict[str, str]:
        """Why the tensors of the weight, `x_scale` and `input_order` are not those of this layer."""
        problems = storage_problems(tensors, self.in_features, self.out_features, self.scheme, leading=self.leading)
        others = {
            "x_scale": x_scale_problem(tensors.get("x_scale"), self.scheme),
            "input_order": input_order_problem(tensors.get("input_order"), self.in_features),
        }
        return problems | {name: problem for name, problem in others.items() if problem is not None}

    def _check_weight(self, weight: QuantizedWeight) -> None:
        """Raise ValueError, naming the tensor, unless `weight` is the canonical storage of this scheme and shape."""
        tensors = weight._asdict()
        for name, problem in self._problems({**tensors, "x_scale": self._activation_scale()}).items():
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
        return self._floats_by(lambda bits: reinterpret(bits, torch.float32))

    def storage_bytes(self) -> int:
        """Bytes of the weight that the layer keeps (without the bias)."""
        return sum(t.numel() * t.element_size() for t in self.quantized_weight() if t is not None)

    def dequantize(self) -> Tensor:
        """The weight as it is multiplied: float32 [N, K], or [E, N, K] of E experts."""
        rows = self.quantized_weight().map(lambda tensor: tensor.flatten(0, -2))
        weight = ops.dequantize_weight(*rows, self.in_features, self.scheme)
        weight = restore_features(weight, self._buffers.get("input_order"))
        return weight.view(self.weight_shape) if self.leading else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Storage:
        """Move everything, but cast neither integers nor scales (`.half()`, `.to(torch.bfloat16)`, `.type(dtype)`)."""
        scales = (self._parameters.get("scales"), self._parameters.get("x_scale"))
        exact = {id(tensor) for s in scales if s is not None for tensor in (s, s.grad)}
        exact.add(id(self._buffers.get("column_scales")))
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self._device())).dtype
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
        for name in (*STORAGE, "x_scale"):  # torch may have made new parameters
            parameter = self._parameters.get(name)
            if type(parameter) is nn.Parameter and self._is_stored(name):
                self._parameters[name] = store(parameter)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The state dict holds the canonical storage."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (x_scale := self._parameters.get("x_scale")) is not None and not self._learns_x_scale:
            keep = keep_vars and isinstance(x_scale, StoredParameter)
            destination[prefix + "x_scale"] = (
                self.x_scale if keep else plain(reinterpret(x_scale, torch.float32)).detach()
            )
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
        given = {name: state_dict.get(prefix + name) for name in (*STORAGE, "x_scale", "input_order")}
        if all(tensor is None for tensor in given.values()):
            return []
        for name in _FLOATS:
            tensor = given[name]
            if isinstance(tensor, Tensor) and tensor.dtype == torch.int32:  # a parameter
                given[name] = reinterpret(tensor.detach(), torch.float32)
        problems = self._problems(given)
        if given["input_order"] is not None and not self._may_order_input:
            problems["input_order"] = f"is given, but a {type(self).__name__} of mode {self.mode!r} has none"
        return [f"{prefix}{name} {problem}" for name, problem in problems.items()]

    @property
    def _may_order_input(self) -> bool:
        """Whether the columns of the weight may have an order of their own, the buffer `input_order`."""
        return False

    def _order_input(self, order: Tensor | None) -> None:
        """Replace the buffer `input_order`, which is there only where the columns have an order of their own."""
        if order is None:
            self._buffers.pop("input_order", None)
        else:
            self._buffers["input_order"] = order

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict whose storage has been checked."""
        self._sample = None
        if prefix + "qweight" in state_dict:
            order = state_dict.get(prefix + "input_order")
            if order is None or "input_order" not in self._buffers:
                self._order_input(None if order is None else torch.empty_like(order, device=self._device()))
        for name in _FLOATS:
            floats = state_dict.get(prefix + name)
            if self._is_stored(name) and floats is not None and floats.dtype == torch.float32:
                state_dict = {**state_dict, prefix + name: reinterpret(floats.detach(), torch.int32)}
        super()._load_from_state_dict(state_dict, prefix, *args)
