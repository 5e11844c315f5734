"""PEFT: LoRA over `QuantLinear`, with a merge that re-quantizes and says what that cost.

Nothing here is needed to train: PEFT's own LoRA layer accepts a `QuantLinear`, which is an `nn.Linear`. But its `merge`
would write to a float weight that does not exist, and its forward converts activations to the adapters' dtype and back.
So PEFT's last dispatcher, the one for `nn.Linear`, is preceded by one that puts `QuantLoraLinear` on a `QuantLinear`.
"""

from __future__ import annotations

import functools
import warnings

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .. import ops
from ..autograd import LowRank
from ..convert import AFTER_QUANTIZE, QuantizationReport
from ..nn import QuantLinear, relative_error
from ..quantize import QuantizedWeight, quantize_weight

# Initializations of an adapter that neither read nor change the base weight.
_FLOAT_FREE_INITS = (True, False, "gaussian", "eva")
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16)


class QuantLoraLinear(LoraLinear):
    """LoRA over a `QuantLinear`.

    Adapters are multiplied in the dtype of the layer's output, bfloat16 or float32, whatever dtype they are kept in:
    casting the adapters is cheap, casting the activations is not (PEFT makes float32 copies of input and output for
    float32 adapters on a bfloat16 model). Their gradients have the dtype of the adapters.

    `merge` adds the adapters to the dequantized weight and quantizes the sum; the relative error of that rounding is
    kept as `merge_error` on the `QuantLinear` (see `merge_errors`). The quantized weight from before is kept until
    `unmerge`, which restores it bit for bit.
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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the quantized weight.

        Args:
            safe_merge: accepted for compatibility: nothing is changed before the merged weight is known to be finite.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            ValueError: if the merged weight or bias holds NaN or Inf; the layer is left as it was.
            RuntimeError: if an adapter has a bias and the layer has none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        original = getattr(self, "_original", None) or _tensors(base)
        layer_name = self.kwargs.get("target_name", "layer")
        # All merged adapters at once onto the original weight: it is rounded once, not once per adapter.
        weight, bias = self._merged(base, original, [*self.merged_adapters, *names])
        if not weight.isfinite().all() or (bias is not None and not bias.isfinite().all()):
            raise ValueError(f"{layer_name}: merging {names} gives NaN or Inf; nothing was changed")
        self._original = original
        base.set_weight(quantize_weight(weight, base.scheme))
        if bias is not None:
            base.bias.data = bias.to(base.bias.dtype)
        base.merge_error = relative_error(weight, base)
        self.merged_adapters.extend(names)
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
        base = self.get_base_layer()
        base.set_weight(QuantizedWeight(*(self._original.get(name) for name in QuantizedWeight._fields)))
        if base.bias is not None:
            base.bias.data = self._original["bias"]
        del self._original, base.merge_error
        self.merged_adapters.clear()

    def _merged(self, base: QuantLinear, original: dict[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor | None]:
        """float32 weight [N, K] and bias [N] of the original layer with the adapters `names` added."""
        quantized = (original[name] for name in ("qweight", "scales"))
        weight = ops.dequantize_weight(*quantized, original.get("zeros"), base.in_features, base.scheme.name)
        bias = original["bias"].to(torch.float32) if "bias" in original else None
        for name in names:
            weight += self.get_delta_weight(name).to(torch.float32)
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(f"adapter {name!r} has a bias (lora_bias=True), but the layer has none")
                bias = bias + self.lora_B[name].bias.detach().to(torch.float32) * self.scaling[name]
        return weight, bias


def _tensors(base: QuantLinear) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in base.named_parameters(recurse=False)}


def merge_errors(model: nn.Module) -> dict[str, float]:
    """By layer name: the relative error (Frobenius norm) of re-quantizing, for each layer an adapter is merged into."""
    errors = ((name, getattr(module, "merge_error", None)) for name, module in model.named_modules())
    return {name.removesuffix(".base_layer"): error for name, error in errors if error is not None}


def _dispatch_first(dispatch_default):
    """PEFT's `dispatch_default`, preceded by the choice of `QuantLoraLinear` for a `QuantLinear`."""

    @functools.wraps(dispatch_default)
    def dispatch(target, adapter_name, config, parameter_name=None, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        frozen = isinstance(base, QuantLinear) and base.mode == "frozen"  # the other modes have a weight to merge into
        if parameter_name is not None or not frozen:
            return dispatch_default(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)
        config.fan_in_fan_out = False  # a quantized Conv1D is stored as [N, K] too
        return QuantLoraLinear(target, adapter_name, config=config, **kwargs)

    return dispatch


def _adopt(model: nn.Module, report: QuantizationReport) -> None:
    """After `quantize_`: LoRA layers that were there before get the merge of `QuantLoraLinear`."""
    for module in model.modules():
        if type(module) is LoraLinear and isinstance(module.get_base_layer(), QuantLinear):
            module.__class__ = QuantLoraLinear
            module.fan_in_fan_out = False


lora_model.dispatch_default = _dispatch_first(lora_model.dispatch_default)
AFTER_QUANTIZE.append(_adopt)
