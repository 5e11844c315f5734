"""transformers: `from_pretrained` with a `QKernelsConfig` of a checkpoint that another library has quantized.

transformers would take the quantizer that the checkpoint names, and refuse another configuration; here ours takes over,
and hands the tensors of the checkpoint on as those of a folder of ours.
"""

from __future__ import annotations

from typing import Any

from transformers import modeling_utils
from transformers.modeling_utils import PreTrainedModel

from .folders import METHOD

_get_hf_quantizer = modeling_utils.get_hf_quantizer
_load_pretrained_model = PreTrainedModel._load_pretrained_model
# Where a config says how its checkpoint is quantized; "quantization" is MLX's name.
_SAID_IN = ("quantization_config", "quantization")


def _parts(config: Any) -> list[Any]:
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def _takes_over(config: Any, wanted: Any, gguf_file: str | None) -> bool:
    """Whether the checkpoint that a config belongs to is read by our reader of its format, for a `QKernelsConfig`."""
    said = [getattr(part, name, None) for part in _parts(config) for name in _SAID_IN]
    methods = [own.get("quant_method") for own in said if isinstance(own, dict)]
    if METHOD in methods:
        return wanted.activations is not None
    return gguf_file is not None or bool(methods)


def get_hf_quantizer(config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
    from .transformers_checkpoints import CheckpointQuantizer
    from .transformers_config import QKernelsConfig

    ours = isinstance(quantization_config, QKernelsConfig)
    if not ours or not _takes_over(config, quantization_config, kwargs.get("gguf_file")):
        return _get_hf_quantizer(config, quantization_config, device_map, *args, **kwargs)
    for part in _parts(config):
        for name in _SAID_IN:
            if isinstance(getattr(part, name, None), dict):
                delattr(part, name)
    quantizer = CheckpointQuantizer(quantization_config)
    quantizer.validate_environment(device_map=device_map)
    config.quantization_config = quantizer.quantization_config
    return quantizer, config, device_map


def load_pretrained_model(
    model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
) -> Any:
    from .transformers_checkpoints import CheckpointQuantizer

    quantizer = load_config.hf_quantizer
    if isinstance(quantizer, CheckpointQuantizer) and state_dict is None:
        state_dict = quantizer.state_dict(model, load_config.device_map)
    return _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


modeling_utils.get_hf_quantizer = get_hf_quantizer
PreTrainedModel._load_pretrained_model = staticmethod(load_pretrained_model)
