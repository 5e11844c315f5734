"""LoRA over quantized layers: its forward, its initializations and variants, and LoftQ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora import loraga, variants
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import loftq_utils
from torch import Tensor, nn

from ...autograd.frozen import LowRank
from ...distributed.dtensors import is_dtensor
from ...nn.adapters import adapter_of, float_twin, is_frozen
from ...nn.attention import QuantMultiheadAttention
from ...nn.linear import QuantLinear
from ...nn.storage import Storage
from .base_weight import float_base, replace_everywhere, stores_integers
from .merging import OWN_CLASSES, Requantizing

# Initializations by name that neither read nor change the values of the base weight.
_FREE_OF_WEIGHT = ("gaussian", "eva", "orthogonal")
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16)


class QuantLoraLinear(Requantizing, LoraLinear):
    """LoRA over a `QuantLinear`.

    Adapters are multiplied in the dtype of the layer's output, bfloat16 or float32, whatever dtype they are kept in:
    casting the adapters is cheap, casting the activations is not (PEFT makes float32 copies of input and output for
    float32 adapters on a bfloat16 model). Their gradients have the dtype of the adapters.

    An initialization that takes a part out of the base weight (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA) does so in a float
    copy, which is quantized again (see `initialization_errors`). `merge` is that of `Requantizing`.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: for LoftQ, which compares the base with the float weight, and for QALoRA.
        """
        init = config.init_lora_weights
        if getattr(config, "use_qalora", False):
            raise ValueError("use_qalora works on GPTQ layers only, and PEFT ignores it elsewhere: leave it out")
        if isinstance(init, str) and init == "loftq":
            raise ValueError(
                "init_lora_weights='loftq' needs the float weight, which a quantized layer does not have: create the "
                "adapter with init_lora_weights=True, and then call peft.replace_lora_weights_loftq(model, folder) "
                "with the folder of the float model"
            )
        kwargs = {**kwargs, "r": r, "lora_alpha": lora_alpha, "config": config}
        if not isinstance(init, str) or init.lower() in _FREE_OF_WEIGHT:
            super().update_layer(adapter_name, **kwargs)
            return
        with float_base(self):
            super().update_layer(adapter_name, **kwargs)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # and to its dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
            # A wrapper, such as FSDP's, gathers the weight in its forward; tensor parallelism multiplies a part of it.
            plain = all(
                type(module) is nn.Linear and module.bias is None and not is_dtensor(module.weight)
                for module in modules
            )
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


def _dispatch_first(dispatch_default: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `dispatch_default`, preceded by the choice of `QuantLoraLinear` for a layer that stores integers."""

    @functools.wraps(dispatch_default)
    def dispatch(
        target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
    ) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantMultiheadAttention):
            raise ValueError(
                "target_modules must name the projections of quantized attention, which are layers of their own: "
                "in_proj (or q_proj, k_proj, v_proj) and out_proj, got the whole nn.MultiheadAttention"
            )
        # The mode "qat" has a float weight to merge into.
        if parameter_name is not None or not isinstance(base, QuantLinear) or not stores_integers(base):
            return dispatch_default(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)
        config.fan_in_fan_out = False  # a quantized Conv1D is stored as [N, K] too
        return QuantLoraLinear(target, adapter_name, config=config, **kwargs)

    return dispatch


def _make_float_convolutions(update_layer: Callable[..., None]) -> Callable[..., None]:
    """LoRA over a convolution, whose adapters have the class of the base: over a quantized one, of the float layer."""

    @functools.wraps(update_layer)
    def update_with_floats(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.get_base_layer(), Storage):
            update_layer(self, adapter_name, *args, **kwargs)
            return
        with float_base(self):
            self._kernel_dim = self.get_base_layer().weight.dim()
            update_layer(self, adapter_name, *args, **kwargs)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    return update_with_floats


