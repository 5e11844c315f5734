"""Our own folder: what `save_pretrained` of a quantized model writes (docs/formats.md)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from .checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat
from .losses import Losses
from .safetensors_files import SafetensorsFiles

STORED = ("qweight", "scales", "zeros", "x_scale", "input_order")


class QKernelsFolder(FolderFormat):
    """The canonical storage under the names of the modules."""

    name = "qkernels"
    title = "qkernels"
    holds_activations = True
    quant_methods = ("qkernels",)
    variants = (Variant("every scheme", "all", "exact", "exact"),)

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        layers = {}
        entries = config.get("layers", {})
        if not isinstance(entries, dict) or not all(map(_names_a_scheme, entries.values())):
            raise ValueError("layers of the quantization_config must be an object that names the scheme of each layer")
        for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            module = name.removesuffix(".weight")  # an expert's tensors have the name of its float weight
            layers[module] = _layer(tensors, name, module, _scheme_of(module, config))
        trained = [name for name, entry in entries.items() if isinstance(entry, dict) and entry.get("mode") == "qat"]
        if trained:
            raise ValueError(
                f"{trained[0]} is in mode 'qat', with a float weight: call freeze_(model) and save it again"
            )
        return layers

    def open(self, path: Path, losses: Losses) -> Checkpoint:
        found = super().open(path, losses)
        marker = {name for name, tensor in found.floats.items() if tensor.shape == (0,) and name.endswith(".weight")}
        floats = {_float_name(name): tensor for name, tensor in found.floats.items() if name not in marker}
        return replace(found, floats=floats)

    def encode(self, layer: CheckpointLayer, values: LayerWeight, losses: Losses) -> dict[str, Tensor]:
        stored = {**values.weight._asdict(), "x_scale": values.x_scale, "input_order": values.input_order}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def written_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        names = {name: layer.scheme.name for name, layer in checkpoint.layers.items()}
        scheme = Counter(names.values()).most_common(1)[0][0]
        options = {"mode": "frozen", "grad_dtype": "float", "weight_scale": "absmax"}
        ordered = {name for name, layer in checkpoint.layers.items() if layer.has_input_order}
        entries = {
            n: {"scheme": own, **options, "input_order": True} if n in ordered else own for n, own in names.items()
        }
        # The layers are named by their tensors, whose names a model may change when it is loaded.
        return {"quant_method": "qkernels", "scheme": scheme, **options, "names": "tensors", "layers": entries}


def _float_name(name: str) -> str:
    """The name in a float folder of a tensor: an expert's, beside quantized ones, is saved with two suffixes."""
    return name.removesuffix(".weight") if ".experts." in name and name.endswith(".weight.weight") else name


def _scheme_of(module: str, config: dict[str, Any]) -> QuantScheme:
    """The scheme of a layer.

    A folder names layers as the modules of the model are called, and its tensors otherwise for some models; experts are
    fused in memory. So a layer without an entry has the scheme that all layers with its place have.

    Raises:
        ValueError: if the folder does not say it.
    """
    entries = config.get("layers", {})
    entry = entries.get(module)
    if entry is None:
        place = _place(module)
        schemes = {scheme_name(own) for name, own in entries.items() if _place(name) == place}
        entry = schemes.pop() if len(schemes) == 1 else None
    if entry is None:
        raise ValueError(f"the quantization_config must say the scheme of {module}, which has a qweight")
    return QuantScheme.parse(scheme_name(entry))


def _place(module: str) -> tuple[list[str], str]:
    """The numbers of the blocks that a layer is in, and the last part of its name; of an expert, "experts"."""
    block, experts, _ = module.partition(".experts.")
    return re.findall(r"\d+", block), "experts" if experts else module.rpartition(".")[2]


def scheme_name(entry: str | dict[str, Any]) -> str:
    """The scheme in an entry of `layers`."""
    return entry["scheme"] if isinstance(entry, dict) else entry


def _names_a_scheme(entry: object) -> bool:
    return isinstance(entry.get("scheme") if isinstance(entry, dict) else entry, str)


def _layer(tensors: SafetensorsFiles, name: str, module: str, scheme: QuantScheme) -> CheckpointLayer:
    own = {stored: f"{name}.{stored}" for stored in STORED if f"{name}.{stored}" in tensors}
    shape = tensors[own["qweight"]].shape
    if len(shape) != 2:
        raise ValueError(f"{name}.qweight must be a matrix, got shape {list(shape)}: fused experts are not converted")
    out_features, packed = shape
    in_features = packed * scheme.weight_format.per_byte

    def read() -> LayerWeight:
        values = {stored: tensors.tensor(tensor) for stored, tensor in own.items()}
        if scheme.weight_bits == 4 and not (values["qweight"][:, -1] >> 4).any():
            raise ValueError(f"{module} may have {in_features} input features or one less: the folder does not say")
        weight = QuantizedWeight(values["qweight"], values["scales"], values.get("zeros"))
        return LayerWeight(weight, values.get("x_scale"), values.get("input_order"))

    has_order = "input_order" in own
    return CheckpointLayer(module, in_features, out_features, scheme, "", tuple(own.values()), read, has_order)
