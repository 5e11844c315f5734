"""What PEFT does with whole layers: copies that are trained, targets by parameter, embeddings found by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from peft.peft_model import PeftModel
from peft.tuners.glora.layer import GloraLinear
from peft.tuners.glora.model import GloraModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, init_empty_weights
from peft.utils import other, save_and_load
from peft.utils.other import ModulesToSaveWrapper, _get_submodules
from torch import Tensor, nn

from ...nn.adapters import adapter_of, float_twin, is_frozen
from ...nn.linear import QuantLinear
from ...nn.storage import Storage
from .base_weight import replace_everywhere, stores_integers


def _weight_of_base(weight: property) -> property:
    """PEFT's `weight` of its layers, which would be the `qweight` of a base layer that has one."""

    def read(self: Any) -> Any:
        base = self.get_base_layer()
        return base.weight if isinstance(base, Storage) else weight.fget(self)  # type: ignore[misc]

    return property(read)


def _train_float_copies(update: Callable[..., None]) -> Callable[..., None]:
    """`ModulesToSaveWrapper.update`, for quantized modules: what is trained and saved is a copy in float."""

    @functools.wraps(update)
    def update_with_floats(self: Any, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        original = self.original_module
        if tied_module is not None or not any(map(is_frozen, original.modules())):
            update(self, adapter_name, tied_module=tied_module, **kwargs)
            return
        self.original_module = _float_copy(original)
        try:
            update(self, adapter_name, tied_module=tied_module, **kwargs)
        finally:
            self.original_module = original.requires_grad_(False)

    return update_with_floats


def _tune_float_copies(update_layer: Callable[..., None]) -> Callable[..., None]:
    """`LNTuningLayer.update_layer`, which trains a copy of the layer that it is put on: in float."""

    @functools.wraps(update_layer)
    def update_with_floats(self: Any, layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        update_layer(self, _float_copy(layer) if is_frozen(layer) else layer, adapter_name, **kwargs)

    return update_with_floats


def _float_copy(module: nn.Module) -> nn.Module:
    """A copy of the module with float layers in place of frozen ones."""
    if not (isinstance(module, Storage) and is_frozen(module)):
        module = copy.deepcopy(module)
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if is_frozen(child):
                    setattr(parent, name, _float_copy(child))
        return module
    if getattr(module, "embed_scale", None) is not None:
        raise ValueError(
            f"modules_to_save cannot train {module}, whose rows are multiplied by {module.embed_scale:g}; leave it in "
            "float with skip=[its name] in quantize_"
        )
    values = module.dequantize().to(module.compute_dtype)
    layer = float_twin(module, nn.Parameter(values, requires_grad=False), plain=True)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _check_adapter(set_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `set_peft_model_state_dict`, which refuses an adapter of NaN or Inf for a quantized model."""

    @functools.wraps(set_state_dict)
    def check(model: nn.Module, peft_model_state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if any(map(is_frozen, model.modules())):
            for name, tensor in peft_model_state_dict.items():
                if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                    raise ValueError(f"adapter tensor {name} must be finite, got NaN or Inf; nothing was loaded")
        return set_state_dict(model, peft_model_state_dict, *args, **kwargs)

    return check


def _name_quantized_embeddings(setup_prompt_encoder: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's search of the embedding by the name and the length of its weight, with a name for quantized ones."""

    @functools.wraps(setup_prompt_encoder)
    def setup(self: Any, adapter_name: str) -> Any:
        backbones = [module for _, module in self.base_model.named_children()]
        for backbone in backbones:
            backbone.named_parameters = functools.partial(_named_weights, backbone)
        try:
            return setup_prompt_encoder(self, adapter_name)
        finally:
            for backbone in backbones:
                del backbone.named_parameters

    return setup


def _named_weights(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters`, where the integers of a quantized embedding are called `weight`."""
    embeddings = {f"{name}.qweight" for name, m in model.named_modules() if is_frozen(m) and adapter_of(m).lookup}
    for name, parameter in type(model).named_parameters(model, *args, **kwargs):
        yield name.removesuffix("qweight") + "weight" if name in embeddings else name, parameter


def _target_weights(inject_parameters: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """PEFT's search for `target_parameters`, which finds the weight of a layer that stores integers too.

    That cannot be wrapped: the adapter goes where one of `target_modules` goes, and computes the same.
    """

    @functools.wraps(inject_parameters)
    def inject(self: Any, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> list[str]:
        found, layers = [], []
        for name, module in list(model.named_modules()):
            base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            key = f"{name}.weight"
            wanted = any(key == target or key.endswith(f".{target}") for target in peft_config.target_parameters)
            if not wanted or not isinstance(base, QuantLinear) or not stores_integers(base):
                continue
            parent, target, target_name = _get_submodules(model, name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key=name)
            found.append(key)
            layers.append(base)
        for layer in layers:  # PEFT would find the parameter of mode "int8" as well
            vars(layer)["named_parameters"] = lambda *args, **kwargs: iter(())
        try:
            return found + inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage)
        finally:
            for layer in layers:
                del vars(layer)["named_parameters"]

    return inject


def _glora_first(create_new_module: Callable[..., Any]) -> Callable[..., Any]:
    """GLoRA's layer, which computes on the weight of any linear layer, but is made for `nn.Linear` itself only."""

    @functools.wraps(create_new_module)
    def create(peft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantLinear):
            return GloraLinear(target, adapter_name, config=peft_config)
        return create_new_module(peft_config, adapter_name, target, **kwargs)

    return create


def _checkpoint_quantized(prepare: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`prepare_model_for_kbit_training`, which turns on gradient checkpointing for the kinds of weights it knows."""

    @functools.wraps(prepare)
    def prepare_model_for_kbit_training(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        known = hasattr(model, "is_loaded_in_8bit") or not any(isinstance(m, Storage) for m in model.modules())
        if known:
            return prepare(model, *args, **kwargs)
        model.is_loaded_in_8bit = True  # type: ignore[assignment]
        try:
            return prepare(model, *args, **kwargs)
        finally:
            del model.is_loaded_in_8bit

    return prepare_model_for_kbit_training


def install() -> None:
    """Let PEFT find, copy and read quantized layers."""
    BaseTuner._inject_parameters = _target_weights(BaseTuner._inject_parameters)
    BaseTunerLayer.weight = _weight_of_base(BaseTunerLayer.weight)
    GloraModel._create_new_module = staticmethod(_glora_first(GloraModel._create_new_module))
    LNTuningLayer.update_layer = _tune_float_copies(LNTuningLayer.update_layer)
    ModulesToSaveWrapper.update = _train_float_copies(ModulesToSaveWrapper.update)
    PeftModel._setup_prompt_encoder = _name_quantized_embeddings(PeftModel._setup_prompt_encoder)
    replace_everywhere("set_peft_model_state_dict", _check_adapter(save_and_load.set_peft_model_state_dict))
    replace_everywhere("prepare_model_for_kbit_training", _checkpoint_quantized(other.prepare_model_for_kbit_training))
