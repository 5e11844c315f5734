"""PEFT: adapters over quantized layers, with a merge that re-quantizes and says what that cost.

Nothing here is needed to train: PEFT's own layers accept a `QuantLinear`, which is an `nn.Linear`, and read its weight.
But their `merge` would write to it, so that they get the one of `Requantizing`. The forward of PEFT's LoRA layer
converts activations to the adapters' dtype and back, so that its last dispatcher, the one for `nn.Linear`, is preceded
by one that puts `QuantLoraLinear` on a `QuantLinear`. What `modules_to_save` trains is a copy in float.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings

import torch
from peft.peft_model import PeftModel
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import save_and_load
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..autograd.frozen import LowRank
from ..convert.model import AFTER_QUANTIZE
from ..convert.report import QuantizationReport
from ..formats.storage import QuantizedWeight
from ..kernels import ops
from ..kernels.quantizers import quantize_weight
from ..nn.adapters import adapter_of, float_twin, is_frozen
from ..nn.attention import QuantMultiheadAttention
from ..nn.linear import QuantLinear, relative_error
from ..nn.storage import Storage

# Initializations of an adapter that neither read nor change the base weight.
_FLOAT_FREE_INITS = (True, False, "gaussian", "eva")
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16)


class Requantizing:
    """The merge of a PEFT layer, of any method, over a frozen `QuantLinear` or `QuantEmbedding`.

    `merge` lets the method merge its adapters into the dequantized weight, in float32, and quantizes the result; the
    relative error of that rounding is kept as `merge_error` on the quantized layer (see `merge_errors`). The quantized
    weight from before is kept until `unmerge`, which restores it bit for bit.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the quantized weight.

        Args:
            safe_merge: accepted for compatibility: nothing is changed before the merged weight is known to be finite.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            ValueError: if the merged weight or bias holds NaN or Inf; the layer is left as it was.
            RuntimeError: if the method cannot merge, as where an adapter has a bias and the layer has none; likewise.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base, before = self.base_layer, list(self.merged_adapters)
        original = getattr(self, "_original", None) or _tensors(base)
        layer_name = getattr(self, "kwargs", {}).get("target_name", "layer")
        # All merged adapters at once onto the original weight: it is rounded once, not once per adapter.
        weight = QuantizedWeight(*map(original.get, QuantizedWeight._fields))
        values = ops.dequantize_weight(*weight, base.in_features, base.scheme)
        twin = self.base_layer = float_twin(base, nn.Parameter(values, requires_grad=False), plain=True)
        if "bias" in original:
            twin.bias = nn.Parameter(original["bias"].to(torch.float32, copy=True), requires_grad=False)
        self.merged_adapters = []
        try:
            super().merge(safe_merge=False, adapter_names=[*before, *names])
            merged = list(self.merged_adapters)
        finally:
            self.base_layer, self.merged_adapters = base, before
        if merged == before:
            return
        weight, bias = twin.weight.detach(), getattr(twin, "bias", None)
        if not weight.isfinite().all() or (bias is not None and not bias.isfinite().all()):
            raise ValueError(f"{layer_name}: merging {names} gives NaN or Inf; nothing was changed")
        if bias is not None and base.bias is None:
            raise RuntimeError(
                f"{layer_name}: merging {names} needs a bias, and the layer has none; nothing was changed"
            )
        self._original, self.merged_adapters = original, merged
        base.set_weight(quantize_weight(weight, base.scheme))
        if bias is not None:
            base.bias.data = bias.detach().to(base.bias.dtype)
        base.merge_error = relative_error(weight, base)
        warnings.warn(
            "merging into a quantized layer rounds the merged weight; "
            "qkernels.integrations.peft.merge_errors(model) gives the relative error of each layer",
            stacklevel=2,
        )

    def unmerge(self) -> None:
        """Restore the quantized weight and the bias from before the merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.base_layer
        base.set_weight(QuantizedWeight(*map(self._original.get, QuantizedWeight._fields)))
        if "bias" in self._original:
            base.bias.data = self._original["bias"]
        del self._original, base.merge_error
        self.merged_adapters = []

    def __reduce_ex__(self, protocol):
        if type(self) is QuantLoraLinear:
            return super().__reduce_ex__(protocol)
        return _new_requantizing, (type(self).__mro__[2],), self.__dict__


class QuantLoraLinear(Requantizing, LoraLinear):
    """LoRA over a `QuantLinear`.

    Adapters are multiplied in the dtype of the layer's output, bfloat16 or float32, whatever dtype they are kept in:
    casting the adapters is cheap, casting the activations is not (PEFT makes float32 copies of input and output for
    float32 adapters on a bfloat16 model). Their gradients have the dtype of the adapters.

    `merge` is that of `Requantizing`.
    """

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        if config.init_lora_weights not in _FLOAT_FREE_INITS:
            raise ValueError(
                f"init_lora_weights must be one of {_FLOAT_FREE_INITS} for a quantized layer, "
                f"got {config.init_lora_weights!r}, which reads or changes the float weight"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config, **kwargs):
        if super().resolve_lora_variant(config=config, **kwargs) is not None:
            raise ValueError(
                "plain LoRA is the only variant for a quantized layer; use_dora and the like read the float weight"
            )

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapters = self._fast_adapters() if not args and not any(kwargs.values()) else None
        if adapters is None:
            return super().forward(x, *args, **kwargs)
        if len(adapters) == 1 and self._fuses(adapters[0], x):
            (name,) = adapters
            adapter = LowRank(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
            return self.base_layer.forward_adapted(x, adapter)
        out = self.base_layer(x)
        if out.dtype not in _ADAPTER_DTYPES:
            return super().forward(x)
        result, x = out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]).to(out.dtype)
        for name in adapters:
            down, up = (matrices[name].weight.to(out.dtype) for matrices in (self.lora_A, self.lora_B))
            # The scaling goes to the r columns in the middle, and the sum into the product.
            middle = nn.functional.linear(self.lora_dropout[name](x), down) * self.scaling[name]
            result = torch.addmm(result, middle, up.t())
        return result.reshape(out.shape)

    def _fast_adapters(self) -> list[str] | None:
        """The active adapters, or None if one of them is more than two matrices, or is not to be applied."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        for name in names:
            modules = (self.lora_A[name], self.lora_B[name])
            # A wrapper, such as FSDP's, gathers the weight in its forward.
            plain = all(type(module) is nn.Linear and module.bias is None for module in modules)
            if not plain or name in self.lora_variant:
                return None
        return names

    def _fuses(self, name: str, x: Tensor) -> bool:
        """Whether base and adapter see the same x, and nothing but their forward happens when they are called."""
        base, dropout = self.base_layer, self.lora_dropout[name]
        watched = any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in (base, self.lora_A[name], self.lora_B[name])
        )
        dropped = self.training and not isinstance(dropout, nn.Identity)
        half = torch.float16 in (x.dtype, torch.get_autocast_dtype(x.device.type))
        return type(base) is QuantLinear and base.mode == "frozen" and not (watched or dropped or half)


