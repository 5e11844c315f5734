"""PEFT: LoRA on the matrices of fused experts, which `LoraConfig(target_parameters=[...])` names.

PEFT finds a parameter such as `mlp.experts.gate_up_proj`, wraps the module that holds it, and adds the product of the
adapter to the weight. Of quantized experts it finds the same names, and `QuantParamWrapper` adds what the adapter gives
to the output instead: the integers are not dequantized. Names, shapes and files of the adapters are PEFT's.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...formats.storage import QuantizedWeight
from ...kernels import ops
from ...kernels.quantizers import quantize_weight
from ...nn.adapters import SplitLayer
from ...nn.grouped_linear import GroupedLinear, GroupedLowRank, QuantGroupedLinear, stack_experts

# Initializations of an adapter that neither read nor change the base weight.
_FLOAT_FREE_INITS = (True, False, "gaussian")


class QuantParamWrapper(ParamWrapper):
    """LoRA on the matrices of quantized experts: what PEFT's `ParamWrapper` is for a parameter.

    `merge` adds the adapter to the dequantized matrices of one expert after the other and quantizes the result, whose
    relative error is kept as `merge_error` (see `merge_errors`). `unmerge` restores the weight from before, bit for
    bit.
    """

    merged_adapters: list[str]

    @property
    def grouped(self) -> QuantGroupedLinear | GroupedLinear:
        """The layer that holds the matrices."""
        return grouped_layers(self.get_base_layer())[self.parameter_name]

    def get_param(self) -> Tensor:
        """A tensor without memory, with the shape, dtype and device of the parameter of the float model."""
        grouped = self.grouped
        if isinstance(grouped, GroupedLinear):
            return grouped.weight
        experts, out_features, in_features = grouped.weight_shape
        transposed = getattr(grouped, "transposed", False)
        shape = (experts, in_features, out_features) if transposed else (experts, out_features, in_features)
        stored = next(iter(grouped.parameters()))
        return torch.empty((), dtype=grouped.compute_dtype, device=stored.device).expand(shape)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if config.init_lora_weights not in _FLOAT_FREE_INITS:
            raise ValueError(
                f"init_lora_weights must be one of {_FLOAT_FREE_INITS} for quantized experts, "
                f"got {config.init_lora_weights!r}, which reads or changes the float weight"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _low_rank(self, adapter_name: str) -> GroupedLowRank:
        """The adapter as [E, r, K] and [E, N, r]; PEFT's factors are those of the parameter as the model holds it."""
        left, right, scaling = self.get_delta_factors(adapter_name)
        if getattr(self.grouped, "transposed", False):
            left, right = right.mT, left.mT
        return GroupedLowRank(right, left, scaling)

    def _delta(self, adapter_name: str) -> Tensor:
        """What an adapter adds to the float weight that `grouped` holds."""
        delta = self.get_delta_weight(adapter_name)
        upright = isinstance(self.grouped, QuantGroupedLinear) and getattr(self.grouped, "transposed", False)
        return delta.mT if upright else delta

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        grouped = self.grouped
        before = grouped.low_rank
        grouped.low_rank = (*before, *(self._low_rank(name) for name in active_adapters if name in self.lora_A))
        try:
            yield
        finally:
            grouped.low_rank = before

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the matrices.

        Args:
            safe_merge: accepted for compatibility: nothing is changed before the merged weight is known to be finite.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            ValueError: if a merged matrix holds NaN or Inf, or the experts are trained as integers (mode "int8"); the
                layer is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        grouped = self.grouped
        if isinstance(grouped, QuantGroupedLinear) and grouped.mode == "int8":
            raise ValueError(f'{self.parameter_name}: adapters cannot be merged into experts of mode "int8"')
        if isinstance(grouped, GroupedLinear) or grouped.mode == "qat":
            for name in names:
                grouped.weight.add_(self._delta(name))
        else:
            original = getattr(self, "_original", None) or grouped.quantized_weight().map(Tensor.detach)
            adapters = [self._low_rank(name) for name in (*self.merged_adapters, *names)]
            merged, error = _merged(original, adapters, grouped)
            vars(grouped)["merge_error"] = error
            self._original = original
            grouped.set_weight(merged)
            warnings.warn(
                "merging into quantized experts rounds the merged weight; "
                "qkernels.integrations.peft.merge_errors(model) gives the relative error of each layer",
                stacklevel=2,
            )
        self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight from before the merge, bit for bit; float weights as PEFT does."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        grouped = self.grouped
        if isinstance(grouped, QuantGroupedLinear) and hasattr(self, "_original"):
            grouped.set_weight(self._original)
            del self._original, vars(grouped)["merge_error"]
        else:
            for name in self.merged_adapters:
                grouped.weight.sub_(self._delta(name))
        self.merged_adapters = []


