"""AWQ in its layout "GEMM", as AutoAWQ, GPTQModel and AutoRound write it (https://arxiv.org/abs/2306.00978).

A layer [N, K] has `qweight`, int32 `[K, N / 8]`, `qzeros`, int32 `[groups, N / 8]`, `scales` `[groups, N]` and a bias;
`w = (code - zero) * scale`. A word holds 8 columns of N, whose order is that of `_COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..formats.weight_format import INT4
from .bits import pack_codes, unpack_codes
from .checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat, quantized_names, unquantized_beside
from .grouped_codes import GroupedCodes, half_scales, stored_codes
from .losses import Losses
from .safetensors_files import SafetensorsFiles

# Field i of a word, low bits first, holds this one of its 8 columns.
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_FIELDS = tuple(_COLUMNS.index(column) for column in range(8))
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> codes uint8 [N, R]."""
    fields = unpack_codes(words, 4, words.shape[1] * 8).unflatten(1, (-1, 8))
    return fields[..., _FIELDS].flatten(1).t().contiguous()


def _pack(codes: Tensor) -> Tensor:
    """The inverse of `_unpack`."""
    fields = codes.t().contiguous().unflatten(1, (-1, 8))[..., _COLUMNS]
    return pack_codes(fields.flatten(1), 4)


