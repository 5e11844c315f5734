"""GPTQ, as GPTQModel, AutoGPTQ, optimum and AutoRound write it (https://github.com/ModelCloud/GPTQModel).

A layer [N, K] has `qweight`, int32 `[ceil(K * bits / 32), N]`, the codes of each output along K; `qzeros`, int32
`[groups, ceil(N * bits / 32)]`, the zero points along N; `scales` `[groups, N]`; `g_idx`, int32 `[K]`, the group of
each input feature; and a bias. `w = (code - zero) * scale`. Version 1 of the format holds zero - 1, version 2 zero.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bits import pack_codes, unpack_codes
from .checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat, quantized_names, unquantized_beside
from .grouped_codes import GroupedCodes, half_scales, input_order, stored_codes
from .losses import Losses
from .safetensors_files import SafetensorsFiles

if TYPE_CHECKING:
    from typing_extensions import Self

_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
# What GPTQModel subtracts from the words of `qzeros` for version 1, in turn. Those of 3 bits are not 1 in each field.
_SUBTRACTED = {2: (0x55555555,), 3: (0x24924924, 0x92492492, 0x49249249), 4: (0x11111111,), 8: (0x01010101,)}


@dataclass(frozen=True)
class GPTQSettings:
    """What a config says of a layer.

    Attributes:
        bits: of a code.
        group_size: -1: one scale a row.
        symmetric: whether all zero points are 2^(bits - 1); None: it does not say.
    """

    bits: int
    group_size: int
    symmetric: bool | None

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any]) -> GPTQSettings:
        """Those in a config, checked.

        Raises:
            ValueError: naming the layer and the key.
        """
        bits, group_size, symmetric = (config.get(key) for key in ("bits", "group_size", "sym"))
        if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
            raise ValueError(f"bits of {name} must be 2, 3, 4 or 8, got {bits!r}")
        if type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise ValueError(f"group_size of {name} must be -1 or a number from 1 on, got {group_size!r}")
        if symmetric not in (None, True, False):
            raise ValueError(f"sym of {name} must be true or false, got {symmetric!r}")
        return cls(int(bits), group_size, symmetric)


@dataclass(frozen=True)
class GPTQTensors:
    """The tensors of a layer in a file, whose shapes fit one another.

    Attributes:
        files: they are read from.
        name: of the layer.
        settings: what the config says of it.
        in_features, out_features: K, N.
        order: int64 [K], the input features in the order of their groups; None: they are.
    """

    files: SafetensorsFiles
    name: str
    settings: GPTQSettings
    in_features: int
    out_features: int
    order: Tensor | None

    @classmethod
    def of(cls, files: SafetensorsFiles, name: str, settings: GPTQSettings) -> GPTQTensors:
        """Those of a layer, checked.

        Raises:
            ValueError: naming the tensor that is missing or does not fit.
        """
        bits = settings.bits
        for part in _TENSORS[:3]:
            if f"{name}.{part}" not in files:
                raise ValueError(f"{name}.{part} is missing")
            shape = files[f"{name}.{part}"].shape
            if len(shape) != 2:
                raise ValueError(f"{name}.{part} must be a matrix, got shape {list(shape)}")
        words, out_features = files[f"{name}.qweight"].shape
        in_features = words * 32 // bits
        indices = None
        if f"{name}.g_idx" in files:
            info = files[f"{name}.g_idx"]
            if len(info.shape) != 1 or info.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name}.g_idx must be a vector of int32, got {info.dtype} of shape {list(info.shape)}"
                )
            in_features = info.shape[0]
            indices = files.tensor(f"{name}.g_idx").to(torch.int64)
        group_size = in_features if settings.group_size == -1 else settings.group_size
        groups = -(-in_features // group_size)
        expected = {
            "qweight": ((-(-in_features * bits // 32), out_features), (torch.int32,)),
            "qzeros": ((groups, -(-out_features * bits // 32)), (torch.int32,)),
            "scales": ((groups, out_features), _SCALES),
        }
        for part, (shape, dtypes) in expected.items():
            info = files[f"{name}.{part}"]
            if info.shape != shape or info.dtype not in dtypes:
                raise ValueError(
                    f"{name}.{part} must be {dtypes[0]} of shape {list(shape)} for {bits} bits and groups of "
                    f"{settings.group_size}, got {info.dtype} of shape {list(info.shape)}"
                )
        order = None if indices is None else input_order(f"{name}.g_idx", indices, group_size)
        return cls(files, name, settings, in_features, out_features, order)

    def tensor(self, part: str) -> Tensor:
        """Read the tensor of the layer of this name."""
        return self.files.tensor(f"{self.name}.{part}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return tuple(f"{self.name}.{part}" for part in _TENSORS if f"{self.name}.{part}" in self.files)

    def zero_fields(self) -> Tensor:
        """What `qzeros` holds: uint8 [N, groups]."""
        return unpack_codes(self.tensor("qzeros"), self.settings.bits, self.out_features).t()

    def zeros_before_words(self) -> Tensor:
        """The zero points of which GPTQModel made version 1, a word at a time: uint8 [N, groups].

        There a zero point of 0 borrows from the next field, or damages it where it is not looked at so.
        """
        words, bits = self.tensor("qzeros").to(torch.int64), self.settings.bits
        subtracted = torch.tensor(_SUBTRACTED[bits]).repeat(words.shape[1])[: words.shape[1]]
        return unpack_codes((words + subtracted).to(torch.int32), bits, self.out_features).t()

    def kind(self, by_words: bool) -> int:
        """The version in which all zero points are those of a symmetric layer; 0: in none."""
        half, fields = 1 << self.settings.bits - 1, self.zero_fields()
        if bool((fields == half).all()):
            return 2
        if bool((fields == half - 1).all()) or (by_words and bool((self.zeros_before_words() == half).all())):
            return 1
        return 0

    def zeros(self, version: int, by_words: bool) -> Tensor:
        """The zero points: uint8 [N, groups].

        Args:
            version: of the format.
            by_words: version 1 was written by GPTQModel.

        Raises:
            ValueError: if they cannot be told from the fields.
        """
        if version == 2:
            return self.zero_fields()
        if by_words:
            return self.zeros_before_words()
        fields, greatest = self.zero_fields(), (1 << self.settings.bits) - 1
        ambiguous = int((fields == greatest).sum())
        if ambiguous:
            raise ValueError(
                f"{self.name}.qzeros holds {greatest} in {ambiguous} of {fields.numel()} fields, which the writers of "
                f"version 1 mean differently (a zero point of {greatest + 1}, or of 0 with damage to its neighbors): "
                "let the library that wrote the model save it as gptq_v2"
            )
        return fields + 1

    def layer(self, version: int, by_words: bool, details: str, losses: Losses) -> CheckpointLayer:
        """The layer of a checkpoint."""
        symmetric = self.kind(by_words) == version
        if not symmetric:
            self.zeros(version, by_words)  # refused now, rather than amid a conversion
        group_size = None if self.settings.group_size == -1 else self.settings.group_size
        codes = GroupedCodes(self.settings.bits, group_size, symmetric)
        if codes.problem is not None:
            losses.need_requantization(self.name, codes.problem)
        details = f"{details}, {codes.bits} bits" + ("" if self.order is None else ", activation order")
        read = partial(self._read, codes, version, by_words, losses)
        shape, ordered = (self.in_features, self.out_features), self.order is not None
        return CheckpointLayer(self.name, *shape, codes.scheme, details, self.names, read, ordered)

    def _read(self, codes: GroupedCodes, version: int, by_words: bool, losses: Losses) -> LayerWeight:
        scales = self.tensor("scales").to(torch.float32).t().contiguous()
        zeros = None if codes.symmetric else self.zeros(version, by_words)
        stream = self.tensor("qweight").t().contiguous()
        if codes.bits == 4 and self.order is None and codes.problem is None and self.in_features % 2 == 0:
            nibbles = stream.view(torch.uint8)[:, : self.in_features // 2]  # as ours
            return LayerWeight(codes.store_nibbles(nibbles, scales, zeros, self.in_features))
        unpacked = unpack_codes(stream, codes.bits, self.in_features)
        if self.order is None:
            return LayerWeight(codes.store(self.name, unpacked, scales, zeros, losses))
        weight = codes.store(self.name, unpacked[:, self.order], scales, zeros, losses)
        return LayerWeight(weight, None, self.order.to(torch.int32))


def settings_of(name: str, config: Mapping[str, Any]) -> GPTQSettings:
    """What the config says of a layer, by the first pattern of `dynamic` that its name begins with.

    Raises:
        ValueError: for a pattern that cannot be read, or one that says that the layer is not quantized.
    """
    for pattern, overrides in (config.get("dynamic") or {}).items():
        try:
            matches = re.match(pattern.removeprefix("-:").removeprefix("+:"), name)
        except re.error as error:
            raise ValueError(f"dynamic must have regular expressions, got {pattern!r}: {error}") from error
        if matches:
            if pattern.startswith("-:"):
                raise ValueError(f"{name} has a qweight, but dynamic says by {pattern!r} that it is not quantized")
            return GPTQSettings.of(name, {**config, **overrides})
    return GPTQSettings.of(name, config)


def read_layers(
    found: list[GPTQTensors], label: int | None, by_words: bool, losses: Losses
) -> dict[str, CheckpointLayer]:
    """The layers of a model, after it was decided which version of the format they have.

    Args:
        label: the version that the config states; None: none.
        by_words: GPTQModel wrote it.

    Raises:
        ValueError: if the zero points contradict the config.
        LossError: for what no scheme has, by the policy of `losses`.
    """
    version = _version(found, label, by_words)
    details = f"GPTQ v{version}" + ("" if label in (None, version) else f" (labelled v{label})")
    return {tensors.name: tensors.layer(version, by_words, details, losses) for tensors in found}


def written_by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether a config names GPTQModel as what wrote the model."""
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(str(name).lower().startswith("gptqmodel") for name in names)


