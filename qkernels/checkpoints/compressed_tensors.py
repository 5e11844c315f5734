"""Folders of compressed-tensors, which llm-compressor writes and vLLM, SGLang and transformers read.

The layouts are those of https://github.com/vllm-project/compressed-tensors: `pack-quantized` (weights alone, 1 to 8
bits in words of 32), `int-quantized` and `naive-quantized` (int8 tensors), and `mixed-precision`, which has one of them
a group of layers.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from .bits import pack_codes
from .checkpoint import Checkpoint, CheckpointLayer, LayerWeight, shortened
from .checkpoint_format import Variant
from .compressed_tensors_weights import StoredLayer, WeightArguments, weight_values
from .folder import FolderFormat
from .losses import Losses
from .requantize import requantized
from .safetensors_files import SafetensorsFiles

if TYPE_CHECKING:
    from typing_extensions import Self

PACKED, PLAIN, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_READ = (PACKED, PLAIN, "naive-quantized", MIXED)
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_OF_A_LAYER = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
_OF_OUTPUTS = ("output_scale", "output_zero_point")
_OF_A_CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
_FLOATS_AGAIN = (
    "load it in transformers with CompressedTensorsConfig(dequantize=True), save it as floats, and quantize those"
)


class _Group(NamedTuple):
    """A config group: how some layers are quantized."""

    name: str
    targets: tuple[str, ...]
    weights: WeightArguments
    act_bits: int
    act_group_size: int | None
    static: bool
    lost: str  # what of the activations has no scheme; empty: nothing
    written: dict[str, Any]  # the group as it stands in the config, without its targets


class _Source(NamedTuple):
    """A layer as its folder has it, which is written to another as it is."""

    scheme: QuantScheme
    group: dict[str, Any]
    read: Callable[[], dict[str, Tensor]]


class CompressedTensors(FolderFormat):
    """Folders of transformers that compressed-tensors reads: integers of 1 to 8 bits."""

    name = "compressed-tensors"
    title = "compressed-tensors"
    holds_activations = True
    quant_methods = ("compressed-tensors",)
    targets = tuple(_DTYPES)
    variants = (
        Variant("pack-quantized, 4 bits", "w4a16-gN[-asym]", "exact", "exact"),
        Variant("pack-quantized, 8 bits, symmetric", "w8a16-gN", "exact", "exact"),
        Variant("pack-quantized, 1 to 3 bits", "w4a16-gN[-asym]", "exact", "exact", "written as 4 bits once changed"),
        Variant("pack-quantized, 5 to 7 bits", "w8a16-gN", "exact", "exact", "written as 8 bits once changed"),
        Variant("int-quantized, dynamic activations", "w8a8, w4a8-gN[-asym]", "exact", "exact"),
        Variant("int-quantized, static activations", "w8a8s", "exact", "exact", "symmetric activations"),
        Variant("8 bits, asymmetric", "w8a16-gN-min", "exact", "exact", "not written once changed"),
        Variant("bfloat16, float16 scales (`compressed-tensors:bf16`)", "all", "exact", "with a report"),
    )

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        _refuse_unknown(config)
        groups = _groups(config)
        found: dict[str, CheckpointLayer] = {}
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part in ("weight_packed", "weight_scale") and module not in found:
                found[module] = _layer(tensors, module, _group_of(module, groups, tensors), losses)
        consumed = {name for layer in found.values() for name in layer.tensors}
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part in (*_OF_A_LAYER, *_OF_OUTPUTS) and part != "weight" and name not in consumed:
                raise ValueError(f"{name} is of a quantized layer, but {module} has no weight_scale")
        for group in groups:
            for target in group.targets:
                if f"{target}.weight" in tensors and target not in found:
                    raise ValueError(f"{target} is a target of {group.name}, but has no weight_scale")
        return found

    def open(self, path: Path, losses: Losses) -> Checkpoint:
        found, config = super().open(path, losses), self.quantization_config(path)
        dropped = [name for name in found.floats if name.rpartition(".")[2] in _OF_A_CACHE]
        outputs = any(isinstance(g, dict) and g.get("output_activations") for g in config["config_groups"].values())
        if config.get("kv_cache_scheme") or dropped:
            warnings.warn("kv_cache_scheme is dropped: keys and values stay float", stacklevel=3)
        if outputs:
            warnings.warn("output_activations are dropped: the outputs of layers stay float", stacklevel=3)
        metadata = {} if dropped or outputs or config.get("kv_cache_scheme") else {"quantization_config": config}
        floats = {name: tensor for name, tensor in found.floats.items() if name not in dropped}
        return replace(found, floats=floats, metadata=metadata)

    def problem(self, layer: CheckpointLayer) -> str | None:
        if self._kept(layer):
            return None
        if _writable(layer) != layer.scheme:
            return f"of its schemes, {_writable(layer)} is the nearest; pass on_loss='requantize' for that"
        if layer.has_input_order:
            return "columns in another order are no longer read; pass on_loss='requantize' to order them"
        return None

    def _kept(self, layer: CheckpointLayer) -> bool:
        """Whether a layer is written as the folder has it that it was read from."""
        return self._dtype is None and isinstance(layer.source, _Source) and layer.source.scheme == layer.scheme

    def encode(self, layer: CheckpointLayer, values: LayerWeight, losses: Losses) -> dict[str, Tensor]:
        if self._kept(layer):
            assert isinstance(layer.source, _Source)
            return layer.source.read()
        scheme, weight, dtype = layer.scheme, values.weight, self._dtype or torch.float32
        stored = scheme.weight_format.unpack(weight.qweight, layer.in_features)
        encoded: dict[str, Tensor] = {}
        if scheme.int_activations:
            encoded["weight"] = stored.to(torch.int8) - scheme.weight_format.offset
        else:
            codes = stored if scheme.weight_bits == 4 else stored.view(torch.uint8) ^ 0x80
            encoded["weight_packed"] = pack_codes(codes, scheme.weight_bits)
            encoded["weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
        encoded["weight_scale"] = self._rounded(f"{layer.name}.scales", weight.scales, dtype, losses)
        if weight.zeros is not None:
            zeros = weight.zeros.to(torch.int8) - 8
            encoded["weight_zero_point"] = (
                zeros if scheme.int_activations else pack_codes(weight.zeros.t().contiguous(), 4).t().contiguous()
            )
        if values.x_scale is not None:
            encoded["input_scale"] = self._rounded(f"{layer.name}.x_scale", values.x_scale, dtype, losses)
        return encoded

    def _rounded(self, name: str, scales: Tensor, dtype: torch.dtype, losses: Losses) -> Tensor:
        rounded = scales.to(dtype)
        losses.changed(name, f"scales that {dtype} cannot hold", scales, rounded)
        return rounded

    def written_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        kept = checkpoint.metadata.get("quantization_config") if checkpoint.format == self.name else None
        if kept and all(self._kept(layer) for layer in checkpoint.layers.values()):
            return dict(kept)
        groups: dict[str, list[str]] = {}
        for name, layer in checkpoint.layers.items():
            source = layer.source if self._kept(layer) else None
            group = source.group if isinstance(source, _Source) else _written_group(layer.scheme)
            groups.setdefault(json.dumps(group), []).append(name)
        parsed = [(json.loads(group), targets) for group, targets in groups.items()]
        formats = {group["format"] for group, _ in parsed}
        plain = [
            name.removesuffix(".weight")
            for name, tensor in checkpoint.floats.items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        ]
        tied = [] if "lm_head" in checkpoint.layers or "lm_head" in plain else ["lm_head"]
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": {"targets": names, **group} for i, (group, names) in enumerate(parsed)},
            "ignore": plain + tied,
        }

    def prepared(self, checkpoint: Checkpoint, losses: Losses, target: str | None) -> tuple[Self, Checkpoint]:
        writer = type(self)()
        writer._dtype = _DTYPES[target] if target else None
        if losses.requantizes:
            schemes = {n: _writable(layer) for n, layer in checkpoint.layers.items() if writer.problem(layer)}
            checkpoint = requantized(checkpoint, schemes, losses, ordered=True)
        embeddings = [n for n, layer in checkpoint.layers.items() if _embeds(n) and not writer._kept(layer)]
        if embeddings:
            warnings.warn(
                f"{embeddings[0]} is a quantized embedding, which transformers and vLLM do not load from this format: "
                "leave embeddings in float, with embeddings=None",
                stacklevel=4,
            )
        return writer, checkpoint

    _dtype: torch.dtype | None = None  # of the scales; None: float32, or as the folder has them


def _refuse_unknown(config: dict[str, Any]) -> None:
    """Stop at what changes how every layer is read.

    Raises:
        ValueError: naming the setting.
    """
    sparsity = config.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if sparse != "dense":
        raise ValueError(
            f"{sparse} weights of compressed-tensors are not read: load and save them as floats with "
            "compressed-tensors 0.13 or older, the last that reads them, and quantize those"
        )
    if config.get("transform_config") and config["transform_config"].get("config_groups", True):
        raise ValueError(
            "transform_config rotates activations between layers, which no layer here does: quantize the model without"
        )
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise ValueError(
            f"quantization_status must be 'compressed', got {status!r}: the weights are floats; "
            "save the model with save_pretrained(..., save_compressed=True)"
        )
    if not isinstance(config.get("config_groups"), dict) or not config["config_groups"]:
        raise ValueError(f"config_groups must be groups of layers, got {config.get('config_groups')!r}")


def _groups(config: dict[str, Any]) -> list[_Group]:
    """The config groups.

    Raises:
        ValueError: naming the group, for one that has no scheme here.
    """
    groups = []
    for name, group in config["config_groups"].items():
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise ValueError(f"{name} of config_groups must be an object with targets, got {group!r}")
        kind = group.get("format") or config.get("format")
        if kind not in _READ:
            raise ValueError(f"{kind} of {name} is not read, integers of 1 to 8 bits are: {_FLOATS_AGAIN}")
        weights = group.get("weights")
        if weights is None:  # of a cache or of attention
            continue
        act_bits, act_group_size, static, lost = _activations(group.get("input_activations"))
        written = {key: value for key, value in group.items() if key not in ("targets", "output_activations")}
        written["format"] = kind
        arguments = WeightArguments.parse(name, weights)
        targets = tuple(str(target) for target in group["targets"])
        groups.append(_Group(name, targets, arguments, act_bits, act_group_size, static, lost, written))
    return groups


def _activations(found: object) -> tuple[int, int | None, bool, str]:
    """Bits, group and static of `input_activations`, and what of them has no scheme."""
    if found is None:
        return 16, None, False, ""
    if not isinstance(found, dict):
        raise ValueError(f"input_activations must be an object, got {found!r}")
    strategy, dynamic = found.get("strategy") or "tensor", found.get("dynamic", False)
    if found.get("type", "int") != "int" or found.get("num_bits", 8) != 8:
        return 16, None, False, f"activations of {found.get('num_bits', 8)} bits, type {found.get('type', 'int')}"
    if not found.get("symmetric", True):
        return 16, None, False, "asymmetric activations"
    if not dynamic and strategy == "tensor":
        return 8, None, True, ""
    if dynamic is True and strategy in ("token", "tensor"):  # one scale for all tokens is the coarser
        return 8, None, False, ""
    size = found.get("group_size")
    if dynamic is True and strategy == "group" and f"w8a8-ag{size}" in QuantScheme.names():
        return 8, size, False, ""
    kind = "dynamic" if dynamic else "static"
    return 16, None, False, f"{kind} activations a {strategy}{f' of {size}' if size else ''}"


def _group_of(module: str, groups: list[_Group], tensors: SafetensorsFiles) -> _Group:
    """The group whose target is the module: its name before a pattern before a class, as the library has it.

    Raises:
        ValueError: if there is none, or if it depends on the class of the module, which the folder does not say.
    """
    patterns = [(target, group) for group in groups for target in group.targets]
    for target, group in patterns:
        if target == module:
            return group
    for target, group in sorted(patterns, key=lambda pair: pair[0]):
        if target.startswith("re:") and _matches(target.removeprefix("re:"), module):
            return group
    classes = [(target, group) for target, group in patterns if not target.startswith("re:") and "." not in target]
    wanted = [
        (t, g) for t, g in classes if ("Embedding" in t) == _embeds(module) and f"{t}.weight_scale" not in tensors
    ]
    if not wanted:
        raise ValueError(f"{module} has a weight_scale, but no config group has it as a target")
    if any(group.written != wanted[0][1].written for _, group in wanted):
        names = ", ".join(target for target, _ in wanted)
        raise ValueError(f"{module} may be of any of the classes {names}, which are quantized in different ways")
    return wanted[0][1]


def _embeds(module: str) -> bool:
    """Whether a module is an embedding, by its name: a folder does not say it."""
    return any(word in module.rpartition(".")[2] for word in ("embed", "wte", "wpe"))


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern of the config matches the beginning of a name.

    Raises:
        ValueError: for no pattern, and for one that may take for ever: a group that is repeated.
    """
    if re.search(r"\)[*+{]", pattern) or len(pattern) > 1000:
        raise ValueError(f"targets must be patterns without repeated groups, got {shortened(pattern)!r}")
    try:
        return re.match(pattern, module) is not None
    except (re.error, OverflowError) as error:
        raise ValueError(f"targets must be patterns, got {shortened(pattern)!r}: {error}") from error


