"""transformers: the quantizer that loads the integers of another library's checkpoint into quantized layers.

`from_pretrained(path, quantization_config=QKernelsConfig(...))` of a folder or GGUF file that some other library has
quantized: the layers of the model are swapped on the meta device, and take the stored integers one tensor at a time.
transformers itself places, ties and merges the tensors (of experts too), as it does with a folder of ours: it is given
those of the checkpoint under the names that such a folder has.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..checkpoints.checkpoint import Checkpoint, CheckpointLayer
from ..checkpoints.losses import Losses
from ..checkpoints.registry import FORMATS, open_checkpoint
from ..checkpoints.requantize import dequantize, requantized
from ..convert.layers import Layer, rows_of
from ..convert.report import QuantizationReport
from ..convert.schemes import SchemeRules, matches
from ..convert.selection import find_layers, find_weights
from ..formats.scheme import QuantScheme
from ..formats.storage import storage_dtypes
from ..nn.storage import Storage
from .checkpoint_layers import LayerTensors, LazyTensor, Wishes
from .folders import describe
from .transformers import QKernelsHfQuantizer
from .transformers_config import QKernelsConfig

_CONVERT = "convert it first (qkernels convert IN OUT --to qkernels), and load that folder"
_NO_QAT = (
    "mode must be 'frozen' or 'int8' for the integers of a checkpoint, got 'qat', which trains float weights: load it "
    "frozen, call qkernels.dequantize_(model), then qkernels.quantize_(model, scheme, 'qat')"
)
# What transformers does with the matrices of experts and fused projections that leaves their columns as they are.
_OF_ROWS = ("MergeModulelist", "SplitModulelist", "Concatenate", "Chunk")
IN_FLOAT = "in float in the checkpoint"
NO_PLACE = "of no layer of this model"


@dataclass
class _Target:
    """A weight of the model, and the layers of the checkpoint that it is made of: one, or one for each expert."""

    layer: Layer | None  # None: the model has no layer that can be quantized for it
    sources: list[CheckpointLayer]
    converter: WeightConverter | None
    scheme: QuantScheme | None = None
    reason: str | None = None  # why it is in float

    @property
    def is_ordered(self) -> bool:
        """Whether columns of it have an order of their own."""
        return any(source.has_input_order for source in self.sources)


class CheckpointQuantizer(QKernelsHfQuantizer):
    """Loads a checkpoint that another library has quantized.

    Args:
        quantization_config: what the caller wants of its layers.
    """

    checks_values = False  # each layer is checked as it is read, without another pass over all of the model

    def __init__(self, quantization_config: QKernelsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, pre_quantized=True, **kwargs)
        if quantization_config.mode == "qat":
            raise ValueError(_NO_QAT)
        self.losses = Losses(quantization_config.on_loss)
        self._checkpoint: Checkpoint | None = None
        self._targets: dict[str, _Target] = {}
        self._notes: dict[str, str] = {}  # by the name of a weight that is in float: why
        self._moved: dict[str, str] = {}  # by the name of a parameter of a layer that was split: its name now
        self._lock = threading.Lock()

    @property
    def checkpoint(self) -> Checkpoint:
        assert self._checkpoint is not None
        return self._checkpoint

    def open(self, path: Path) -> None:
        with torch.device("cpu"):  # transformers calls this where new tensors are on the meta device
            self._checkpoint = open_checkpoint(path, self.losses)

    def read_header(self, gguf_file: str) -> None:
        self.open(Path(gguf_file))

    def get_state_dict(self, gguf_file: str, model: nn.Module) -> dict[str, LazyTensor]:
        return self.state_dict(model)

    def refuse(self, what: str) -> None:
        """Raise ValueError: this cannot be done while a checkpoint of another library is read."""
        title = FORMATS[self.checkpoint.format].title if self._checkpoint else "a checkpoint of another library"
        raise ValueError(f"{what} is not possible while {title} is loaded: {_CONVERT}")

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            self.refuse("a device_map with layers on disk")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            self.refuse("tensor parallelism")
        if self._checkpoint is None:
            self.open(Path(checkpoint_files[0]).parent)
        super()._process_model_before_weight_loading(model, **kwargs)

    def _wishes(self) -> Wishes:
        config = self.quantization_config
        return Wishes(
            None if config.as_stored else SchemeRules(config.scheme),
            None if isinstance(config.embeddings, bool) else QuantScheme.parse(config.embeddings),
            config.skip,
            config.include,
            config.activations,
            FORMATS[self.checkpoint.format].act_group_size,
        )

    def _restore_layers(self, model: Any) -> None:
        """Swap the layers that the checkpoint has integers for, before its tensors are read."""
        self._renamings = get_model_conversion_mapping(model, None, self)
        self._expected = model.state_dict()
        self._targets = self._find_targets(model)
        wishes = self._wishes()
        for name, target in self._targets.items():
            self._choose(name, target, wishes)
        self._share_with_tied(model)
        self._warn_of_unused(model, wishes)
        chosen = {
            target.layer.name: target.scheme.name
            for target in self._targets.values()
            if target.layer is not None and target.scheme is not None
        }
        self._details = {
            target.layer.name: target.sources[0].details
            for target in self._targets.values()
            if target.layer is not None and target.scheme is not None
        }
        if not chosen:
            self._no_layers(model)
            return
        config = self.quantization_config
        ordered = {t.layer.name for t in self._targets.values() if t.layer is not None and t.is_ordered}
        config.layers = {
            name: {"scheme": scheme, **config.layer_options, "input_order": True} if name in ordered else scheme
            for name, scheme in chosen.items()
        }
        config.scheme = Counter(chosen.values()).most_common(1)[0][0]
        super()._restore_layers(model)
        splits = {id(layer.split): (layer, layer.split) for layer in self._layers if layer.split is not None}
        for layer, split in splits.values():
            for whole in layer.aliases[1::2]:
                self._moved |= {f"{whole}.{old}": f"{whole}.{new}" for old, new in split.new_names().items()}

    def _no_layers(self, model: Any) -> None:
        if any(target.reason != NO_PLACE for target in self._targets.values()):
            return  # all are in float, as was asked for
        example = next(iter(self.checkpoint.layers), "none at all")
        raise ValueError(
            f"{self.checkpoint.path} has no quantized layer that {type(model).__name__} has a place for: its names are "
            f"such as {example}"
        )

    def _warn_of_unused(self, model: Any, wishes: Wishes) -> None:
        """Warn of what was asked for and has no effect."""
        layers = find_layers(model, embeddings=True)
        names = [name for layer in layers for name in layer.all_names]
        asked = {"skip": wishes.skip, "include": wishes.include or ()}
        if wishes.rules is not None and wishes.rules.by_pattern:
            asked["scheme"] = [pattern for pattern, _ in wishes.rules.rules]
        for argument, patterns in asked.items():
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    warnings.warn(f"{argument} pattern {pattern!r} matches no layer", stacklevel=2)
        quantized = [t.layer for t in self._targets.values() if t.layer is not None and t.scheme is not None]
        if self.quantization_config.embeddings and not any(layer.is_lookup for layer in quantized):
            warnings.warn(
                f"embeddings={self.quantization_config.embeddings!r} has no effect: the embeddings of the checkpoint "
                "are in float; quantize them after loading (qkernels.quantize_ with include and embeddings)",
                stacklevel=2,
            )

    def _rename(self, model: Any, key: str) -> tuple[str, WeightConverter | None]:
        """The name in the model of a tensor of the checkpoint, and what merges it with others on the way."""
        renamings = [entry for entry in self._renamings if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._renamings if isinstance(entry, WeightConverter)]
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, self._expected)
        if name not in self._expected and key in self._expected:
            return key, None
        return name, next((entry for entry in converters if pattern in entry.source_patterns), None)

    def _find_targets(self, model: Any) -> dict[str, _Target]:
        """By the name of a weight of the model: what it is made of."""
        layers = {name: layer for layer in find_layers(model, embeddings=True) for name in layer.weight_names()}
        targets: dict[str, _Target] = {}
        for source in self.checkpoint.layers.values():
            name, converter = self._rename(model, f"{source.name}.weight")
            target = targets.setdefault(name, _Target(layers.get(name), [], converter))
            target.sources.append(source)
        return targets

    def _choose(self, name: str, target: _Target, wishes: Wishes) -> None:
        """Decide the scheme of a weight of the model, or why it is in float."""
        layer, sources = target.layer, target.sources
        if name not in self._expected:
            target.reason = NO_PLACE
            return
        if layer is None:
            target.reason = "no linear layer or embedding in the model"
            return
        if target.converter is not None and not all(
            type(operation).__name__ in _OF_ROWS for operation in target.converter.operations
        ):
            target.reason = "transformers rearranges its columns while it loads them"
            return
        if target.converter is None:
            stored_shape = (sources[0].out_features, sources[0].in_features)
            expected = layer.adapter.shape(layer.module)
            if tuple(expected[-2:]) != stored_shape or len(expected) != 2:
                raise ValueError(
                    f"{sources[0].name} of the checkpoint is {list(stored_shape)}, and the model's layer "
                    f"{list(expected)}"
                )
        if target.is_ordered and (target.converter is not None or layer.is_lookup):
            target.reason = f"activation order of {'an embedding' if target.converter is None else 'fused matrices'}"
            return
        schemes = {wishes.scheme(source.scheme, layer.all_names, layer.is_lookup) for source in sources}
        if None in schemes:
            target.reason = "asked for in float"
            return
        found = sorted(
            (scheme for scheme in schemes if scheme is not None), key=lambda own: (own.weight_bits, own.name)
        )
        scheme = found[-1]
        reason = layer.adapter.reason(layer.module, scheme)
        if reason is not None:
            target.reason = reason
            return
        wanted = {source.name: scheme for source in sources if source.scheme != scheme}
        layers = requantized(self.checkpoint, wanted, self.losses).layers
        target.sources = [layers[source.name] for source in sources]
        target.scheme = scheme

    def _share_with_tied(self, model: Any) -> None:
        """Let a layer that has its weight from another one be quantized as that one is."""
        held = {self._rename(model, key)[0] for key in self.checkpoint.floats} | self._targets.keys()
        layers = {name: layer for layer in find_layers(model, embeddings=True) for name in layer.weight_names()}
        for pair in model.all_tied_weights_keys.items():
            for name, other in (pair, pair[::-1]):
                target = self._targets.get(other)
                if target is None or target.scheme is None or name in held or name not in layers:
                    continue
                layer = layers[name]
                if layer.adapter.reason(layer.module, target.scheme) is None and not target.is_ordered:
                    self._targets[name] = _Target(layer, target.sources, None, target.scheme)
                else:
                    target.scheme, target.reason = None, f"tied to {name}, which cannot be quantized"

    def state_dict(self, model: Any, device_map: Mapping[str, Any] | None = None) -> dict[str, LazyTensor]:
        """The tensors of the checkpoint under the names of a folder of ours, each read when transformers needs it."""
        if device_map is not None and "disk" in device_map.values():
            self.refuse("a device_map with layers on disk")
        found: dict[str, LazyTensor] = {}
        done = set()
        for name, target in self._targets.items():
            for source in target.sources:
                if source.name in done:
                    continue
                done.add(source.name)
                if target.scheme is None:
                    key = self._key_of_float(model, f"{source.name}.weight")
                    found[key] = self._float_weight(source, target, name)
                else:
                    prefix = f"{source.name}.weight" if target.converter is not None else _module_name(target)
                    found |= self._quantized_weight(prefix, source, target.scheme, target.converter is not None)
        for key, tensor in self.checkpoint.floats.items():
            if not self._is_zero_bias(model, key, tensor.read):
                found[self._key_of_float(model, key)] = LazyTensor(
                    tensor.shape, tensor.dtype, self._locked(tensor.read)
                )
        return found

    def _key_of_float(self, model: Any, key: str) -> str:
        """The name by which transformers finds the place of a tensor that is in float.

        It is another than the checkpoint's for a parameter of experts of which other matrices are quantized: these are
        split, and each matrix is a layer with a `weight`.
        """
        name, converter = self._rename(model, key)
        if name not in self._moved:
            return key
        moved = self._moved[name]
        return moved if converter is None else f"{key}{moved.removeprefix(name)}"

    def _locked(self, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def locked() -> Tensor:
            with self._lock:
                return read()

        return locked

    def _quantized_weight(
        self, prefix: str, source: CheckpointLayer, scheme: QuantScheme, merged: bool
    ) -> dict[str, LazyTensor]:
        shapes: dict[str, tuple[int, ...]] = {**scheme.storage_shapes(source.in_features, source.out_features)}
        dtypes = {**storage_dtypes(scheme), "x_scale": torch.float32, "input_order": torch.int32}
        if scheme.static_activations:
            shapes["x_scale"] = (1, 1) if merged else (1,)  # of experts, with the dimensions of a matrix
        if source.has_input_order:
            shapes["input_order"] = (source.in_features,)
        tensors = LayerTensors(tuple(shapes), source.read, self._lock)
        return {
            f"{prefix}.{name}": LazyTensor(shape, dtypes[name], partial(_shaped, tensors, name, shape))
            for name, shape in shapes.items()
        }

    def _float_weight(self, source: CheckpointLayer, target: _Target, name: str) -> LazyTensor:
        """A weight that the model has in float."""
        shape: tuple[int, ...] = (source.out_features, source.in_features)
        transposed = target.layer is not None and target.converter is None and target.layer.adapter.transposed
        if target.converter is None and name in self._expected and not transposed:
            shape = tuple(self._expected[name].shape)
        if target.reason is not None:
            self._notes[self._moved.get(name, name)] = target.reason

        def read() -> Tensor:
            weight = dequantize(source.read(), source.in_features, source.scheme)
            return weight.t().contiguous() if transposed else weight.reshape(shape)

        return LazyTensor(shape[::-1] if transposed else shape, torch.float32, self._locked(read))

    def _is_zero_bias(self, model: Any, key: str, read: Callable[[], Tensor]) -> bool:
        """Whether a tensor is a bias of zeros, which some writers add to layers that have none."""
        module, _, kind = key.rpartition(".")
        if kind != "bias" or module not in self.checkpoint.layers or self._rename(model, key)[0] in self._expected:
            return False
        if bool(read().any()):
            raise ValueError(f"{key} of the checkpoint is not zero, and {type(model).__name__} has no such bias")
        return True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        loaded = {id(layer.module) for layer in self._layers}
        super()._process_model_after_weight_loading(model, **kwargs)
        report = QuantizationReport(config.scheme, **config.layer_options)
        layers = find_weights(model)
        for layer in layers:
            quantized = id(layer.module) in loaded
            layer.reason = None if quantized else self._reason(layer)
        seen: set[int] = set()
        for layer, row in zip(layers, rows_of(layers), strict=True):
            if layer.reason is None:  # of a weight that is tied, the first counts
                sizes = (0, 0) if layer.weight_id() in seen else (_float_bytes(layer), row.bytes_after)
                note = self._details.get(layer.name) or None
                row = replace(row, bytes_before=sizes[0], bytes_after=sizes[1], note=note)
            seen.add(layer.weight_id())
            report.rows.append(row)
        report.warnings = _summaries(self.losses)
        for message in report.warnings:
            warnings.warn(message, stacklevel=2)
        config.layers = describe(model).get("layers", {})
        model.quantization_report = report
        self._targets, self._expected, self._checkpoint = {}, {}, None
        del self._lock  # the model holds its quantizer, and a lock cannot be copied with it

    def _reason(self, layer: Layer) -> str:
        names = layer.weight_names() if layer.key is None else layer.names
        return next((self._notes[name] for name in names if name in self._notes), IN_FLOAT)


def _module_name(target: _Target) -> str:
    assert target.layer is not None
    return target.layer.name


def _shaped(tensors: LayerTensors, name: str, shape: tuple[int, ...]) -> Tensor:
    return tensors.take(name).reshape(shape)


def _float_bytes(layer: Layer) -> int:
    assert isinstance(layer.module, Storage)
    return math.prod(layer.module.weight_shape) * layer.module.compute_dtype.itemsize


def _summaries(losses: Losses) -> list[str]:
    """One sentence for each kind of loss."""
    kinds: dict[str, list[Any]] = {}
    for loss in losses.entries:
        kinds.setdefault(loss.what, []).append(loss)
    return [
        f"{len(own)} tensors lost something: {sum(loss.changed for loss in own)} of {sum(loss.total for loss in own)} "
        f"{what} (largest change {max(loss.largest for loss in own):.2g} of the largest magnitude, in "
        f"{max(own, key=lambda loss: loss.largest).tensor})"
        for what, own in kinds.items()
    ]
