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


def _taken_over(config: Any, wanted: Any, gguf_file: str | None) -> Any:
    """The `QKernelsConfig` by which the checkpoint of a config is read as one of another library; None: it is not."""
    from .transformers_config import QKernelsConfig

    names = [(part, name) for part in _parts(config) for name in _SAID_IN]
    said: list[dict[str, Any]] = [own for own in (getattr(*pair, None) for pair in names) if isinstance(own, dict)]
    ours = next((own for own in said if own.get("quant_method") == METHOD), None)
    if wanted is not None and not isinstance(wanted, QKernelsConfig):
        return None
    if ours is None:
        return wanted if gguf_file is not None or said else None
    if wanted is not None and (wanted.activations or wanted.skip or wanted.include is not None or not wanted.as_stored):
        return wanted
    if ours.get("names") == "tensors":  # a folder that was converted; a model of ours saves the names of its modules
        return QKernelsConfig(mode=ours.get("mode", "frozen"), grad_dtype=ours.get("grad_dtype", "float"))
    return None


def get_hf_quantizer(config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
    from .transformers_checkpoints import CheckpointQuantizer

    wanted = _taken_over(config, quantization_config, kwargs.get("gguf_file"))
    if wanted is None:
        return _get_hf_quantizer(config, quantization_config, device_map, *args, **kwargs)
    for part in _parts(config):
        for name in _SAID_IN:
            if isinstance(getattr(part, name, None), dict):
                delattr(part, name)
    quantizer = CheckpointQuantizer(wanted)
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