def _version(found: list[GPTQTensors], label: int | None, by_words: bool) -> int:
    """The version of the format.

    The labels of symmetric models are wrong in files that people use; so the zero points decide, which are all equal.
    """
    kinds = {tensors.name: tensors.kind(by_words) for tensors in found}
    if len(set(kinds.values())) == 1 and 0 not in kinds.values():
        version = kinds[found[0].name]
        if label not in (None, version) and any(tensors.settings.symmetric is False for tensors in found):
            raise ValueError(
                f"all zero points are those of symmetric layers in version {version} of GPTQ, but the config says "
                f"sym=false and version {label}: set sym to true in the config if the model is symmetric"
            )
        return version
    stated = Counter(kinds[tensors.name] for tensors in found if tensors.settings.symmetric is True)
    if len(stated) > 1 or 0 in stated:
        raise ValueError(
            f"of {stated.total()} layers with sym=true in the config, {stated[1]} have the zero points of version 1 of "
            f"GPTQ, {stated[2]} those of version 2 and {stated[0]} others: set sym to false in the config if the model "
            "is asymmetric"
        )
    return next(iter(stated), label or 1)


def version_label(config: Mapping[str, Any]) -> int | None:
    """The version of the format that a config states; None: none.

    Raises:
        ValueError: for another format, or for one that is packed otherwise.
    """
    labels = {config[key] for key in ("format", "checkpoint_format") if config.get(key) is not None}
    for label in labels:
        if label not in _VERSIONS:
            raise ValueError(f"the format must be gptq or gptq_v2 to be read, got {label!r}")
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"pack_dtype must be int32 to be read, got {config['pack_dtype']!r}")
    return _VERSIONS[labels.pop()] if len(labels) == 1 else None