def _layer(tensors: SafetensorsFiles, module: str, group: _Group, losses: Losses) -> CheckpointLayer:
    own = {part: f"{module}.{part}" for part in _OF_A_LAYER if f"{module}.{part}" in tensors}
    stored = StoredLayer.open(tensors, module, own, group.weights)
    act_bits, act_group_size, static, lost = group.act_bits, group.act_group_size, group.static, group.lost
    if static and "input_scale" not in own:
        raise ValueError(f"{module}.input_scale is missing for static activations")
    if static and "input_zero_point" in own and bool(tensors.tensor(own["input_zero_point"]).any()):
        act_bits, static, lost = 16, False, "static activations with a zero point"
    if lost:
        losses.need_report(module, f"{lost} have no scheme here, they would stay float")
    problem = stored.codes.problem
    if problem is not None:
        losses.need_requantization(f"{module}.weight", problem)
    scheme = replace(stored.codes.scheme, act_bits=act_bits, act_group_size=act_group_size, static_activations=static)
    order = None if stored.input_order is None else stored.input_order.to(torch.int32)

    def read() -> LayerWeight:
        values = weight_values(stored, tensors, losses)
        x_scale = tensors.tensor(own["input_scale"]).to(torch.float32).reshape(-1) if static else None
        return LayerWeight(values, x_scale, order)

    raw = {part: name for part, name in own.items() if part != "input_zero_point" or static}
    source = _Source(scheme, group.written, partial(_read_all, tensors, raw))
    outputs = [f"{module}.{part}" for part in _OF_OUTPUTS if f"{module}.{part}" in tensors]
    return CheckpointLayer(
        module,
        stored.in_features,
        stored.out_features,
        scheme,
        f"compressed-tensors {group.written['format']}, {group.weights}" + (f"; {lost} stay float" if lost else ""),
        (*own.values(), *outputs),
        read,
        order is not None,
        None if lost or problem else source,
    )


def _read_all(tensors: SafetensorsFiles, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {part: tensors.tensor(name) for part, name in names.items()}


def _writable(layer: CheckpointLayer) -> QuantScheme:
    """The scheme of a layer, or the nearest that the format has: its groups divide K."""
    scheme, size = layer.scheme, layer.scheme.group_size
    if size is not None and layer.in_features % size:
        smaller = [s for s in scheme.weight_format.group_sizes if s < size and layer.in_features % s == 0]
        scheme = replace(scheme, group_size=max(smaller, default=None))
    if scheme.has_min:
        scheme = replace(scheme, zeros="zero_point" if scheme.weight_format.has_zeros else None)
    return scheme


def _written_group(scheme: QuantScheme) -> dict[str, Any]:
    """The config group of a scheme, without targets; its format is the one that the library takes for it."""
    weights: dict[str, Any] = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    inputs: dict[str, Any] | None = None
    if scheme.int_activations:
        strategy = "tensor" if scheme.static_activations else "group" if scheme.act_group_size else "token"
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy}
        inputs |= {"group_size": scheme.act_group_size, "dynamic": not scheme.static_activations}
    return {
        "format": PLAIN if scheme.int_activations else PACKED,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
