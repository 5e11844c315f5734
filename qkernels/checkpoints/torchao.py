"""Safetensors that torchao wrote: parameters of its tensor classes, flattened, with their classes in the header.

A parameter `a.weight` is `a._weight_qdata`, `a._weight_scale` and so on; the metadata of the file hold a JSON object
for each parameter, with its class and attributes
(https://github.com/pytorch/ao/tree/main/torchao/prototype/safetensors). Pickles of torchao are not read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.weight_format import INT4
from .checkpoint import CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat
from .grouped_codes import GroupedCodes, minima_of
from .losses import Losses
from .safetensors_files import SafetensorsFiles

_NAMES = "tensor_names"
_PLAIN = "Tensor"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# By class: the dtypes of its qdata.
_KINDS = {
    "Int8Tensor": (torch.int8,),
    "IntxUnpackedToInt8Tensor": (torch.int8,),
    "Int4Tensor": (torch.int8, torch.uint8),
}
_HINTS = {
    "Int4TilePackedTo4dTensor": "its layout is that of one GPU kernel; quantize with IntxWeightOnlyConfig, say",
    "Int4PlainInt32Tensor": "its layout is that of one device; quantize with IntxWeightOnlyConfig, say",
}


class TorchAO(FolderFormat):
    """Folders of transformers, or single files, with integer weights of torchao."""

    name = "torchao"
    title = "torchao"
    quant_methods = ("torchao",)
    writes = False
    variants = (
        Variant("Int8Tensor, Intx of 5 to 8 bits, symmetric", "w8a16, w8a8, w8a8s, -gN", "exact", "no"),
        Variant("IntxUnpackedToInt8Tensor of 1 to 4 bits", "w4a16, w4a8, -gN, -asym", "exact", "no"),
        Variant("Int4Tensor, symmetric", "w4a16-gN", "exact", "no"),
        Variant("Int4Tensor, asymmetric", "w4a16-gN-min", "exact", "no", "its zero point is a float that is added"),
        Variant(
            "zero points of 8 bits", "w8a16-min, w8a8-min, -gN", "with a report", "no", "minima are rounded to float32"
        ),
    )

    def detects(self, path: Path) -> bool:
        if super().detects(path):
            return True
        if path.is_dir() or path.suffix != ".safetensors":
            return False
        return any(entry["_type"] != _PLAIN for entry in _entries(SafetensorsFiles(path)).values())

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        found, otherwise = {}, []
        for parameter, entry in _entries(tensors).items():
            if entry["_type"] == _PLAIN:
                continue
            stored = _stored(tensors, parameter, entry)
            if stored.codes.problem is not None:
                losses.need_requantization(parameter, stored.codes.problem)
            if stored.activations is not None:
                otherwise.append(f"{stored.module}: {stored.activations}")
            scheme, read = stored.scheme, partial(_read, tensors, stored, losses)
            found[stored.module] = CheckpointLayer(
                stored.module,
                stored.in_features,
                stored.out_features,
                scheme,
                f"torchao {entry['_type']}",
                tuple(stored.parts.values()),
                read,
            )
        if otherwise:
            warnings.warn(
                f"torchao quantizes activations otherwise than these layers, whose integers are symmetric, of 8 bits, "
                f"with a scale for each token, in {len(otherwise)} layers; {otherwise[0]}",
                stacklevel=3,
            )
        consumed = {name for layer in found.values() for name in layer.tensors}
        for name in tensors:
            if name.rpartition(".")[2].startswith("_weight_") and name not in consumed:
                raise ValueError(f"{name} is part of a quantized weight, of which the file's metadata say nothing")
        return found


def _entries(tensors: SafetensorsFiles) -> dict[str, dict[str, Any]]:
    """What the metadata say of each parameter: `_type`, and `_data` with its attributes.

    Raises:
        ValueError: naming the parameter, if that is no JSON object of this kind.
    """
    if _NAMES not in tensors.metadata:
        return {}
    entries = {}
    for parameter, text in tensors.metadata.items():
        if parameter in (_NAMES, "format"):
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("_type"), str):
            raise ValueError(f"the metadata of {parameter} must be a JSON object with a _type, got {text[:80]!r}")
        if entry["_type"] != _PLAIN and not isinstance(entry.get("_data"), dict):
            raise ValueError(f"the metadata of {parameter} must have a JSON object in _data, got {text[:80]!r}")
        entries[parameter] = entry
    return entries


class _Stored(NamedTuple):
    """A parameter as its header and its zero points describe it.

    Attributes:
        parts: names of its tensors in the file, such as "qdata".
        codes: how its integers, made unsigned, are grouped.
        scheme: of the layer.
        rows: that share a scale.
        activations: how they are quantized, if that is otherwise than under `scheme`; else None.
    """

    module: str
    kind: str
    in_features: int
    out_features: int
    parts: dict[str, str]
    codes: GroupedCodes
    scheme: QuantScheme
    rows: int
    activations: str | None


def _stored(tensors: SafetensorsFiles, parameter: str, entry: dict[str, Any]) -> _Stored:
    """
    Raises:
        ValueError: naming the parameter or tensor, for what is broken or not read.
    """
    kind, data = entry["_type"], entry["_data"]
    module, _, last = parameter.rpartition(".")
    if kind not in _KINDS:
        hint = _HINTS.get(kind, f"read are {', '.join(_KINDS)}")
        raise ValueError(f"{parameter} is a {kind} of torchao, which is not read: {hint}")
    if last != "weight":
        raise ValueError(f"{parameter} must be the weight of a module; a fused one is not read")
    parts = {
        part: f"{module}._{last}_{part}"
        for part in ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
        if f"{module}._{last}_{part}" in tensors
    }
    if "act_pre_scale" in parts:
        raise ValueError(f"{parameter} multiplies its input by act_pre_scale, which no layer here does")
    for part in ("qdata", "scale", *(() if kind == "Int8Tensor" else ("zero_point",))):
        if part not in parts:
            raise ValueError(f"{module}._{last}_{part} is missing for a {kind}")
    info = tensors[parts["qdata"]]
    if info.dtype not in _KINDS[kind] or len(info.shape) != 2:
        raise ValueError(f"{parts['qdata']} must be a matrix of {_KINDS[kind][0]}, got {info.dtype} {list(info.shape)}")
    out_features, in_features = info.shape[0], info.shape[1] * (2 if kind == "Int4Tensor" else 1)
    rows, group = _block(parameter, data.get("block_size"), out_features, in_features)
    blocks = (out_features // rows, in_features // group)
    shape = blocks[::-1] if kind == "Int4Tensor" else blocks
    for part, dtypes in (("scale", _FLOATS), ("zero_point", (torch.int8, *_FLOATS))):
        stored = tensors.get(parts.get(part, ""))
        if stored is not None and (stored.shape != shape or stored.dtype not in dtypes):
            raise ValueError(f"{parts[part]} must be {list(shape)} for blocks of {rows} x {group}, got {stored}")
    bits = _bits(parameter, kind, data)
    points = tensors.tensor(parts["zero_point"]) if "zero_point" in parts else torch.zeros(1)
    symmetric = not bool(points.any())
    has_min = not symmetric and (kind == "Int4Tensor" or bits == 8 or bool((points != points.round()).any()))
    codes = GroupedCodes(bits, None if group == in_features else group, symmetric or has_min)
    if has_min and codes.problem is not None:
        raise ValueError(f"{parameter} has zero points that no scheme has for these groups: {codes.problem}")
    weight = replace(codes.scheme, zeros="min") if has_min else codes.scheme
    scheme, activations = _activations(tensors, parameter, data, parts, weight)
    return _Stored(module, kind, in_features, out_features, parts, codes, scheme, rows, activations)


def _block(parameter: str, block: Any, out_features: int, in_features: int) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"block_size of {parameter} must be two positive numbers, got {block!r}")
    rows, group = block
    if out_features % rows or in_features % group:
        raise ValueError(f"block_size of {parameter} must divide [{out_features}, {in_features}], got {block}")
    return rows, group


def _word(entry: Any) -> Any:
    """What a dtype or enumeration of the metadata is called."""
    return entry.get("_data") if isinstance(entry, dict) else entry


def _bits(parameter: str, kind: str, data: dict[str, Any]) -> int:
    """Bits of a stored code: 4, or 8."""
    if kind != "IntxUnpackedToInt8Tensor":
        return 8 if kind == "Int8Tensor" else 4
    target = _word(data.get("target_dtype"))
    if target not in [f"int{bits}" for bits in range(1, 9)]:
        raise ValueError(f"target_dtype of {parameter} must be int1 to int8, got {target!r}")
    return 4 if int(target[-1]) <= 4 else 8


def _activations(
    tensors: SafetensorsFiles, parameter: str, data: dict[str, Any], parts: dict[str, str], weight: QuantScheme
) -> tuple[QuantScheme, str | None]:
    """The scheme with what the file says of the activations, and what it says that no scheme has."""
    if (kind := data.get("activation_quantization")) is not None:
        return replace(weight, act_bits=8), f"it says {kind}"
    if (float_type := _word(data.get("activation_dtype"))) not in (None, "bfloat16"):
        return weight, f"it says {float_type}"
    if (options := data.get("act_quant_kwargs")) is None:
        return weight, None
    options = options.get("_data") if isinstance(options, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"act_quant_kwargs of {parameter} must be a JSON object, got {data['act_quant_kwargs']!r}")
    said = []
    if _word(options.get("mapping_type")) != "SYMMETRIC":
        said.append("zero points")
    if options.get("reduce_range") or data.get("reduce_range"):
        said.append("7 bits")
    if "act_quant_scale" in parts:
        info = tensors[parts["act_quant_scale"]]
        if info.dtype not in _FLOATS or any(size != 1 for size in info.shape):
            raise ValueError(f"{parts['act_quant_scale']} must be one float, got {info.dtype} {list(info.shape)}")
        if "act_quant_zero_point" in parts and bool(tensors.tensor(parts["act_quant_zero_point"]).any()):
            raise ValueError(f"{parts['act_quant_zero_point']} must be 0: static activations have no zero points")
        return replace(weight, act_bits=8, static_activations=True), "; ".join(said) or None
    granularity = options.get("granularity")
    if not isinstance(granularity, dict) or granularity.get("_type") != "PerRow":
        said.append("one scale for all tokens")
    return replace(weight, act_bits=8), f"it says {', '.join(said)}" if said else None


def _read(tensors: SafetensorsFiles, stored: _Stored, losses: Losses) -> LayerWeight:
    """The values of a layer."""

    def groups(part: str) -> Tensor:  # [N, groups]
        values = tensors.tensor(stored.parts[part])
        return (values.t() if stored.kind == "Int4Tensor" else values).repeat_interleave(stored.rows, dim=0)

    parts, codes, half = stored.parts, stored.codes, 1 << stored.codes.bits - 1
    integers, scales, zeros = tensors.tensor(parts["qdata"]), groups("scale").to(torch.float32), None
    if not codes.symmetric:
        exact = groups("zero_point").to(torch.float32) + half
        zeros = exact.clamp(0, 2 * half - 1).to(torch.uint8)
        if not torch.equal(zeros.to(torch.float32), exact):
            raise ValueError(f"{parts['zero_point']} must be integers of {codes.bits} bits")
    if stored.kind == "Int4Tensor":  # pairs of two's complements
        unsigned = INT4.unpack(integers.view(torch.uint8) ^ 0x88, stored.in_features)
    else:
        low, high = int(integers.min()), int(integers.max())
        if not -half <= low <= high < half:
            raise ValueError(f"{parts['qdata']} must be integers of {codes.bits} bits, got {low} to {high}")
        unsigned = (integers.to(torch.int16) + half).to(torch.uint8)
    weight = codes.store(f"{stored.module}.weight", unsigned, scales, zeros, losses)
    if stored.scheme.has_min:
        weight = weight._replace(
            zeros=codes.split(_minima(stored, scales, groups("zero_point"), losses), stored.in_features)
        )
    x_scale = None
    if stored.scheme.static_activations:
        x_scale = tensors.tensor(parts["act_quant_scale"]).to(torch.float32).reshape(1)
    return LayerWeight(weight, x_scale)


def _minima(stored: _Stored, scales: Tensor, points: Tensor, losses: Losses) -> Tensor:
    """float32 [N, groups], added to the product of scale and stored code: the integer, of 4 bits plus 8."""
    offset, steps = INT4.offset if stored.codes.bits == 4 else 0, scales.to(torch.float64)
    if stored.kind == "Int4Tensor":  # its zero point is added already
        exact = points.to(torch.float64) - offset * steps
    else:
        exact = (points.to(torch.float64) + offset) * -steps
    return minima_of(stored.module, exact, losses)