def _truncate_float_copy(truncate: Callable[..., Any]) -> Callable[..., Any]:
    """KaSA's truncation of the base weight, which may come as late as the first forward."""

    @functools.wraps(truncate)
    def truncate_base_weight(module: Any, r: int) -> Any:
        if not stores_integers(module.get_base_layer()):
            return truncate(module, r)
        with float_base(module):
            return truncate(module, r)

    return truncate_base_weight


def _estimate_on_float_layers(estimate_gradients: Callable[..., None]) -> Callable[..., None]:
    """LoRA-GA's pass for gradients of the weights, with float layers in the place of frozen ones meanwhile."""

    @functools.wraps(estimate_gradients)
    def estimate(model: nn.Module, lora_config: Any, train_step: Callable[[], None]) -> None:
        targets: Iterable[tuple[str, Any]] = loraga.get_target_modules(model, lora_config)
        frozen = {name: layer for name, layer in targets if is_frozen(layer)}
        twins = {}
        with torch.enable_grad():
            for name, layer in frozen.items():
                values = layer.dequantize().to(layer.compute_dtype)
                twins[name] = float_twin(layer, nn.Parameter(values), plain=True)
                model.set_submodule(name, twins[name])
        try:
            estimate_gradients(model, lora_config, train_step)
        finally:
            for name, layer in frozen.items():
                model.set_submodule(name, layer)
        for name, layer in frozen.items():
            layer._peft_loraga_grad = twins[name]._peft_loraga_grad

    return estimate


def _loftq_first(replace: Callable[..., None]) -> Callable[..., None]:
    """PEFT's `replace_lora_weights_loftq`, which fits adapters over layers of qkernels as well."""

    @functools.wraps(replace)
    @torch.no_grad()
    def replace_lora_weights_loftq(
        peft_model: Any,
        model_path: str | None = None,
        adapter_name: str = "default",
        callback: Callable[[nn.Module, str], bool] | None = None,
    ) -> None:
        layers = {name: layer for name, layer in peft_model.named_modules() if isinstance(layer, QuantLoraLinear)}
        if not layers:
            replace(peft_model, model_path, adapter_name, callback)
            return
        loader = loftq_utils._SafetensorLoader(peft_model, model_path)
        for name, layer in layers.items():
            if adapter_name not in layer.lora_A:
                continue
            name = name.removeprefix("base_model.model.")
            matrices = [layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight]
            before = [matrix.data for matrix in matrices]
            _fit_to_rounding(layer, adapter_name, loader.get_tensor(f"{name}.weight"))
            if callback is not None and not callback(peft_model, name):
                for matrix, values in zip(matrices, before, strict=True):
                    matrix.data = values

    return replace_lora_weights_loftq


def _fit_to_rounding(layer: QuantLoraLinear, adapter_name: str, weight: Tensor) -> None:
    """Make the adapter the best one of its rank for what quantizing the float weight took away."""
    down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    base = layer.base_layer
    if adapter_of(float_twin(base, nn.Parameter(weight, requires_grad=False))).transposed:
        weight = weight.t()
    lost = weight.to(device=down.device, dtype=torch.float32) - base.dequantize()
    left, values, right = torch.linalg.svd(lost, full_matrices=False)
    rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    root = (values[:rank] / scaling).sqrt()
    up.data = (left[:, :rank] * root).to(up.dtype).contiguous()
    down.data = (root[:, None] * right[:rank]).to(down.dtype).contiguous()


def install() -> None:
    """Give PEFT's LoRA its class for quantized layers."""
    OWN_CLASSES[LoraLinear] = QuantLoraLinear
    lora_model.dispatch_default = _dispatch_first(lora_model.dispatch_default)
    _ConvNd.update_layer = _make_float_convolutions(_ConvNd.update_layer)
    kasa = variants.KasaLinearVariant
    kasa._truncate_base_weight = staticmethod(_truncate_float_copy(kasa._truncate_base_weight))
    loraga.estimate_gradients = _estimate_on_float_layers(loraga.estimate_gradients)
    replace_everywhere("replace_lora_weights_loftq", _loftq_first(loftq_utils.replace_lora_weights_loftq))
