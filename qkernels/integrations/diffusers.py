"""diffusers: models that `quantize_` quantized save themselves and load again, and quantize as they are loaded.

`from_pretrained(path, quantization_config=QKernelsConfig("w8a8"))` loads the float model and calls `quantize_`;
`DiffusersConfig` is for programs without transformers. A folder saved from a quantized model lists its layers in
`config.json`; these are swapped before the tensors are read.
"""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..convert.dequantize import dequantize_
from ..convert.model import quantize_
from ..convert.selection import find_layers
from .config_options import ConfigOptions
from .folders import METHOD, current_names, describe, empty_like, finish_loading, layer_entry, unclaimed


class DiffusersConfig(ConfigOptions, QuantizationConfigMixin):
    """How to quantize a diffusers model: `from_pretrained(path, quantization_config=DiffusersConfig("w8a8"))`.

    Args:
        scheme, skip, mode, grad_dtype, weight_scale, embeddings, include: as in `quantize_`.
        modules_to_not_convert: another name of `skip`.
        layers: the quantized layers of a saved model; filled in when it is saved.

    Raises:
        ValueError: for an unknown scheme, mode, grad_dtype or weight_scale.
        TypeError: if `skip` is a single string, or for an unknown argument.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: what `repr` shows."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**{key: value for key, value in current_names(config_dict).items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config


class QKernelsDiffusersQuantizer(DiffusersQuantizer):
    """Quantizes a float model once it is loaded, or loads a saved quantized model."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map must not offload layers to disk; load the model, then accelerate.disk_offload it"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        self._keys = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, keep_in_fp32_modules: Any = (), **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        by_name = {name: layer for layer in find_layers(model, embeddings=True) for name in layer.names}
        for name, entry in config.layers.items():
            if name not in by_name:
                raise ValueError(f"config.json names the quantized layer {name}, which {type(model).__name__} lacks")
            by_name[name].replace(empty_like(by_name[name].module, *layer_entry(entry, config.layer_options)))
        lost = unclaimed(self._keys - set(model.state_dict()), model, set(config.layers), "")
        if lost:
            raise ValueError(
                f"the folder holds quantized weights for layers that its config.json does not name: {lost[:5]}"
            )
        keep_in_fp32_modules += ["scales", "x_scale"]  # diffusers looks at the last part of a name, too

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            model.quantization_report = quantize_(
                model,
                config.scheme,
                **config.layer_options,
                skip=config.skip,
                include=config.include,
                embeddings=config.embeddings,
            )
            return
        for name, entry in config.layers.items():
            module = model.get_submodule(name)
            for key, parameter in [*module.named_parameters(), *module.named_buffers()]:
                if parameter.is_meta:
                    raise ValueError(f"{name}.{key} is missing in the checkpoint or does not fit {module}")
            problems = module.storage_problems() if module.mode == "frozen" else {}
            for key, problem in problems.items():
                raise ValueError(f"{name}.{key} of the folder {problem}")
            finish_loading(module, layer_entry(entry, config.layer_options)[1]["mode"])

    def _dequantize(self, model: Any) -> Any:
        return dequantize_(model)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def record_layers(model: Any) -> None:
    """Let the config of `model` name the layers that are quantized now."""
    found = describe(model)
    existing = model.config.get("quantization_config")
    method = existing.get("quant_method") if isinstance(existing, dict) else getattr(existing, "quant_method", METHOD)
    if method != METHOD:
        if found:
            raise ValueError(
                f"the model is quantized by {method} and by qkernels; it cannot be saved so that it loads again"
            )
        return
    if found:
        model.register_to_config(quantization_config=DiffusersConfig(**found).to_dict())
    elif existing is not None:
        model._internal_dict = type(model._internal_dict)(
            {key: value for key, value in model._internal_dict.items() if key != "quantization_config"}
        )


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DiffusersConfig
AUTO_QUANTIZER_MAPPING[METHOD] = QKernelsDiffusersQuantizer