def _tensors(base: nn.Module) -> dict[str, Tensor]:
    stored = {name: tensor for name, tensor in base.quantized_weight()._asdict().items() if tensor is not None}
    bias = getattr(base, "bias", None)
    return {name: tensor.detach() for name, tensor in (stored if bias is None else {**stored, "bias": bias}).items()}


@functools.cache
def _requantizing(kind: type) -> type:
    """The class of a PEFT layer with the merge of `Requantizing`."""
    return type(f"Quant{kind.__name__}", (Requantizing, kind), {"__module__": __name__})


def _new_requantizing(kind: type) -> nn.Module:
    kind = _requantizing(kind)
    return kind.__new__(kind)


def _adopt_layers(model: nn.Module) -> list[nn.Module]:
    """Give every PEFT layer over a frozen layer the merge of `Requantizing`; the list of them."""
    found = []
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(module, BaseTunerLayer) and is_frozen(base) and not base.leading:  # experts: peft_experts.py
            if type(module) is LoraLinear:
                module.__class__, module.fan_in_fan_out = QuantLoraLinear, False
            elif not isinstance(module, Requantizing):
                module.__class__ = _requantizing(type(module))
            found.append(module)
    return found


def merge_errors(model: nn.Module) -> dict[str, float]:
    """By layer name: the relative error (Frobenius norm) of re-quantizing, for each layer an adapter is merged into."""
    errors = ((name, getattr(module, "merge_error", None)) for name, module in model.named_modules())
    return {name.removesuffix(".base_layer"): error for name, error in errors if error is not None}


def _dispatch_first(dispatch_default):
    """PEFT's `dispatch_default`, preceded by the choice of `QuantLoraLinear` for a `QuantLinear`."""

    @functools.wraps(dispatch_default)
    def dispatch(target, adapter_name, config, parameter_name=None, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantMultiheadAttention):
            raise ValueError(
                "target_modules must name the projections of quantized attention, which are layers of their own: "
                "in_proj (or q_proj, k_proj, v_proj) and out_proj, got the whole nn.MultiheadAttention"
            )
        # The other modes have a weight to merge into.
        if parameter_name is not None or not is_frozen(base) or adapter_of(base).lookup:
            return dispatch_default(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)
        config.fan_in_fan_out = False  # a quantized Conv1D is stored as [N, K] too
        return QuantLoraLinear(target, adapter_name, config=config, **kwargs)

    return dispatch


def _inject_first(inject_adapter):
    @functools.wraps(inject_adapter)
    def inject(self, model, *args, **kwargs):
        result = inject_adapter(self, model, *args, **kwargs)
        _adopt_layers(model)
        return result

    return inject


