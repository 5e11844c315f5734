"""A merge of adapters that re-quantizes, says what that cost, and can be undone bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...formats.storage import QuantizedWeight, restore_features
from ...kernels import ops
from ...kernels.quantizers import quantize_weight
from ...nn.adapters import adapter_of
from ...nn.linear import QuantLinear, relative_error, stored_columns
from ...nn.matrix_layer import MatrixLayer
from ...nn.storage import Storage
from .base_weight import QKernelsBackend, float_copy, innermost, put_weight, stores_integers, tensors_of
from .experts import adopt_wrapper


class Requantizing:
    """The merge of a PEFT layer, of any method, over a layer that stores integers.

    `merge` lets the method merge its adapters into the dequantized weight, in float32, and quantizes the result; the
    relative error of that rounding is kept as `merge_error` on the quantized layer (see `merge_errors`). The quantized
    weight from before is kept until `unmerge`, which restores it bit for bit.
    """

    base_layer: Any
    merged_adapters: list[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the quantized weight.

        Args:
            safe_merge: accepted for compatibility: nothing is changed before the merged weight is known to be finite.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            ValueError: if the merged weight or bias holds NaN or Inf; the layer is left as it was.
            RuntimeError: if the method cannot merge, as where an adapter has a bias and the layer has none; likewise.
        """
        holder = innermost(self)
        if not isinstance(holder.base_layer, Storage):  # a method that merges into the float copy by parts
            cast(Any, super()).merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        state = _state(holder) or _Merged(tensors_of(holder.base_layer), [])
        others = [(layer, layer.merged_adapters) for layer in state.layers if layer is not self]
        if _remerge(holder, state.original, [*others, (self, [*self.merged_adapters, *names])], names):
            state.layers = [*(layer for layer, _ in others), self]
            vars(holder)["_merged"] = state
            warnings.warn(
                "merging into a quantized layer rounds the merged weight; "
                "qkernels.integrations.peft.merge_errors(model) gives the relative error of each layer",
                stacklevel=2,
            )

    def unmerge(self) -> None:
        """Restore the quantized weight and the bias from before the merge, bit for bit."""
        holder = innermost(self)
        if not isinstance(holder.base_layer, Storage):
            cast(Any, super()).unmerge()
            return
        state = _state(holder)
        if not self.merged_adapters or state is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        state.layers = [layer for layer in state.layers if layer is not self]
        self.merged_adapters = []
        if state.layers:  # of other methods
            _remerge(holder, state.original, [(layer, layer.merged_adapters) for layer in state.layers], [])
            return
        base = holder.base_layer
        put_weight(base, _weight(base, state.original))
        if "bias" in state.original:
            base.bias.data = state.original["bias"].to(base.quantized_weight().qweight.device)
        del vars(holder)["_merged"], vars(base)["merge_error"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self).__module__ == __name__:  # made by `_requantizing`, where pickle does not find it
            return _new_requantizing, (type(self).__mro__[2],), self.__dict__
        return super().__reduce_ex__(protocol)


@dataclasses.dataclass
class _Merged:
    """What a base layer stored before anything was merged into it, and the PEFT layers that are merged now."""

    original: dict[str, Tensor]
    layers: list[Any]


def _state(holder: Any) -> _Merged | None:
    return vars(holder).get("_merged")


def _weight(base: Storage, tensors: dict[str, Tensor]) -> QuantizedWeight:
    """The weight among what a base layer stored before, where the layer is now."""
    weight = QuantizedWeight(tensors["qweight"], tensors["scales"], tensors.get("zeros"))
    return weight.map(lambda tensor: tensor.to(base.quantized_weight().qweight.device))


def _remerge(holder: Any, original: dict[str, Tensor], wanted: list[tuple[Any, list[str]]], new: list[str]) -> bool:
    """Merge all adapters at once into the original weight, which is rounded once and not once per adapter.

    Args:
        holder: the PEFT layer that holds the base layer.
        original: the tensors of the base layer without adapters.
        wanted: the layers, and the adapters of each that are to be merged in the end.
        new: the adapters among them that errors name.

    Returns:
        False if no layer has such adapters; then, and if an error is raised, nothing has changed.
    """
    base, before = holder.base_layer, [list(layer.merged_adapters) for layer, _ in wanted]
    layer_name = getattr(holder, "kwargs", {}).get("target_name", "layer")
    values = ops.dequantize_weight(*_weight(base, original), base.in_features, base.scheme)
    twin = holder.base_layer = float_copy(base, restore_features(values, base._buffers.get("input_order")))
    if "bias" in original:
        twin.bias = nn.Parameter(original["bias"].to(base.bias.device, torch.float32, copy=True), requires_grad=False)
    try:
        for layer, names in wanted:
            layer.merged_adapters = []
            layer.merge(safe_merge=False, adapter_names=list(names))
        merged = [list(layer.merged_adapters) for layer, _ in wanted]
    finally:
        holder.base_layer = base
        for (layer, _), names in zip(wanted, before, strict=True):
            layer.merged_adapters = names
    if new and merged == before:
        return False
    weight, bias = adapter_of(twin).weight(twin), adapter_of(twin).bias(twin)
    if not weight.isfinite().all() or (bias is not None and not bias.isfinite().all()):
        raise ValueError(f"{layer_name}: merging {new} gives NaN or Inf; nothing was changed")
    if bias is not None and "bias" not in original:
        raise RuntimeError(f"{layer_name}: merging {new} needs a bias, and the layer has none; nothing was changed")
    for (layer, _), names in zip(wanted, merged, strict=True):
        layer.merged_adapters = names
    put_weight(base, quantize_weight(stored_columns(base, weight), base.scheme))
    if bias is not None:
        base.bias.data = bias.detach().to(base.bias.dtype)
    base.merge_error = relative_error(weight, base)
    return True


