"""The float folder of transformers: what every engine reads, and what nothing is left quantized in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat
from .losses import Losses
from .requantize import dequantize
from .safetensors_files import INDEX, SINGLE, SafetensorsFiles

if TYPE_CHECKING:
    from typing_extensions import Self

# Models with layers of transformers' `Conv1D`, whose float weight is [K, N], and the names of these.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class FloatFolder(FolderFormat):
    """Float tensors under the names of transformers."""

    name = "float"
    title = "float folder of transformers"
    targets = tuple(_DTYPES)
    variants = (
        Variant("float32 (`float:f32`)", "none", "exact", "exact"),
        Variant("bfloat16, float16 (`float:bf16`, `float:f16`)", "none", "exact", "with a report", "one rounding"),
    )

    def detects(self, path: Path) -> bool:
        tensors = (
            path.suffix == ".safetensors" if path.is_file() else any((path / f).is_file() for f in (SINGLE, INDEX))
        )
        return tensors and not self.quantization_config(path)

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        return {}

    def encode(self, layer: CheckpointLayer, values: LayerWeight, losses: Losses) -> dict[str, Tensor]:
        weight = dequantize(values, layer.in_features, layer.scheme)
        if layer.name.rpartition(".")[2] in self._transposed:
            weight = weight.t().contiguous()
        rounded = weight.to(self._dtype)
        losses.changed(f"{layer.name}.weight", f"weights that {self._dtype} cannot hold", weight, rounded)
        return {"weight": rounded}

    def encode_float(self, name: str, tensor: Tensor, losses: Losses) -> Tensor:
        if not self._casts or tensor.dtype not in (torch.float64, *_DTYPES.values()):
            return tensor
        rounded = tensor.to(self._dtype)
        losses.changed(name, f"values that {self._dtype} cannot hold", tensor, rounded)
        return rounded

    def prepared(self, checkpoint: Checkpoint, losses: Losses, target: str | None) -> tuple[Self, Checkpoint]:
        writer = type(self)()
        writer._dtype, writer._casts = _DTYPES[target or "f32"], target is not None
        if checkpoint.config.get("model_type") in _CONV1D_MODELS:
            writer._transposed = _CONV1D
        config = {key: value for key, value in checkpoint.config.items() if key not in ("dtype", "torch_dtype")}
        if checkpoint.config:
            config["dtype"] = str(writer._dtype).removeprefix("torch.")
        return writer, replace(checkpoint, config=config)

    def written_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {}

    _dtype = torch.float32
    _casts = False  # what is not quantized, too
    _transposed: tuple[str, ...] = ()  # layers whose weight is written as [K, N]
