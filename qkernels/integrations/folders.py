"""What a saved folder says of its quantized layers, for every library whose models save themselves.

`config.json` names the quantized layers of the model as it is when it is saved, whatever was done to it since
`quantize_`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapters import adapter_of
from ..nn.masks import is_masked
from ..nn.matrix_layer import MatrixLayer
from ..nn.storage import Storage


class _Method(str):
    """The name of the method; diffusers expects it to be a member of an enumeration."""

    @property
    def value(self) -> str:
        return str(self)


METHOD = _Method("qkernels")
LAYER_OPTIONS = ("mode", "grad_dtype", "weight_scale")
_DEFAULTS = {"mode": "frozen", "grad_dtype": "float", "weight_scale": "absmax"}


def quantized_layers(model: nn.Module) -> dict[str, Storage]:
    """The quantized layers below `model` by name, without PEFT's wrappers; each once."""
    return {
        name.replace(".base_layer", ""): module for name, module in model.named_modules() if isinstance(module, Storage)
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """The arguments of `QKernelsConfig` that describe the quantized layers of `model`; empty if it has none.

    `layers` says the scheme of each by name. A layer whose mode, grad_dtype or weight_scale is not that of most, or
    whose columns have an order of their own, is a mapping.
    """
    layers = quantized_layers(model)
    if not layers:
        return {}
    options = {name: layer_options_of(module) for name, module in layers.items() if isinstance(module, MatrixLayer)}
    common = _DEFAULTS
    if options:
        ((most, _),) = Counter(tuple(own.values()) for own in options.values()).most_common(1)
        common = dict(zip(LAYER_OPTIONS, most, strict=True))
    entries: dict[str, str | dict[str, Any]] = {}
    for name, module in layers.items():
        own = options.get(name, common)
        ordered = {"input_order": True} if "input_order" in module._buffers else {}
        plain = own == common and not ordered
        entries[name] = module.scheme.name if plain else {"scheme": module.scheme.name, **own, **ordered}
    scheme = Counter(module.scheme.name for module in layers.values()).most_common(1)[0][0]
    return {"scheme": scheme, **common, "layers": entries}


def warn_of_masks(model: nn.Module) -> None:
    """Warn that a folder, which is loaded into a new model, does not bring the masks of pruned layers with it."""
    masked = [
        name
        for name, layer in quantized_layers(model).items()
        if "weight_mask" in layer._buffers or (layer.mode == "qat" and is_masked(layer))
    ]
    if masked:
        warnings.warn(
            "a folder that from_pretrained loads does not restore the masks of pruned layers: "
            f"{masked[0]}{f' and {len(masked) - 1} more layers' if len(masked) > 1 else ''}. Load its tensors with "
            "load_state_dict into a model that is pruned and quantized in the same way, or call "
            "qkernels.freeze_(model) before save_pretrained, which keeps the zeros and needs no mask",
            stacklevel=3,
        )


def layer_options_of(module: MatrixLayer) -> dict[str, str]:
    """Its mode, grad_dtype and weight_scale."""
    return {key: getattr(module, key) for key in LAYER_OPTIONS}


def layer_entry(entry: str | dict[str, Any], common: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Scheme and options of a layer from its entry in `layers`; one that is a scheme alone has the `common` options.

    `input_order` is among the options, True, where the columns have an order of their own.
    """
    if isinstance(entry, str):
        return entry, common
    entry = current_names(entry)
    ordered = {"input_order": True} if entry.get("input_order") else {}
    return entry["scheme"], {**{key: entry[key] for key in LAYER_OPTIONS}, **ordered}


def current_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder says, by the names of today: `grad_dtype` was called `grad`."""
    return {"grad_dtype" if key == "grad" else key: value for key, value in saved.items()}


def empty_like(
    module: nn.Module, scheme: str, layer_options: dict[str, Any], dtype: torch.dtype | None = None
) -> Storage:
    """The quantized twin of a float layer, on the meta device, as it is stored: mode "int8" as "frozen"."""
    if layer_options["mode"] == "int8":
        layer_options = {**layer_options, "mode": "frozen"}
    options = {key: value for key, value in layer_options.items() if key != "input_order"}
    layer = adapter_of(module).empty(module, scheme, dtype=dtype, **options)
    if "input_order" in layer_options:
        layer._order_input(torch.empty(layer.in_features, dtype=torch.int32, device="meta"))
    return layer


def finish_loading(module: Storage, mode: str) -> None:
    """Derive what a folder does not hold, once the tensors of a layer that `empty_like` made are there.

    Args:
        mode: the layer's, which is stored as "frozen" if it is "int8".
    """
    if isinstance(module, MatrixLayer):
        module.update_column_scales()
        if mode == "int8":
            module.thaw_int8_()


def marker(model: nn.Module) -> dict[str, Tensor]:
    """A tensor for the file of `model` that lets a program without qkernels fail, where it would go on with noise.

    transformers initializes what a file lacks at random and only logs it, but refuses a weight of a wrong shape. So the
    file holds an empty `weight` for one quantized layer; where qkernels loads, it is left out.
    """
    layers = {name: module for name, module in quantized_layers(model).items() if module.mode != "qat"}
    # transformers splits what belongs to experts, or merges it.
    names = [name for name, module in layers.items() if not module.leading] or list(layers)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # below it, it is there for a model without a head too
    name = next((name for name in names if name.startswith(prefix)), names[0] if names else None)
    return {} if name is None else {f"{name}.weight": torch.empty(0, dtype=torch.int8)}


def unclaimed(keys: set[str], model: nn.Module, known: set[str], prefix: str) -> list[str]:
    """The quantized weights among the unexpected keys of a folder that `model` should have had a place for.

    Args:
        keys: unexpected keys.
        known: names of the layers of the folder; one that `model` lacks belongs to another head.
        prefix: of the base model, which a folder may have or lack.
    """
    heads = {f"{prefix}{name}" for name in known} | {name.removeprefix(prefix) for name in known} | known
    modules = dict(model.named_modules())
    lost = []
    for key in sorted(keys):
        name, _, tensor = key.rpartition(".")
        if tensor == "qweight" and (name not in heads or name in modules):
            lost.append(key)
    return lost
