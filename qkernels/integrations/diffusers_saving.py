"""diffusers: `save_pretrained` of any model first records which of its layers are quantized now."""

from __future__ import annotations

import functools
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

_original = ModelMixin.save_pretrained


@functools.wraps(_original)
def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    from .diffusers import record_layers
    from .folders import warn_of_masks

    warn_of_masks(self)
    record_layers(self)
    return _original(self, *args, **kwargs)


ModelMixin.save_pretrained = save_pretrained
