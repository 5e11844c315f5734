"""MLX, as mlx-lm writes it (https://github.com/ml-explore/mlx): codes with a scale and an offset for each group.

A layer [N, K] has `weight`, uint32 `[N, K * bits / 32]`, a dense stream of codes along K, `scales` and `biases`
`[N, groups]`, and a `bias`, which is that of the layer. `w = code * scale + bias of the group`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..formats.weight_format import INT4
from .bits import pack_codes, unpack_codes
from .checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat, read_config
from .grouped_codes import stored_codes
from .losses import Losses
from .safetensors_files import SafetensorsFiles

if TYPE_CHECKING:
    from typing_extensions import Self

_GROUPS = (32, 64, 128)
_BITS = (2, 3, 4, 5, 6, 8)
_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a layer in a file, whose shapes fit one another."""

    files: SafetensorsFiles
    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int

    def tensor(self, part: str) -> Tensor:
        return self.files.tensor(f"{self.name}.{part}")

    def scheme(self) -> QuantScheme:
        """`-min`; or without minima, or with zero points, where the offsets stand for these in every group."""
        width = 4 if self.bits <= 4 else 8
        plain = QuantScheme(width, 16, self.group_size, "min")
        scales, offsets = (self.tensor(part).to(torch.float32) for part in ("scales", "biases"))
        if self.bits not in (4, 8):
            return plain
        half = 1 << self.bits - 1
        if bool((offsets == -half * scales).all()):
            return QuantScheme(width, 16, self.group_size)
        zeros = _zero_points(scales, offsets)
        if width == 4 and bool(((zeros >= 0) & (zeros <= 15) & (offsets == -zeros * scales)).all()):
            return QuantScheme(width, 16, self.group_size, "zero_point")
        return plain

    def read(self, scheme: QuantScheme, losses: Losses) -> LayerWeight:
        codes = unpack_codes(self.tensor("weight").view(torch.int32), self.bits, self.in_features)
        scales, offsets = (self.tensor(part).to(torch.float32) for part in ("scales", "biases"))
        if scheme.weight_bits == 4:
            zeros = None
            if scheme.zeros is not None:
                zeros = offsets if scheme.has_min else _zero_points(scales, offsets).to(torch.uint8)
            return LayerWeight(QuantizedWeight(INT4.pack(codes), scales, zeros))
        if self.bits < 8:
            return LayerWeight(QuantizedWeight(codes.view(torch.int8), scales, offsets))
        minima = None
        if scheme.has_min:
            exact = offsets.to(torch.float64) + 128.0 * scales.to(torch.float64)
            minima = exact.to(torch.float32)
            losses.changed(f"{self.name}.biases", "offsets that float32 cannot hold beside int8 codes", exact, minima)
        return LayerWeight(QuantizedWeight((codes ^ 0x80).view(torch.int8), scales, minima))


def _zero_points(scales: Tensor, offsets: Tensor) -> Tensor:
    """The whole numbers nearest to -offset / scale: float32."""
    return torch.where(scales == 0, 0.0, -offsets / scales).round()


