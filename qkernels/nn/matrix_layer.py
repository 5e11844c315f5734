"""`MatrixLayer`: a layer with one quantized matrix; what its modes train, hold and save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..autograd.frozen_weight import FrozenWeight
from ..autograd.int8_weight import Int8Weight
from ..autograd.layer_calls import refuse_script, refuse_write
from ..autograd.masked import mask_gradient
from ..autograd.weight_products import follow
from ..distributed.dtensors import is_dtensor
from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, MAX_REDUCTION, QuantizedWeight
from ..formats.validate import STORAGE, x_scale_problem
from ..kernels import ops
from . import masks
from .int8_state import StateScales, load_parts, state_parts
from .storage import Storage
from .stored_parameter import StoredParameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import Self

MODES = ("frozen", "qat", "int8")
GRAD_DTYPES = ("float", "int8")
WEIGHT_SCALES = ("absmax", "learned")


def _check_trainable(scheme: QuantScheme, mode: str) -> None:
    if mode == "qat" and scheme.has_min:
        instead = replace(scheme, zeros="zero_point" if scheme.weight_format.has_zeros else None)
        raise ValueError(
            f"scheme must have no minima for mode='qat', got {scheme}; train {instead}, or adapters over a frozen layer"
        )
    if mode == "int8" and (scheme.weight_bits != 8 or not scheme.row_scaled):
        raise ValueError(f"scheme must have 8-bit weights with one scale a row for mode='int8', got {scheme}")


def _check_weight_scale(weight_scale: str, mode: str, scheme: QuantScheme) -> None:
    if weight_scale not in WEIGHT_SCALES:
        raise ValueError(f"weight_scale must be one of {WEIGHT_SCALES}, got {weight_scale!r}")
    if weight_scale == "learned" and (mode != "qat" or not scheme.symmetric):
        raise ValueError(
            f"weight_scale='learned' is for mode='qat' and symmetric schemes, got mode={mode!r} and {scheme}"
        )


def _is_finite(tensor: Tensor) -> bool:
    """False for a tensor that is seen to hold NaN or Inf."""
    if tensor.numel() == 0 or tensor.is_meta or is_dtensor(tensor):
        return True
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


class MatrixLayer(Storage):
    """A layer that multiplies one quantized matrix [N, K], and adds a bias [N]: the base of `QuantLinear`.

    The class says what each mode trains, holds and saves; a subclass says how the layer computes, and by `_rows` and
    `_from_rows` how the weight that is trained lies in its parameter.
    """

    weight_scale: str
    grad_dtype: str
    bias: Any  # a float parameter [N], or None

    def _set_up(
        self,
        scheme: str | QuantScheme,
        bias: bool,
        *,
        mode: str,
        grad_dtype: str,
        weight_scale: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check the arguments of the constructor, and register the parameters.

        Raises:
            ValueError: as the subclass documents.
        """
        self.scheme = QuantScheme.parse(scheme)
        in_features, out_features = self.in_features, self.out_features
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if grad_dtype not in GRAD_DTYPES:
            raise ValueError(f"grad_dtype must be one of {GRAD_DTYPES}, got {grad_dtype!r}")
        _check_trainable(self.scheme, mode)
        _check_weight_scale(weight_scale, mode, self.scheme)
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if self.scheme.int_activations and in_features > MAX_REDUCTION:
            raise ValueError(
                f"in_features must be at most {MAX_REDUCTION} for {self.scheme} (exact int32 sums), "
                f"got {in_features}; use a w{self.scheme.weight_bits}a16 scheme"
            )
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.mode, self.grad_dtype, self.weight_scale = mode, grad_dtype, weight_scale
        self.compute_dtype = dtype
        self._scheme_name = self.scheme.name
        # The bias of a frozen layer comes first: many take the dtype of a model from the first of its parameters.
        shape = (*self.leading, out_features)
        own_bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None
        rows = math.prod(shape)
        if mode == "frozen":
            self.register_parameter("bias", own_bias)
            self._allocate(device)
        weight = None
        if mode == "qat":
            weight = nn.Parameter(self._from_rows(torch.empty(rows, in_features, dtype=dtype, device=device)))
            if weight_scale == "learned":
                groups = self.scheme.weight_groups(in_features)
                scales = torch.empty(*shape, groups, dtype=torch.float32, device=device)
                self.register_parameter("scales", nn.Parameter(scales))
        elif mode == "int8":
            qweight = torch.empty(rows, in_features, dtype=torch.int8, device=device)
            scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
            weight = nn.Parameter(Int8Weight(qweight, scales, dtype))
        if weight is not None:
            self.register_parameter("weight", weight)
        self._allocate_x_scale(device)
        self._allocate_column_scales(device)
        self.register_parameter("bias", own_bias)
        self.reset_parameters()

    def _begin_as(
        self,
        layer: nn.Module,
        trained: Callable[[], Tensor],
        stored: Callable[[], QuantizedWeight],
        bias: nn.Parameter | None,
        x_scale: Tensor | None,
        key: str = "weight",
        transposed: bool = False,
    ) -> Self:
        """Take over the weight of a float layer, its mask if it is pruned, its bias, and whether it is training.

        Args:
            trained: gives the float weight of mode "qat".
            stored: quantizes the weight, for the other modes.
            key, transposed: how the layer holds its weight.
        """
        pruning = masks.find_pruning(layer, key)
        if self.mode == "qat":
            if pruning is None:
                self.weight = trained()
            else:
                masks.keep_mask(layer, self, pruning, key, transposed)
            self.reset_scales()
        else:
            with torch.inference_mode(False):  # else the weight could not be saved for a gradient
                self._take(stored())
            if self.mode == "int8" and pruning is not None:
                self.keep_zeros(self._rows(pruning.mask.t() if transposed else pruning.mask))
        self.register_parameter("bias", bias)
        if x_scale is not None:  # on the device of the others
            self.set_x_scale(x_scale)
        # What `dequantize_` makes of it again.
        self.float_type = getattr(layer, "float_type", parametrize.type_before_parametrizations(layer))
        return self.train(layer.training)

    def _options_repr(self) -> str:
        """What `extra_repr` tells of the scheme and the mode."""
        learned = ", weight_scale=learned" if self.weight_scale == "learned" else ""
        return f"scheme={self.scheme}, mode={self.mode}, grad_dtype={self.grad_dtype}{learned}"

    __prepare_scriptable__ = refuse_script

    @property
    def weight(self) -> Tensor:
        """The weight [N, K]: the parameter that is trained, or a read-only `FrozenWeight` of a frozen layer.

        Products of the parent with it are those of the layer, whatever the mode.
        """
        return self._frozen_view() if self.mode == "frozen" else self._trained_view()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if self.mode == "frozen":
            if isinstance(value, FrozenWeight) and value.is_of(self):  # layer.weight = layer.weight
                return
            raise refuse_write("weight = ...")
        vars(self)["weight"] = value  # no parameter: what pruning and weight normalization compute

    @weight.deleter
    def weight(self) -> None:
        if self.mode == "frozen":
            raise refuse_write("del weight")
        vars(self).pop("weight", None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Do as `nn.Module`, but refuse the `weight` of a frozen layer; a DTensor shares the layer out.

        `ColwiseParallel` registers each parameter as a DTensor, `RowwiseParallel` the `weight`, which stands for the
        storage of a frozen layer (see `distributed/tensor_parallel.py`).

        Raises:
            RuntimeError: for the weight of a frozen layer.
            ValueError: for a DTensor that splits the weight where it cannot be split.
            NotImplementedError: for a DTensor of another layer than a `QuantLinear`.
        """
        if is_dtensor(param) and not is_dtensor(self._parameters.get(name)):
            self._share_out(name, param)
            if name == "x_scale" or (name == "weight" and self.mode == "frozen"):
                return  # one scale for all processes stays as it is
        if name == "weight_orig" and self.mode != "qat":  # by torch.nn.utils.prune
            raise RuntimeError(
                f"a {type(self).__name__} of mode {self.mode!r} cannot be pruned: prune the float layer before "
                'quantize_, and its zeros stay, or prune a layer of mode="qat"'
            )
        if isinstance(param, FrozenWeight):
            raise refuse_write(f"parameter {name!r}")
        if name == "weight" and self.mode == "frozen":
            raise refuse_write("weight = ...")
        super().register_parameter(name, param)

    def _share_out(self, name: str, like: DTensor) -> None:
        """Before `name` becomes a DTensor: check its placement, and make DTensors of the parameters that go with it."""
        raise NotImplementedError(
            f"{name} of a {type(self).__name__} cannot be a DTensor: tensor parallelism (parallelize_module, tp_plan) "
            "is for QuantLinear; leave this layer out of the plan, or use DDP or FSDP2 (fully_shard)"
        )

    def _frozen_view(self) -> Tensor:
        """The `weight` of a frozen layer."""
        return FrozenWeight(
            self.quantized_weight(),
            self._scheme_name,
            self.in_features,
            self.compute_dtype,
            self.grad_dtype,
            self._current_column_scales(),
            x_scale=self._activation_scale(),
            input_order=self._buffers.get("input_order"),
        )

    @property
    def _learns_x_scale(self) -> bool:
        return self.mode == "qat" and self.weight_scale == "learned"

    def _trained_view(self) -> Tensor:
        """The `weight` of a layer that trains it."""
        weight = self._trained_weight()
        return weight if is_dtensor(weight) else follow(weight, self)

    def _rows(self, weight: Tensor) -> Tensor:
        """The matrix [N, K] of the weight that is trained."""
        return weight

    def _from_rows(self, rows: Tensor) -> Tensor:
        """A weight to train, of a matrix [N, K]."""
        return rows

    def _reset_weight(self) -> None:
        """Give the float weight and the bias the random values of the float layer."""
        raise NotImplementedError

    def _trained_weight(self) -> Tensor:
        """The weight that this layer trains, which is no parameter where pruning computes it."""
        weight = self._parameters.get("weight")
        if weight is None:
            weight = vars(self).get("weight")
        if weight is None and parametrize.is_parametrized(self, "weight"):
            if self.mode == "int8":
                raise RuntimeError('the weight of mode "int8" cannot be parametrized; use mode="qat"')
            weight = self.parametrizations["weight"]()  # type: ignore[index,operator]
        if weight is None:
            raise AttributeError(f"a {type(self).__name__} of mode {self.mode!r} without a weight")
        return weight

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Replace the quantized weight, which must be the canonical storage of this layer's scheme and shape.

        In mode "qat" the float weight becomes a new parameter with the values of `weight` dequantized. Learned scales
        become those of `weight`, and the layer then multiplies exactly it; scales of the range are found anew.

        Raises:
            ValueError: naming the tensor that does not fit; the layer is left as it was.
        """
        super().set_weight(weight)

    def _take(self, weight: QuantizedWeight) -> None:
        if self.mode == "qat":
            own = self._trained_weight()
            values = ops.dequantize_weight(*weight, self.in_features, self._scheme_name).to(own.dtype)
            parameter = nn.Parameter(self._from_rows(values), requires_grad=own.requires_grad)
            if masks.is_masked(self):
                masks.replace_original(self, parameter)
            else:
                self.weight = parameter
            if self.weight_scale == "learned":
                scales = weight.scales.clone().view(self.scales.shape)
                self.register_parameter("scales", nn.Parameter(scales, requires_grad=self.scales.requires_grad))
            return
        if self.mode == "int8":  # what is trained is this layer's own
            own = Int8Weight(weight.qweight.detach().clone(), weight.scales.detach().clone(), self.compute_dtype)
            old = self._parameters.get("weight", vars(self).get("weight"))
            self.weight = nn.Parameter(own, old is None or old.requires_grad)
            return
        self._keep(weight)
        self.update_column_scales()

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as it is multiplied, in the canonical storage; in mode "qat" it is quantized for this call."""
        if self.mode == "frozen":
            return super().quantized_weight()
        pruning = masks.find_pruning(self)
        weight = self._trained_weight() if pruning is None else pruning.weight
        if self.mode == "int8":
            return QuantizedWeight(*state_parts(self._masked(weight)), None)
        rows = self._rows(weight.detach())
        if self.weight_scale == "learned":
            scales = self.scales.detach().flatten(0, -2)
            return QuantizedWeight(ops.quantize_weight_scaled(rows, scales, self._scheme_name), scales.clone(), None)
        return ops.quantize_weight(rows, self._scheme_name)

    def freeze_(self) -> Self:
        """Make the layer frozen, in place, with the weight that it multiplies now: outputs keep their bits.

        The mask of a pruned layer is dropped. The integers that it made 0 stay 0.

        Raises:
            RuntimeError: if the weight is computed by something else than a mask, or it, or a learned scale of
                activations, holds NaN or Inf.
        """
        if self.mode == "frozen":
            return self
        if (problem := self.freezing_problem()) is not None:
            raise RuntimeError(problem)
        weight, x_scale = self.quantized_weight(), self.x_scale
        masks.make_permanent(self)
        self._buffers.pop("weight_mask", None)
        del self.weight
        self.mode, self.weight_scale = "frozen", "absmax"
        self._allocate_column_scales(weight.scales.device)
        with torch.inference_mode(False):
            self._take(weight.map(Tensor.detach))
        if x_scale is not None:
            self.set_x_scale(x_scale)
        return self

    def freezing_problem(self) -> str | None:
        """Why `freeze_` would raise; None: it would not."""
        if self.mode == "frozen":
            return None
        if (problem := x_scale_problem(self.x_scale, self.scheme)) is not None:
            return f"x_scale {problem}"
        pruning = masks.find_pruning(self)
        if "weight" not in self._parameters and pruning is None:
            return (
                "the weight is computed by a hook or a parametrization that is no mask; make it permanent before "
                "freeze_, as by torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
        if self.mode == "qat":
            weight = self._trained_weight() if pruning is None else pruning.weight
            scales = self.scales if self.weight_scale == "learned" else None
            for name, tensor in (("weight", weight), ("scales", scales)):
                if tensor is not None and not _is_finite(tensor.detach()):
                    return f"{name} must be finite, got NaN or Inf values"
        return None

    def thaw_int8_(self) -> Self:
        """Make a frozen layer one of mode "int8", in place; its weight stays as it is.

        Raises:
            ValueError: if the scheme has 4-bit or grouped weights, or the columns have an order of their own.
        """
        _check_trainable(self.scheme, "int8")
        if "input_order" in self._buffers:
            raise ValueError(
                "input_order must be None for mode='int8': call "
                "layer.set_weight(quantize_weight(layer.dequantize(), layer.scheme)) first, which rounds again"
            )
        weight = self.quantized_weight()
        for name in STORAGE:
            del self._parameters[name]
        del self._buffers["column_scales"]
        self.mode = "int8"
        self._take(weight)
        return self

    def keep_zeros(self, mask: Tensor) -> None:
        """Let the integers of mode "int8" stay 0 in training where a mask is False.

        The mask is the buffer `weight_mask`, which the state dict holds. Gradients are 0 there, and what an optimizer
        writes there is set to 0 by the next forward. A layer of mode "qat" is pruned by `torch.nn.utils.prune`.

        >>> layer = qk.QuantLinear.from_float(nn.Linear(8, 4), "w8a8", mode="int8")
        >>> layer.keep_zeros(torch.eye(4, 8, dtype=torch.bool))
        >>> int(layer.qweight.count_nonzero())
        4

        Args:
            mask: bool, of the shape of `weight`.

        Raises:
            ValueError: for another mode, dtype or shape.
        """
        if self.mode != "int8":
            raise ValueError(f'mode must be "int8", got {self.mode!r}')
        weight = self._trained_weight()
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"mask must be bool of shape {list(weight.shape)}, got {mask.dtype} of shape {list(mask.shape)}"
            )
        self.weight_mask = nn.Buffer(mask.detach().to(weight.device).contiguous())
        self._masked(weight)

    def _masked(self, weight: Tensor) -> Tensor:
        """The weight of mode "int8", whose gradient and integers are 0 where the buffer `weight_mask` is False."""
        mask = self._buffers.get("weight_mask")
        if mask is None:
            return weight
        qweight = getattr(weight, "qweight", None)  # a DTensor has none: its gradient is masked
        if qweight is not None and not qweight.is_meta:
            masks.clear_masked(qweight, mask)
        return mask_gradient(weight, mask)

    def _allocate_column_scales(self, device: torch.device | str | None) -> None:
        """Register the buffer `column_scales` of a grouped weight, for its int8 gradient: derived, never saved."""
        self._column_scales_of: tuple[tuple[int, int], ...] | None = None
        if self.mode != "frozen":
            return
        scales = None
        if self.grad_dtype == "int8" and not self.scheme.row_scaled:
            scales = torch.ones(self.in_features, dtype=torch.float32, device=device)
        self.register_buffer("column_scales", scales, persistent=scales is None)

    def update_column_scales(self) -> None:
        """Derive the buffer `column_scales` from the weight; a layer does so by itself when its weight changes."""
        qweight = self._parameters.get("qweight")  # what FSDP shards is looked at in each call
        known = isinstance(qweight, StoredParameter) and not qweight.is_meta
        if known and self._buffers.get("column_scales") is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.column_scales = ops.column_scales(*self._frozen_weight(), self.in_features, self._scheme_name)
            self._column_scales_of = self._versions()

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """Tell which values the weight has, by where its tensors lie and how often they were written."""
        stored = (self._parameters[name] for name in STORAGE)
        return tuple((tensor.data_ptr(), tensor._version) for tensor in stored if tensor is not None)

    def _current_column_scales(self) -> Tensor | None:
        """`column_scales` of the weight as it is now; None: there are none."""
        if self._buffers.get("column_scales") is None:
            return None
        if torch.compiler.is_compiling() or not isinstance(self.qweight, StoredParameter):
            return ops.column_scales(*self._frozen_weight(), self.in_features, self._scheme_name)
        if not self.qweight.is_meta and self._column_scales_of != self._versions():
            self.update_column_scales()
        return self.column_scales

    def _column_scales_for(self, x: Tensor) -> Tensor | None:
        """`column_scales`, if a gradient of x will need it."""
        return self._current_column_scales() if torch.is_grad_enabled() and x.requires_grad else None

    def reset_scales(self) -> None:
        """Let learned scales begin anew, with those of the weight's range; without learned scales nothing changes."""
        if self.weight_scale == "learned" and not self._trained_weight().is_meta:
            with torch.no_grad():
                scales = ops.quantize_weight(self._rows(self._trained_weight()), self._scheme_name).scales
                requires_grad, scales = self.scales.requires_grad, scales.view(self.scales.shape)
                self.register_parameter("scales", nn.Parameter(scales, requires_grad=requires_grad))

    def reset_parameters(self) -> None:
        """Set the layer to the zero weight; only in mode "qat" is there a random initialization, the float layer's."""
        if self.mode == "qat":
            self._reset_weight()
            self.reset_scales()
            return
        with torch.no_grad():
            if self.mode == "int8":
                weight = self.quantized_weight()
                weight.qweight.zero_()
                weight.scales.fill_(1.0)
                if self.bias is not None:
                    self.bias.zero_()
                return
            self._set_to_zero()
            if self.bias is not None:
                self.bias.zero_()

    def storage_bytes(self) -> int:
        """Bytes of the weight that the layer keeps (without the bias)."""
        if self.mode != "qat":
            return super().storage_bytes()
        stored = (self._trained_weight(), self._parameters.get("scales"))
        return sum(t.numel() * t.element_size() for t in stored if t is not None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """In mode "int8" the state dict is that of a frozen layer."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mode == "int8":
            del destination[prefix + "weight"]
            destination[prefix + "qweight"], scales = self.quantized_weight()[:2]
            destination[prefix + "scales"] = StateScales.of(scales)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check the whole layer before anything is copied, so that a bad tensor leaves the layer as it was."""
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.mode == "qat":
            x_scale = state_dict.get(prefix + "x_scale")
            if x_scale is not None and (problem := x_scale_problem(x_scale, self.scheme)) is not None:
                error_msgs.append(f"{prefix}x_scale {problem}")
            else:
                super()._load_from_state_dict(*args)
            return
        errors = self._storage_errors(state_dict, prefix)
        if (problem := self._bias_problem(state_dict.get(prefix + "bias"))) is not None:
            errors.append(f"{prefix}bias {problem}")
        if prefix + "weight" in state_dict and prefix + "qweight" not in state_dict:
            errors.append(
                f"{prefix}weight is a float weight, but the layer is quantized ({self.scheme}): load it into the "
                "float model and quantize that, or load a state dict saved from the quantized model"
            )
        if errors:
            error_msgs.extend(errors)
            return
        if self.mode == "int8":
            self._load_int8(*args)
        else:
            super()._load_from_state_dict(*args)
            leave_out_marker(state_dict, prefix, unexpected_keys)
            if prefix + "weight_mask" in unexpected_keys:  # of mode "int8", whose integers are 0 where it is False
                unexpected_keys.remove(prefix + "weight_mask")
            self.update_column_scales()

    def _load_int8(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Copy `qweight` and `scales`, which are no parameters here, and leave bias and mask to torch."""
        if (mask := state_dict.get(prefix + "weight_mask")) is not None and "weight_mask" not in self._buffers:
            self.weight_mask = nn.Buffer(torch.ones_like(mask, device=self._trained_weight().device))
        qweight, scales = (state_dict.get(prefix + name) for name in ("qweight", "scales"))
        missing_keys += [prefix + name for name, part in (("qweight", qweight), ("scales", scales)) if part is None]
        if qweight is not None and scales is not None:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self.weight = load_parts(self._trained_weight(), qweight, scales, assign, prefix)
        others = {key: value for key, value in state_dict.items() if key[len(prefix) :] not in STORAGE}
        others[prefix + "weight"] = self._trained_weight().detach()
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _bias_problem(self, bias: object) -> str | None:
        """Why `bias` cannot take the place of the layer's; None if it can, or either is absent."""
        if bias is None or self.bias is None:
            return None
        expected = (
            f"must be a float {f'tensor {[*self.bias.shape]}' if self.leading else f'vector of {len(self.bias)}'}"
        )
        if not isinstance(bias, Tensor):
            return f"{expected}, got {type(bias).__name__}"
        if bias.shape == self.bias.shape and bias.dtype in FLOAT_DTYPES:
            return None
        return f"{expected}, got {bias.dtype} of shape {list(bias.shape)}"


def leave_out_marker(state_dict: Mapping[str, Tensor], prefix: str, unexpected_keys: list[str]) -> None:
    """Accept the empty `weight` by which a saved folder says that it needs qkernels (`integrations/folders.py`)."""
    key = f"{prefix}weight"
    if key in unexpected_keys and state_dict[key].numel() == 0:
        unexpected_keys.remove(key)