# PEFT asks for the name of the class where it looks for wrappers of other parameters of the same module.
QuantParamWrapper.__name__ = ParamWrapper.__name__


def _merged(
    original: QuantizedWeight, adapters: list[GroupedLowRank], grouped: QuantGroupedLinear
) -> tuple[QuantizedWeight, float]:
    """The matrices with adapters added, quantized again, and the relative error of that.

    One expert at a time is in float.
    """
    stored, error, norm = [], 0.0, 0.0
    for expert in range(grouped.num_experts):
        own = original.map(itemgetter(expert))
        matrix = ops.dequantize_weight(*own, grouped.in_features, grouped.scheme)
        for down, up, scaling in adapters:
            matrix.addmm_(up[expert].float(), down[expert].float(), alpha=scaling)
        if not matrix.isfinite().all():
            raise ValueError(f"merging gives NaN or Inf in expert {expert}; nothing was changed")
        stored.append(quantize_weight(matrix, grouped.scheme))
        rounded = ops.dequantize_weight(*stored[-1], grouped.in_features, grouped.scheme)
        error += (rounded - matrix).square().sum(dtype=torch.float64).item()
        norm += matrix.square().sum(dtype=torch.float64).item()
    return stack_experts(stored), (error / norm) ** 0.5 if norm else error**0.5


def grouped_layers(module: nn.Module) -> dict[str, QuantGroupedLinear | GroupedLinear]:
    """The matrices of experts in `module`, by the names that their parameters have in the float model."""
    if isinstance(module, SplitLayer):
        return {name: child for name, child in module._modules.items() if isinstance(child, _GROUPED)}
    return {"weight": module} if isinstance(module, QuantGroupedLinear) else {}


_GROUPED = (QuantGroupedLinear, GroupedLinear)


def _wraps_experts(module: Any) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return bool(grouped_layers(base))


def _wrap_experts(dispatch_default: Any) -> Any:
    """PEFT's `dispatch_default`, with a `QuantParamWrapper` for the matrices of quantized experts."""

    @functools.wraps(dispatch_default)
    def dispatch(target: Any, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any) -> Any:
        if parameter_name is not None and _wraps_experts(target):
            return QuantParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
        return dispatch_default(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)

    return dispatch


def _name_experts(inject_parameters: Any) -> Any:
    """PEFT's search of parameters by name, which finds the matrices of quantized experts by the float model's names."""

    @functools.wraps(inject_parameters)
    def inject(self: Any, peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        renamed = [module for module in model.modules() if grouped_layers(module)]
        inner = {id(layer) for module in renamed for layer in grouped_layers(module).values() if layer is not module}
        renamed = [module for module in renamed if id(module) not in inner]
        for module in renamed:
            module.named_parameters = functools.partial(_float_names, module)
        try:
            return inject_parameters(self, peft_config, model, *args, **kwargs)
        finally:
            for module in renamed:
                del module.named_parameters

    return inject


def _float_names(
    module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters`, which without recursion are those that the float module had."""
    if recurse:
        yield from type(module).named_parameters(module, prefix, recurse, remove_duplicate)
        return
    for name, layer in grouped_layers(module).items():
        yield name, next(iter(layer.parameters()))


def _leave_out_experts(inject_adapter: Any) -> Any:
    """PEFT's search of modules by name, which passes over what is a parameter in the float model."""

    @functools.wraps(inject_adapter)
    def inject(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        below = {
            f"{name}.{own}"
            for name, module in model.named_modules()
            if isinstance(module, SplitLayer)
            for own in grouped_layers(module)
        }
        if not below:
            return inject_adapter(self, model, *args, **kwargs)
        exists = self._check_target_module_exists
        self._check_target_module_exists = lambda config, key: key not in below and exists(config, key)
        try:
            return inject_adapter(self, model, *args, **kwargs)
        finally:
            del self._check_target_module_exists

    return inject


def adopt_wrapper(module: ParamWrapper) -> bool:
    """Let a wrapper that was there before the experts were quantized be one for them; False: it holds none."""
    if not _wraps_experts(module):
        return False
    module.__class__ = QuantParamWrapper
    return True


def install() -> None:
    """Let `target_parameters` find quantized experts."""
    lora_model.dispatch_default = _wrap_experts(lora_model.dispatch_default)
    BaseTuner._inject_parameters = _name_experts(BaseTuner._inject_parameters)
    BaseTuner.inject_adapter = _leave_out_experts(BaseTuner.inject_adapter)