def _written_settings(layer: CheckpointLayer) -> GPTQSettings:
    """What a config says of a layer that is written."""
    scheme = layer.scheme
    return GPTQSettings(scheme.weight_bits, scheme.group_size or -1, scheme.symmetric)


class GPTQFolder(FolderFormat):
    """A folder that GPTQModel, AutoGPTQ, optimum or transformers wrote."""

    name = "gptq"
    title = "GPTQ"
    quant_methods = ("gptq",)
    variants = (
        Variant("4 bits, symmetric", "w4a16[-gN]", "exact", "exact", "scales: float16, or a report"),
        Variant("4 bits, zero points", "w4a16[-gN]-asym", "exact", "exact", "zero point 16: refused"),
        Variant("8 bits, symmetric", "w8a16[-gN]", "exact", "exact"),
        Variant("8 bits, zero points", "w8a16[-gN]-min", "exact", "no"),
        Variant("2 and 3 bits", "w4a16[-gN], w4a16[-gN]-asym", "exact", "exact", "written as 4 bits"),
        Variant("activation order (`desc_act`)", "all of these", "exact", "exact", "with a stored order of the input"),
    )

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        label = version_label(config)
        found = [GPTQTensors.of(tensors, name, settings_of(name, config)) for name in quantized_names(tensors)]
        return read_layers(found, label, written_by_gptqmodel(config), losses)

    def problem(self, layer: CheckpointLayer) -> str | None:
        if layer.scheme.static_activations:
            return "it has no place for the scale of static activations"
        if layer.scheme.has_min:
            return "it has no place for float minima"
        per_word = 32 // layer.scheme.weight_bits
        for what, size in (("input", layer.in_features), ("output", layer.out_features)):
            if size % per_word:
                return f"the number of its {what} features must be a multiple of {per_word}, got {size}"
        return None

    def encode(self, layer: CheckpointLayer, values: LayerWeight, losses: Losses) -> dict[str, Tensor]:
        scheme, weight = layer.scheme, values.weight
        bits, half = scheme.weight_bits, 1 << scheme.weight_bits - 1
        groups = torch.arange(layer.in_features, dtype=torch.int32) // (scheme.group_size or layer.in_features)
        if values.input_order is None and bits == 4:
            words = weight.qweight.contiguous().view(torch.int32)
        else:
            codes = stored_codes(weight, layer.in_features, scheme)
            if values.input_order is not None:
                back = values.input_order.to(torch.int64).argsort()
                codes, groups = codes[:, back], groups[back]
            words = pack_codes(codes, bits)
        zeros = torch.full_like(weight.scales, half, dtype=torch.uint8) if weight.zeros is None else weight.zeros
        return {
            "qweight": words.t().contiguous(),
            "qzeros": pack_codes((zeros - (1 if self._version == 1 else 0)).t().contiguous(), bits),
            "scales": half_scales(layer.name, weight.scales, losses).t().contiguous(),
            "g_idx": groups,
        }

    def prepared(self, checkpoint: Checkpoint, losses: Losses, target: str | None) -> tuple[Self, Checkpoint]:
        writer = type(self)()
        writer._version = 1 if all(layer.scheme.symmetric for layer in checkpoint.layers.values()) else 2
        return writer, checkpoint

    def written_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        layers = checkpoint.layers
        own = {name: _written_settings(layer) for name, layer in layers.items()}
        common = Counter(own[name] for name in own).most_common(1)[0][0]
        dynamic: dict[str, Any] = {
            f"+:^{re.escape(name)}$": {"bits": s.bits, "group_size": s.group_size, "sym": s.symmetric}
            for name, s in own.items()
            if s != common
        }
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in unquantized_beside(checkpoint)}
        label = "gptq" if self._version == 1 else "gptq_v2"
        return {
            "quant_method": "gptq",
            "bits": common.bits,
            "group_size": common.group_size,
            "sym": common.symmetric,
            "desc_act": any(layer.has_input_order and layer.scheme.group_size is not None for layer in layers.values()),
            "lm_head": "lm_head" in layers,
            "format": label,
            "checkpoint_format": label,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }

    _version = 1
