"""transformers: `save_pretrained` of any model first records which of its layers are quantized now.

A model may have been edited since `quantize_`, or its layers converted one by one, so what it is can only be seen
when it is saved; and only the method of the class is called by everyone.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from . import transformers_loading, transformers_resizing  # noqa: F401  they replace other methods of the class
from .counting import count_weights

_original = PreTrainedModel.save_pretrained


@functools.wraps(_original)
def save_pretrained(
    self: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from .folders import marker, warn_of_masks
    from .transformers import QKernelsHfQuantizer, record_layers
    from .transformers_experts import split_x_scales

    warn_of_masks(self)
    named = record_layers(self)
    quantizer = getattr(self, "hf_quantizer", None)
    if not isinstance(quantizer, QKernelsHfQuantizer):
        quantizer = None
    if named and not getattr(self, "_hf_peft_config_loaded", False):
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {**split_x_scales(self, state_dict), **marker(self)}
    if quantizer is not None:  # which transformers asks for the state dict, and forgets the one it was given
        quantizer.state_dict_to_save = state_dict
    try:
        return _original(self, save_directory, is_main_process, state_dict, *args, **kwargs)
    finally:
        if quantizer is not None:
            quantizer.state_dict_to_save = None


PreTrainedModel.save_pretrained = save_pretrained
PreTrainedModel.num_parameters = count_weights(PreTrainedModel.num_parameters)