@functools.cache
def _requantizing(kind: type) -> type:
    """The class of a PEFT layer with the merge of `Requantizing`."""
    return type(f"Quant{kind.__name__}", (Requantizing, kind), {"__module__": __name__})


def _new_requantizing(kind: type) -> nn.Module:
    made: Any = _requantizing(kind)
    return cast(nn.Module, made.__new__(made))


# The class that a layer of one of PEFT's classes gets, where it is not the one of `_requantizing`.
OWN_CLASSES: dict[type, type] = {}


def adopt_layers(model: nn.Module) -> list[Any]:
    """Give every PEFT layer over integers the merge of `Requantizing`; the list of them."""
    found = []
    for module in model.modules():
        if isinstance(module, LNTuningLayer):  # its merge puts a float layer in the place of the base
            continue
        if isinstance(module, ParamWrapper):
            found += [module] if adopt_wrapper(module) else []
            continue
        if isinstance(module, BaseTunerLayer) and stores_integers(module.get_base_layer()):
            kind: Any = type(module)
            if kind in OWN_CLASSES:
                module.__class__, module.fan_in_fan_out = OWN_CLASSES[kind], False
            elif not isinstance(module, Requantizing):
                module.__class__ = _requantizing(kind)
            if module.quantization_backend is None and not adapter_of(module.get_base_layer()).lookup:
                module.quantization_backend = QKernelsBackend()
            found.append(module)
    return found


def merge_errors(model: nn.Module) -> dict[str, float]:
    """By layer name: the relative error (Frobenius norm) of re-quantizing, for each layer an adapter is merged into."""
    return _errors(model, "merge_error")


def initialization_errors(model: nn.Module) -> dict[str, float]:
    """By layer name: what rounding cost where the creation of an adapter changed the base, as PiSSA's does.

    It is how far the weight of the base with that of the adapter is from the weight before, relative to that.
    """
    return _errors(model, "initialization_error")


def _errors(model: nn.Module, attribute: str) -> dict[str, float]:
    errors = ((name, getattr(module, attribute, None)) for name, module in model.named_modules())
    return {name.removesuffix(".base_layer"): error for name, error in errors if error is not None}


def _refuse_int8_convolutions(tuner: Any, model: nn.Module, config: Any) -> None:
    """Raise ValueError for a method that would read the weight of such a layer, whose integers lie in another order."""
    if type(config) is LoraConfig and not config.use_dora:
        return
    for name, module in model.named_modules():
        convolution = isinstance(module, MatrixLayer) and not isinstance(module, QuantLinear) and not module.leading
        if convolution and module.mode == "int8" and tuner._check_target_module_exists(config, name):
            raise ValueError(f'{name} is a convolution of mode "int8", which takes LoRA without DoRA only')


def _inject_first(inject_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inject_adapter)
    def inject(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        _refuse_int8_convolutions(self, model, self.peft_config[adapter_name])
        result = inject_adapter(self, model, adapter_name, *args, **kwargs)
        adopt_layers(model)
        return result

    return inject


def _refuse_pruned(model: nn.Module) -> None:
    """Raise ValueError for adapted layers that are trained with a mask: it would take merged values away again."""
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if not isinstance(base, MatrixLayer) or base.mode == "frozen" or base.leading:
            continue
        if "weight" not in base._parameters or base._buffers.get("weight_mask") is not None:
            raise ValueError(
                f"{name}: adapters cannot be merged into a pruned layer of mode {base.mode!r}, whose zeros stay 0; "
                "call qkernels.freeze_(model) first; nothing was changed"
            )


def _merge_all_or_nothing(merge_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `merge_adapter`, which leaves every layer as it was if one of them cannot be merged."""

    @functools.wraps(merge_adapter)
    def merge(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> Any:
        _refuse_pruned(self.model)
        before: dict[Any, list[str]] = {layer: list(layer.merged_adapters) for layer in adopt_layers(self.model)}
        try:
            return merge_adapter(self, adapter_names=adapter_names, safe_merge=safe_merge)
        except Exception:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for layer, names in before.items():
                    if list(layer.merged_adapters) != names:
                        layer.unmerge()
                        if names:
                            layer.merge(adapter_names=names)
            raise

    return merge


def _merge_before_unloading(unload_and_optionally_merge: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's removal of its layers, which begins once all that is to be merged into quantized layers is merged."""

    @functools.wraps(unload_and_optionally_merge)
    def unload(
        self: Any,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            _refuse_pruned(self.model)
        layers = adopt_layers(self.model) if merge else []
        if layers:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        with warnings.catch_warnings():
            if layers:
                warnings.filterwarnings(
                    "ignore", "Already following adapters were merged|All adapters are already merged"
                )
            return unload_and_optionally_merge(self, merge, progressbar, safe_merge, adapter_names)

    return unload


def install() -> None:
    """Give PEFT's tuners the merge of `Requantizing` over quantized layers."""
    BaseTuner.inject_adapter = _inject_first(BaseTuner.inject_adapter)
    BaseTuner.merge_adapter = _merge_all_or_nothing(BaseTuner.merge_adapter)
    BaseTuner._unload_and_optionally_merge = _merge_before_unloading(BaseTuner._unload_and_optionally_merge)
