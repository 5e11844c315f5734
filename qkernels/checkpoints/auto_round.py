"""AutoRound (https://arxiv.org/abs/2309.05516): its own config over the layouts of other formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from . import awq, gptq
from .checkpoint import CheckpointLayer
from .checkpoint_format import Variant
from .folder import FolderFormat, quantized_names
from .losses import Losses
from .safetensors_files import SafetensorsFiles

# The layout by `packing_format`, and the version of GPTQ.
_LAYOUTS = {
    "auto": ("gptq", 1),
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptq": ("gptq", 1),
    "auto_round": ("gptq", 2),
    "auto_round:gptqmodel": ("gptq", 2),
    "auto_round:auto_awq": ("awq", 0),
    "auto_round:awq": ("awq", 0),
}
_SCHEME_KEYS = ("bits", "group_size", "sym")


class AutoRoundFolder(FolderFormat):
    """A folder that AutoRound wrote in its own format; what it writes for other libraries has their names."""

    name = "auto-round"
    title = "AutoRound"
    quant_methods = ("auto-round", "intel/auto-round")
    writes = False
    variants = (
        Variant("packed as GPTQ", "as GPTQ", "exact", "no", "write GPTQ, AWQ or compressed-tensors"),
        Variant("packed as AWQ", "as AWQ", "exact", "no"),
        Variant("packed as compressed-tensors", "as compressed-tensors", "exact", "no", "its config says so itself"),
        Variant("5, 6 and 7 bits; floats of 4 and 8 bits; rotated weights", "none", "no", "no"),
    )

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        packing = config.get("packing_format", "auto")
        if packing not in _LAYOUTS:
            raise ValueError(f"packing_format must be one of {', '.join(_LAYOUTS)} to be read, got {packing!r}")
        for key in ("rotation_config", "spinquant_config", "hadamard_config"):
            if config.get(key):
                raise ValueError(f"{key} says that weights were rotated, and no layer here rotates its input")
        layout, version = _LAYOUTS[packing]
        settings = partial(_settings, config, tensors)
        if layout == "awq":
            return awq.read_layers(tensors, lambda name: _awq_settings(settings(name)), losses)
        found = [
            gptq.GPTQTensors.of(tensors, name, gptq.GPTQSettings.of(name, settings(name)))
            for name in quantized_names(tensors)
        ]
        return gptq.read_layers(found, version, False, losses)


def _awq_settings(settings: Mapping[str, Any]) -> tuple[object, object, bool]:
    return settings["bits"], settings["group_size"], settings["sym"] is not True


def _settings(config: Mapping[str, Any], tensors: SafetensorsFiles, name: str) -> dict[str, Any]:
    """Bits, group size and symmetry of a layer: from `extra_config` by its name, or by a regular expression in it.

    What is the name of another layer there is no expression.

    Raises:
        ValueError: for what is no integer, activations of few bits, or a layer that is said to be in float.
    """
    extra = config.get("extra_config") or {}
    own = extra.get(name)
    if own is None:
        names = {key for key in extra if f"{key}.qweight" in tensors or f"{key}.weight" in tensors}
        try:
            own = next((value for key, value in extra.items() if key not in names and re.search(key, name)), {})
        except re.error as error:
            raise ValueError(f"extra_config must have names or regular expressions: {error}") from error
    settings = {**config, **own}
    data_type, act_bits = settings.get("data_type", "int"), settings.get("act_bits")
    if data_type not in ("int", "int_sym", "int_asym"):
        raise ValueError(f"data_type of {name} must be int to be read, got {data_type!r}")
    if act_bits is not None and not (isinstance(act_bits, int) and act_bits >= 16):
        raise ValueError(f"act_bits of {name} must be 16 in this layout, got {act_bits!r}")
    return {key: settings.get(key) for key in _SCHEME_KEYS}