class MLXFolder(FolderFormat):
    """A folder of mlx-lm with affine quantization."""

    name = "mlx"
    title = "MLX"
    targets = tuple(_FLOATS)
    variants = (
        Variant(
            "affine, 2 to 4 bits", "w4a16-gN-min", "exact", "exact", "`mlx:bf16`: scales are rounded with a report"
        ),
        Variant("affine, 5, 6 and 8 bits", "w8a16-gN-min", "exact", "exact", "written as 8 bits"),
        Variant("without minima, or with zero points", "w4a16-gN[-asym], w8a16-gN", "exact", "exact"),
        Variant("modes mxfp4, mxfp8, nvfp4", "none", "no", "no"),
    )

    def quantization_config(self, folder: Path) -> dict[str, Any]:
        config = read_config(folder)
        found = config.get("quantization")
        other = config.get("quantization_config")
        if not isinstance(found, dict) or (isinstance(other, dict) and "quant_method" in other):
            return {}
        return found

    def detects(self, path: Path) -> bool:
        return path.is_dir() and bool(self.quantization_config(path))

    def open(self, path: Path, losses: Losses) -> Checkpoint:
        found = super().open(path, losses)
        return replace(found, config={key: value for key, value in found.config.items() if key != "quantization"})

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        layers = {}
        for name in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
            own = _tensors(tensors, name, config)
            scheme = own.scheme()
            names = tuple(f"{name}.{part}" for part in ("weight", "scales", "biases"))
            read = partial(own.read, scheme, losses)
            details = f"MLX affine, {own.bits} bits"
            layers[name] = CheckpointLayer(name, own.in_features, own.out_features, scheme, details, names, read)
        if not layers:
            raise ValueError("the config says that the model is quantized, but no tensor is called .scales")
        return layers

    def problem(self, layer: CheckpointLayer) -> str | None:
        if layer.scheme.static_activations:
            return "it has no place for the scale of static activations"
        if layer.has_input_order:
            return "it has no place for an order of the input features"
        if layer.scheme.group_size not in (None, *_GROUPS):
            return f"it has groups of {', '.join(map(str, _GROUPS))}"
        if layer.in_features % _written_group(layer):
            return f"the number of its input features must be a multiple of {_written_group(layer)}"
        return None

    def encode(self, layer: CheckpointLayer, values: LayerWeight, losses: Losses) -> dict[str, Tensor]:
        scheme, scales, zeros = layer.scheme, values.weight.scales, values.weight.zeros
        if scheme.has_min:
            assert zeros is not None
            offsets = zeros.to(torch.float64)
            if scheme.weight_bits == 8:
                offsets = offsets - 128.0 * scales
        else:
            points = 1 << scheme.weight_bits - 1 if zeros is None else zeros.to(torch.float64)
            offsets = 0.0 - points * scales.to(torch.float64)
        times = layer.in_features // _written_group(layer) if scheme.group_size is None else 1
        codes = stored_codes(values.weight, layer.in_features, scheme)
        return {
            "weight": pack_codes(codes, scheme.weight_bits).view(torch.uint32),
            "scales": self._rounded(layer.name, "scales", scales, losses).repeat_interleave(times, dim=1),
            "biases": self._rounded(layer.name, "biases", offsets, losses).repeat_interleave(times, dim=1),
        }

    def _rounded(self, name: str, part: str, exact: Tensor, losses: Losses) -> Tensor:
        rounded = exact.to(self._dtype)
        if not bool(rounded.isfinite().all()):
            raise ValueError(f"{name}.{part} must be within {self._dtype}, got {float(exact.abs().max()):g}")
        losses.changed(f"{name}.{part}", f"{part} that {self._dtype} cannot hold", exact, rounded)
        return rounded

    def prepared(self, checkpoint: Checkpoint, losses: Losses, target: str | None) -> tuple[Self, Checkpoint]:
        writer = type(self)()
        writer._dtype = _FLOATS[target or "f32"]
        named = replace(checkpoint, config={**checkpoint.config, "quantization": self.written_config(checkpoint)})
        return writer, named

    def written_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        own = {name: (_written_group(layer), layer.scheme.weight_bits) for name, layer in checkpoint.layers.items()}
        common = Counter(own.values()).most_common(1)[0][0]

        def entry(settings: tuple[int, int]) -> dict[str, Any]:
            return {"group_size": settings[0], "bits": settings[1], "mode": "affine"}

        return entry(common) | {name: entry(settings) for name, settings in own.items() if settings != common}

    _dtype = torch.float32


def _written_group(layer: CheckpointLayer) -> int:
    """The group size that is written: of one scale a row, the largest that divides it."""
    if layer.scheme.group_size is not None:
        return layer.scheme.group_size
    return next((size for size in reversed(_GROUPS) if layer.in_features % size == 0), _GROUPS[0])


def _tensors(tensors: SafetensorsFiles, name: str, config: Mapping[str, Any]) -> _Tensors:
    """The tensors of a layer.

    Raises:
        ValueError: naming the tensor, or what the config says, that does not fit.
    """
    settings = config.get(name, config)
    if not isinstance(settings, dict):
        raise ValueError(f"{name} has scales, but the config says that it is not quantized")
    settings = {**{key: config.get(key) for key in ("bits", "group_size", "mode")}, **settings}
    bits, group_size, mode = settings["bits"], settings["group_size"], settings["mode"]
    if mode not in (None, "affine"):
        raise ValueError(f"mode of {name} must be affine to be read, got {mode!r}")
    if type(bits) is not int or bits not in _BITS:
        raise ValueError(f"bits of {name} must be one of {', '.join(map(str, _BITS))}, got {bits!r}")
    if type(group_size) is not int or group_size not in _GROUPS:
        raise ValueError(f"group_size of {name} must be one of {', '.join(map(str, _GROUPS))}, got {group_size!r}")
    for part in ("weight", "biases"):
        if f"{name}.{part}" not in tensors:
            raise ValueError(f"{name}.{part} is missing")
    weight, scales = tensors[f"{name}.weight"], tensors[f"{name}.scales"]
    if len(weight.shape) != 2 or len(scales.shape) != 2:
        raise ValueError(
            f"{name}.weight must be a matrix, got shape {list(weight.shape)}: stacked experts are not read"
        )
    out_features, groups = scales.shape
    in_features = groups * group_size
    expected = {
        "weight": ((out_features, in_features * bits // 32), (torch.uint32,)),
        "scales": ((out_features, groups), tuple(_FLOATS.values())),
        "biases": ((out_features, groups), tuple(_FLOATS.values())),
    }
    for part, (shape, dtypes) in expected.items():
        info = tensors[f"{name}.{part}"]
        if info.shape != shape or info.dtype not in dtypes:
            raise ValueError(
                f"{name}.{part} must be {dtypes[0]} of shape {list(shape)} for {bits} bits and groups of {group_size}, "
                f"got {info.dtype} of shape {list(info.shape)}"
            )
    return _Tensors(tensors, name, bits, group_size, in_features, out_features)