@dataclass(frozen=True)
class AWQTensors:
    """The tensors of a layer in a file, whose shapes fit one another.

    Attributes:
        files: they are read from.
        name: of the layer.
        group_size: -1: one scale a row.
        in_features, out_features: K, N.
    """

    files: SafetensorsFiles
    name: str
    group_size: int
    in_features: int
    out_features: int

    @classmethod
    def of(cls, files: SafetensorsFiles, name: str, bits: object, group_size: object) -> AWQTensors:
        """Those of a layer, checked.

        Args:
            bits, group_size: what the config says.

        Raises:
            ValueError: naming the tensor, or what the config says, that does not fit.
        """
        if bits != 4 or isinstance(bits, bool):
            raise ValueError(f"bits of {name} must be 4 for AWQ, got {bits!r}")
        if type(group_size) is not int or not (group_size == -1 or group_size > 0):
            raise ValueError(f"group_size of {name} must be -1 or a number from 1 on, got {group_size!r}")
        qweight = files[f"{name}.qweight"]
        if len(qweight.shape) != 2 or qweight.dtype != torch.int32:
            raise ValueError(
                f"{name}.qweight must be an int32 matrix, got {qweight.dtype} of shape {list(qweight.shape)}"
            )
        in_features, out_features = qweight.shape[0], qweight.shape[1] * 8
        length = in_features if group_size == -1 else group_size
        if in_features % length:
            raise ValueError(f"{name}.qweight must have groups of {length} input features, got {in_features} of these")
        groups = in_features // length
        expected = {
            "qzeros": ((groups, out_features // 8), (torch.int32,)),
            "scales": ((groups, out_features), _SCALES),
        }
        for part, (shape, dtypes) in expected.items():
            if (info := files.get(f"{name}.{part}")) is None:
                if part == "scales":
                    raise ValueError(f"{name}.{part} is missing")
            elif info.shape != shape or info.dtype not in dtypes:
                raise ValueError(
                    f"{name}.{part} must be {dtypes[0]} of shape {list(shape)} in the layout GEMM with groups of "
                    f"{group_size}, got {info.dtype} of shape {list(info.shape)}"
                )
        return cls(files, name, group_size, in_features, out_features)

    def _zeros(self) -> Tensor | None:
        """Zero points uint8 [N, groups]; None without a tensor of them."""
        name = f"{self.name}.qzeros"
        return _unpack(self.files.tensor(name)) if name in self.files else None

    def layer(self, zero_point: bool, losses: Losses) -> CheckpointLayer:
        """The layer of a checkpoint.

        Args:
            zero_point: whether the config says that there are zero points.

        Raises:
            ValueError: if there are none, or some where the config says that there are none.
        """
        zeros = self._zeros()
        if zeros is None and zero_point:
            raise ValueError(f"{self.name}.qzeros is missing")
        symmetric = zeros is None or bool((zeros == INT4.offset).all())
        if not symmetric and not zero_point:
            raise ValueError(f"{self.name}.qzeros must be 8 everywhere, as the config says zero_point=false")
        codes = GroupedCodes(4, None if self.group_size == -1 else self.group_size, symmetric)
        if codes.problem is not None:
            losses.need_requantization(self.name, codes.problem)
        parts = [f"{self.name}.{part}" for part in ("qweight", "qzeros", "scales")]
        names = tuple(name for name in parts if name in self.files)
        read = partial(self._read, codes, losses)
        details = "AWQ GEMM, 4 bits"
        return CheckpointLayer(self.name, self.in_features, self.out_features, codes.scheme, details, names, read)

    def _read(self, codes: GroupedCodes, losses: Losses) -> LayerWeight:
        scales = self.files.tensor(f"{self.name}.scales").to(torch.float32).t().contiguous()
        zeros = None if codes.symmetric else self._zeros()
        weight = _unpack(self.files.tensor(f"{self.name}.qweight"))
        return LayerWeight(codes.store(self.name, weight, scales, zeros, losses))


def read_layers(
    tensors: SafetensorsFiles, settings: Callable[[str], tuple[object, object, bool]], losses: Losses
) -> dict[str, CheckpointLayer]:
    """The layers of a folder.

    Args:
        settings: the bits, the group size and whether there are zero points, which a config says of a layer.

    Raises:
        ValueError: for tensors that do not fit, or activations that must be scaled.
        LossError: for what no scheme has, by the policy of `losses`.
    """
    scaled = next((name for name in tensors if name.endswith("act.scales")), None)
    if scaled is not None:
        raise ValueError(f"{scaled} scales the output of an activation function, which no layer here does")
    layers = {}
    for name in quantized_names(tensors):
        bits, group_size, zero_point = settings(name)
        layers[name] = AWQTensors.of(tensors, name, bits, group_size).layer(zero_point, losses)
    return layers


class AWQFolder(FolderFormat):
    """A folder that AutoAWQ, GPTQModel or transformers wrote in the layout GEMM."""

    name = "awq"
    title = "AWQ"
    quant_methods = ("awq",)
    variants = (
        Variant("4 bits, zero points", "w4a16[-gN]-asym", "exact", "exact", "scales: float16, or a report"),
        Variant("4 bits, symmetric", "w4a16[-gN]", "exact", "exact", "written with zero points of 8"),
        Variant("layouts gemv, gemv_fast, llm-awq, marlin, exllama", "none", "no", "no"),
    )

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        for key in ("version", "format", "checkpoint_format"):
            layout = config.get(key)
            if layout is not None and str(layout).lower() != "gemm":
                raise ValueError(f"{key} of AWQ must be gemm to be read, got {layout!r}")
        bits = config.get("bits", config.get("w_bit"))
        group_size = config.get("group_size", config.get("q_group_size"))
        zero_point = config.get("zero_point", True)
        if not isinstance(zero_point, bool):
            raise ValueError(f"zero_point must be true or false, got {zero_point!r}")
        return read_layers(tensors, lambda name: (bits, group_size, zero_point), losses)

    def problem(self, layer: CheckpointLayer) -> str | None:
        scheme = layer.scheme
        if scheme.weight_bits != 4:
            return "it has 4-bit weights"
        if scheme.has_min:
            return "it has no place for float minima"
        if scheme.static_activations:
            return "it has no place for the scale of static activations"
        if layer.has_input_order:
            return "it has no place for an order of the input features"
        if scheme.group_size is not None and layer.in_features % scheme.group_size:
            return f"the number of its input features must be a multiple of {scheme.group_size}"
        if layer.out_features % 8:
            return f"the number of its output features must be a multiple of 8, got {layer.out_features}"
        return None

    def encode(self, layer: CheckpointLayer, values: LayerWeight, losses: Losses) -> dict[str, Tensor]:
        weight = values.weight
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full_like(weight.scales, INT4.offset, dtype=torch.uint8)
        return {
            "qweight": _pack(stored_codes(weight, layer.in_features, layer.scheme)),
            "qzeros": _pack(zeros),
            "scales": half_scales(layer.name, weight.scales, losses).t().contiguous(),
        }

    def written_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        groups = {layer.scheme.group_size: name for name, layer in checkpoint.layers.items()}
        if len(groups) > 1:
            raise ValueError(
                "AWQ has one group size for all layers, got "
                + " and ".join(f"{size or 'a row'} ({name})" for size, name in groups.items())
            )
        (group_size,) = groups
        plain = unquantized_beside(checkpoint) + ([] if "lm_head" in checkpoint.layers else ["lm_head"])
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain,
        }
