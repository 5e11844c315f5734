"""huggingface_hub: a `PyTorchModelHubMixin` model refuses to be saved quantized.

Its `from_pretrained` builds the float model and ignores the keys that do not fit, so that quantized layers would come
back with random weights.
"""

from __future__ import annotations

import functools
from typing import Any

from huggingface_hub.hub_mixin import PyTorchModelHubMixin

from .folders import quantized_layers

_original = PyTorchModelHubMixin._save_pretrained


@functools.wraps(_original)
def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    layers = quantized_layers(self)
    if layers:
        raise ValueError(
            f"{next(iter(layers))} and {len(layers) - 1} more layers are quantized, and PyTorchModelHubMixin cannot "
            "load them again: save the float model (qkernels.dequantize_), or torch.save(model.state_dict(), path), "
            "and load that into a model after the same quantize_ call"
        )
    return _original(self, *args, **kwargs)


PyTorchModelHubMixin._save_pretrained = _save_pretrained