def _merge_all_or_nothing(merge_adapter):
    """PEFT's `merge_adapter`, which leaves every layer as it was if one of them cannot be merged."""

    @functools.wraps(merge_adapter)
    def merge(self, adapter_names=None, safe_merge=False):
        before = {layer: list(layer.merged_adapters) for layer in _adopt_layers(self.model)}
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


def _merge_before_unloading(unload_and_optionally_merge):
    """PEFT's removal of its layers, which begins once all that is to be merged into quantized layers is merged."""

    @functools.wraps(unload_and_optionally_merge)
    def unload(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        layers = _adopt_layers(self.model) if merge else []
        if layers:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        with warnings.catch_warnings():
            if layers:
                warnings.filterwarnings(
                    "ignore", "Already following adapters were merged|All adapters are already merged"
                )
            return unload_and_optionally_merge(self, merge, progressbar, safe_merge, adapter_names)

    return unload


def _weight_of_base(weight: property) -> property:
    """PEFT's `weight` of its layers, which would be the `qweight` of a base layer that has one."""

    def read(self) -> Tensor:
        base = self.get_base_layer()
        return base.weight if isinstance(base, Storage) else weight.fget(self)

    return property(read)


def _train_float_copies(update):
    """`ModulesToSaveWrapper.update`, for quantized modules: what is trained and saved is a copy in float."""

    @functools.wraps(update)
    def update_with_floats(self, adapter_name, tied_module=None, **kwargs):
        original = self.original_module
        if tied_module is not None or not any(map(is_frozen, original.modules())):
            return update(self, adapter_name, tied_module=tied_module, **kwargs)
        self.original_module = _float_copy(original)
        try:
            return update(self, adapter_name, tied_module=tied_module, **kwargs)
        finally:
            self.original_module = original.requires_grad_(False)

    return update_with_floats


def _float_copy(module: nn.Module) -> nn.Module:
    """A copy of the module with float layers in place of frozen ones."""
    if not is_frozen(module):
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
    if getattr(module, "bias", None) is not None:
        layer.bias = nn.Parameter(module.bias.detach().clone())
    return layer


def _check_adapter(set_state_dict):
    """PEFT's `set_peft_model_state_dict`, which refuses an adapter of NaN or Inf for a quantized model."""

    @functools.wraps(set_state_dict)
    def check(model, peft_model_state_dict, *args, **kwargs):
        if any(map(is_frozen, model.modules())):
            for name, tensor in peft_model_state_dict.items():
                if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                    raise ValueError(f"adapter tensor {name} must be finite, got NaN or Inf; nothing was loaded")
        return set_state_dict(model, peft_model_state_dict, *args, **kwargs)

    return check


def _name_quantized_embeddings(setup_prompt_encoder):
    """PEFT's search of the embedding by the name and the length of its weight, with a name for quantized ones."""

    @functools.wraps(setup_prompt_encoder)
    def setup(self, adapter_name):
        backbones = [module for _, module in self.base_model.named_children()]
        for backbone in backbones:
            backbone.named_parameters = functools.partial(_named_weights, backbone)
        try:
            return setup_prompt_encoder(self, adapter_name)
        finally:
            for backbone in backbones:
                del backbone.named_parameters

    return setup


def _named_weights(model: nn.Module, *args, **kwargs):
    """`named_parameters`, where the integers of a quantized embedding are called `weight`."""
    embeddings = {f"{name}.qweight" for name, m in model.named_modules() if is_frozen(m) and adapter_of(m).lookup}
    for name, parameter in type(model).named_parameters(model, *args, **kwargs):
        yield name.removesuffix("qweight") + "weight" if name in embeddings else name, parameter


def _adopt(model: nn.Module, report: QuantizationReport) -> None:
    """After `quantize_`: PEFT layers that were there before get the merge of `Requantizing`."""
    _adopt_layers(model)


lora_model.dispatch_default = _dispatch_first(lora_model.dispatch_default)
BaseTuner.inject_adapter = _inject_first(BaseTuner.inject_adapter)
BaseTuner.merge_adapter = _merge_all_or_nothing(BaseTuner.merge_adapter)
BaseTuner._unload_and_optionally_merge = _merge_before_unloading(BaseTuner._unload_and_optionally_merge)
BaseTunerLayer.weight = _weight_of_base(BaseTunerLayer.weight)
ModulesToSaveWrapper.update = _train_float_copies(ModulesToSaveWrapper.update)
PeftModel._setup_prompt_encoder = _name_quantized_embeddings(PeftModel._setup_prompt_encoder)
_checked = _check_adapter(save_and_load.set_peft_model_state_dict)
for _name in ("peft.utils.save_and_load", "peft.utils", "peft.peft_model", "peft.functional", "peft"):
    if hasattr(sys.modules.get(_name), "set_peft_model_state_dict"):
        sys.modules[_name].set_peft_model_state_dict = _checked
AFTER_QUANTIZE.append(_adopt)
