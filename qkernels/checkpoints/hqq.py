"""HQQ, as its library and transformers write it in safetensors (https://github.com/mobiusml/hqq).

The weight [N, K] of a layer lies in rows of a group each. `W_q` holds them in parts: the first rows in the high bits of
a byte, or of an int32 for 3 bits, the last in the low ones. `w = (code - zero) * scale`, with float `scale` and `zero`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..formats.weight_format import INT4, WEIGHT_FORMATS
from .checkpoint import CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat
from .losses import Losses
from .requantize import quantize_again
from .safetensors_files import SafetensorsFiles

# By the name of a packing: the bits of a code, the codes of an element, and its dtype.
_PACKINGS = {
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_SETTINGS = ("nbits", "group_size", "shape", "axis", "packing", "view_as_float", "quant_scale", "quant_zero")
_MOST_SETTING = 64  # bytes


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a layer in a file, whose shapes fit one another.

    Attributes:
        group_size: along K for axis 1, along N for axis 0.
    """

    files: SafetensorsFiles
    name: str
    packing: str
    in_features: int
    out_features: int
    group_size: int
    axis: int

    def tensor(self, part: str) -> Tensor:
        return self.files.tensor(f"{self.name}.{part}")

    @property
    def bits(self) -> int:
        return _PACKINGS[self.packing][0]

    @property
    def width(self) -> int:
        """Bits of a code as it is stored here."""
        return 8 if self.bits == 8 else 4

    @property
    def stored_group(self) -> int | None:
        """The group of a scheme: all of a row, or the largest that all groups consist of; 0: there is none."""
        if self.group_size == self.in_features:
            return None
        sizes = WEIGHT_FORMATS[self.width].group_sizes
        return next((size for size in sorted(sizes, reverse=True) if self.group_size % size == 0), 0)

    @property
    def problem(self) -> str | None:
        """Why no scheme has the groups; None: one has."""
        if self.axis == 0:
            return "its groups run over the outputs (axis 0), and no scheme has such"
        if self.in_features % self.group_size:
            return f"its groups of {self.group_size} cross the rows of {self.in_features}"
        return f"no scheme has groups of {self.group_size}" if self.stored_group == 0 else None

    def codes(self) -> Tensor:
        """uint8 [rows, columns] of the matrix that was quantized."""
        bits, parts, dtype = _PACKINGS[self.packing]
        packed = self.tensor("W_q")
        packed = packed.view(dtype) if packed.dtype != dtype else packed
        mask = (1 << bits) - 1
        rows = torch.cat([packed >> bits * (parts - 1 - part) & mask for part in range(parts)]).to(torch.uint8)
        return rows[: self.in_features * self.out_features // rows.shape[1]]

    def numbers(self, part: str) -> Tensor:
        """`scale` or `zero` as float32 [N, groups], of axis 1."""
        return self.tensor(part).to(torch.float32).view(self.out_features, -1)

    def scheme(self) -> QuantScheme:
        """With minima; or with zero points, or none, where `zero` holds these."""
        if self.problem is not None:
            return QuantScheme(self.width, 16, 32, "zero_point" if self.width == 4 else None)
        group, zeros = self.stored_group, self.numbers("zero")
        if bool((zeros == 1 << self.bits - 1).all()):
            return QuantScheme(self.width, 16, group)
        if self.width == 4 and bool((zeros == zeros.round()).all()) and 0 <= int(zeros.min()) <= int(zeros.max()) <= 15:
            return QuantScheme(4, 16, group, "zero_point")
        return QuantScheme(self.width, 16, group, "min")

    def read(self, scheme: QuantScheme, losses: Losses) -> LayerWeight:
        codes = self.codes()
        if self.problem is not None:
            scales, zeros = (self.tensor(part).to(torch.float32) for part in ("scale", "zero"))
            exact = ((codes - zeros) * scales).reshape(self.out_features, self.in_features)
            return LayerWeight(quantize_again(f"{self.name}.weight", exact, scheme, losses))
        codes, scales, zeros = codes.reshape(self.out_features, -1), self.numbers("scale"), self.numbers("zero")
        kept: Tensor | None = None
        if scheme.has_min:
            shift = 128 if self.width == 8 else 0
            exact = (shift - zeros.to(torch.float64)) * scales.to(torch.float64)
            kept = exact.to(torch.float32)
            losses.changed(f"{self.name}.zero", "offsets that float32 cannot hold", exact, kept)
        elif scheme.zeros is not None:
            kept = zeros.to(torch.uint8)
        if self.width == 8:
            qweight = (codes ^ 0x80).view(torch.int8)
        else:
            qweight = INT4.pack(codes + (INT4.offset - (1 << self.bits - 1)) if scheme.symmetric else codes)
        times = self.group_size // scheme.group_size if scheme.group_size is not None else 1
        split = partial(torch.repeat_interleave, repeats=times, dim=1)
        return LayerWeight(QuantizedWeight(qweight, split(scales), None if kept is None else split(kept)))


class HQQFolder(FolderFormat):
    """A folder of transformers, or of hqq, in safetensors."""

    name = "hqq"
    title = "HQQ"
    quant_methods = ("hqq",)
    writes = False
    variants = (
        Variant("axis 1, 1 to 4 bits", "w4a16[-gN]-min", "exact", "no"),
        Variant("axis 1, 1 to 4 bits, whole zero points", "w4a16[-gN][-asym]", "exact", "no"),
        Variant("axis 1, 8 bits", "w8a16[-gN]-min", "exact", "no"),
        Variant("axis 0, or groups that cross rows", "w4a16-g32-asym, w8a16-g32", "requantized", "no"),
        Variant("quantized scales or zeros; pickles (`qmodel.pt`)", "none", "no", "no"),
    )

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        layers = {}
        for name in [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]:
            own = _tensors(tensors, name)
            if own.problem is not None:
                losses.need_requantization(name, own.problem)
            scheme = own.scheme()
            parts = tuple(key for key in tensors if key.rpartition(".")[0] == name and not key.endswith(".bias"))
            read, details = partial(own.read, scheme, losses), f"HQQ, {own.bits} bits, axis {own.axis}"
            layers[name] = CheckpointLayer(name, own.in_features, own.out_features, scheme, details, parts, read)
        if not layers:
            raise ValueError("the config says that the model is quantized, but no tensor is called .W_q")
        return layers


def _tensors(tensors: SafetensorsFiles, name: str) -> _Tensors:
    """The tensors of a layer.

    Raises:
        ValueError: naming the tensor that is missing, does not fit, or says what is not read.
    """
    for part in (*_SETTINGS, "scale", "zero"):
        if f"{name}.{part}" not in tensors:
            quantized = [f"{name}.{part}_q" for part in ("scale", "zero") if f"{name}.{part}_q" in tensors]
            why = f": {quantized[0]} is quantized, which is not read" if quantized else ""
            raise ValueError(f"{name}.{part} is missing{why}")
    for part in _SETTINGS:
        info = tensors[f"{name}.{part}"]
        if info.dtype.is_floating_point or sum(info.shape) > _MOST_SETTING or len(info.shape) > 1:
            raise ValueError(f"{name}.{part} must be a few integers, got {info.dtype} of shape {list(info.shape)}")
    settings = {part: tensors.tensor(f"{name}.{part}").flatten().tolist() for part in _SETTINGS}
    packing = "".join(map(chr, settings["packing"]))
    if packing not in _PACKINGS:
        raise ValueError(f"{name}.packing must be one of {', '.join(_PACKINGS)}, got {packing!r}")
    bits, parts, dtype = _PACKINGS[packing]
    for part, allowed in (("nbits", [bits]), ("quant_scale", [0]), ("quant_zero", [0])):
        if settings[part] != allowed:
            raise ValueError(f"{name}.{part} must be {allowed[0]} to be read, got {settings[part]}")
    if settings["axis"] not in ([0], [1]):
        raise ValueError(f"{name}.axis must be 0 or 1, got {settings['axis']}")
    (axis,) = settings["axis"]
    if len(settings["shape"]) != 2 or min(settings["shape"]) < 1 or len(settings["group_size"]) != 1:
        raise ValueError(f"{name}.shape and group_size must say [N, K] and a number, got {settings['shape']}")
    (out_features, in_features), (group_size,) = settings["shape"], settings["group_size"]
    total = out_features * in_features
    if group_size < 1 or total % group_size:
        raise ValueError(f"{name}.group_size must divide {total} weights, got {group_size}")
    groups = total // group_size
    rows, columns = (groups, group_size) if axis == 1 else (group_size, groups)
    packed, size = tensors[f"{name}.W_q"], -(-rows // parts) * columns * dtype.itemsize
    if rows % parts and dtype != torch.int32:
        raise ValueError(f"{name}.W_q must hold {parts} parts of its {rows} rows, which do not divide so")
    if len(packed.shape) != 2 or packed.shape[0] * packed.shape[1] * packed.dtype.itemsize != size:
        raise ValueError(f"{name}.W_q must be {size} bytes of {packing}, got {packed.dtype} of {list(packed.shape)}")
    expected = (groups, 1) if axis == 1 else (1, groups)
    for part in ("scale", "zero"):
        info = tensors[f"{name}.{part}"]
        if info.shape != expected or info.dtype not in _FLOATS:
            got = f"{info.dtype} of {list(info.shape)}"
            raise ValueError(f"{name}.{part} must be a float tensor of shape {list(expected)}, got {got}")
    return _Tensors(tensors, name, packing, in_features, out_features, group_size, axis)
