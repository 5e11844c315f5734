"""diffusers: loading a LoRA into a Flux transformer looks up the weights of its layers in the state dict.

There a quantized layer has integers and scales; the function sees the layer's `weight` beside them.
"""

from __future__ import annotations

import functools
from typing import Any

from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

from ..nn.linear import QuantLinear

_original = FluxLoraLoaderMixin._maybe_expand_lora_state_dict.__func__


@functools.wraps(_original)
def _maybe_expand_lora_state_dict(cls: Any, transformer: Any, lora_state_dict: dict[str, Any]) -> Any:
    layers = [(name, module) for name, module in transformer.named_modules() if isinstance(module, QuantLinear)]
    weights = {f"{name}.weight": module.weight for name, module in layers}
    own = transformer.state_dict
    transformer.state_dict = lambda *args, **kwargs: {**own(*args, **kwargs), **weights}
    try:
        return _original(cls, transformer, lora_state_dict)
    finally:
        del transformer.state_dict


FluxLoraLoaderMixin._maybe_expand_lora_state_dict = classmethod(_maybe_expand_lora_state_dict)
