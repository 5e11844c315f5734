"""`Layer`: a linear layer or embedding in a model, its row of the report, and how it becomes a quantized one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..nn.adapters import CompositeAdapter, LayerAdapter, SplitLayer, adapter_of
from ..nn.linear import relative_error
from ..nn.masks import Pruning, find_pruning, move_hooks
from ..nn.storage import Storage
from ..ptq import gptq
from ..ptq.inputs import InputStatistics
from ..ptq.observers import Observer
from .report import LayerReport


@dataclass
class Split:
    """A layer of several weights, its twin of layers of one weight each, and every place the layer is registered at."""

    layer: nn.Module
    twin: SplitLayer
    slots: list[tuple[nn.Module, str]] = field(default_factory=list)  # (parent, name in the parent)
    in_place: bool = False  # the twin has taken the place of the layer

    @classmethod
    def of(cls, layer: nn.Module, adapter: CompositeAdapter[Any]) -> Split:
        twin, old = adapter.split(layer), {id(module) for module in layer.modules()}
        twin.float_type = type(layer)
        for module in twin.modules():
            if id(module) not in old:
                module.training = layer.training
        return cls(layer, twin)

    def parameter_name(self, parameter: Tensor | None) -> str | None:
        """The name that a parameter of the twin has in the layer; None: the layer has no such parameter."""
        return next((name for name, own in self.layer.named_parameters() if own is parameter), None)

    def new_names(self) -> dict[str, str]:
        """By the name of a parameter of the layer, its name in the twin."""
        names = {id(parameter): name for name, parameter in self.twin.named_parameters()}
        return {name: names[id(own)] for name, own in self.layer.named_parameters() if id(own) in names}

    def enter(self) -> None:
        """Put the twin in the layer's place, with the layer's hooks and instance attributes."""
        if not self.in_place:
            move_attributes(self.layer, self.twin)
            put_in_place(self.twin, self.layer, self.slots)
            self.in_place = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let calls of the layer run the twin, whose layers can be watched; the model is not changed otherwise."""
        move_attributes(self.layer, self.twin)
        self.layer.forward = self.twin.forward
        try:
            yield
        finally:
            del self.layer.forward


@dataclass
class Layer:
    """A linear layer or embedding found in a model, every place it is registered at, and why it stays if it does.

    Or one weight of a layer of several (`split`), in whose twin `module` is a layer of its own; or another matrix
    weight: the parameter `key` of `module`, which always stays.
    """

    names: list[str]
    module: nn.Module
    slots: list[tuple[nn.Module, str]]  # (parent, name in the parent)
    reason: str | None = None
    scheme: QuantScheme | None = None  # what it will be quantized to
    tied: list[Layer] = field(default_factory=list)  # all layers of its weight, which will share one storage
    converted: LayerReport | None = None
    key: str | None = None
    split: Split | None = None
    aliases: list[str] = field(default_factory=list)  # names by which only patterns find it

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def all_names(self) -> list[str]:
        """The names by which patterns find it."""
        return [*self.names, *self.aliases]

    @property
    def owner(self) -> nn.Module:
        """The module of the model that holds the weight."""
        return self.module if self.split is None or self.split.in_place else self.split.layer

    def parameter(self) -> tuple[nn.Module, str]:
        """The module that holds the weight in the model as it is, and the weight's name there."""
        if self.key is not None:
            return self.module, self.key
        key = self.adapter.key
        if self.split is None or self.split.in_place:
            return self.module, key
        if (name := self.split.parameter_name(self.module._parameters.get(key))) is None:
            return self.module, key
        path, _, key = name.rpartition(".")
        return self.split.layer.get_submodule(path), key

    def weight_names(self) -> list[str]:
        """The full names of the weight's parameter in the model as it is."""
        if self.split is None or self.split.in_place:
            return [f"{name}.{self.parameter()[1]}" for name in self.names]
        return self.aliases[::2]

    @property
    def adapter(self) -> LayerAdapter[Any]:
        """What is known of the layer's class; a matrix weight of another kind has none."""
        return adapter_of(self.module)

    @property
    def is_lookup(self) -> bool:
        """Whether it is an embedding."""
        return self.key is None and self.adapter.lookup

    @property
    def is_quantized(self) -> bool:
        return self.key is None and self.adapter.scheme(self.module) is not None

    def weight(self) -> Tensor:
        """The weight of a float layer that has an adapter, detached."""
        return self.adapter.weight(self.module)

    def weight_id(self) -> int:
        """Equal for two layers that share their weight."""
        for name in (self.key or self.adapter.key, "qweight"):
            tensor = self.module._parameters.get(name, self.module._buffers.get(name))
            if tensor is not None:
                return id(tensor)
        return id(self.module)

    def row(self) -> LayerReport:
        """The report's row for the layer as it is."""
        module = self.module
        kind = type(module if self.split is None else self.split.layer).__name__
        if self.key is not None:
            weight = module.get_parameter(self.key)
            size = weight.numel() * weight.element_size()
            return LayerReport(self.name, kind, tuple(weight.shape), None, size, size, reason=self.reason)
        shape, size = self.adapter.shape(module), self.adapter.weight_bytes(module)
        scheme = self.adapter.scheme(module)
        name = None if scheme is None else scheme.name
        return LayerReport(self.name, kind, shape, name, size, size, reason=self.reason)

    def convert(
        self,
        layer_options: Mapping[str, str],
        statistics: InputStatistics | None = None,
        observer: Observer | None = None,
    ) -> LayerReport:
        """Put a quantized layer in the layer's place, let go of the float layer, and return the row.

        Args:
            layer_options: the keywords mode, grad_dtype and weight_scale of `QuantLinear`.
            statistics: of the layer's inputs, for calibration; see `gptq.quantize_weight`.
            observer: what has seen the inputs of a layer whose scheme has static activations.
        """
        before, adapter, scheme = self.row(), self.adapter, self.scheme
        assert scheme is not None, "select_layers gives a layer its scheme"
        for layer in self.tied:
            if (owner := layer.module) is not self.module and isinstance(owner, Storage):
                assert layer.converted is not None
                quantized = adapter.empty(self.module, scheme, dtype=None, **layer_options)
                quantized.set_weight(QuantizedWeight(owner.qweight, owner.scales, owner.zeros))
                if (bias := adapter.bias(self.module)) is not None:
                    quantized.bias = bias
                if observer is not None:
                    quantized.set_x_scale(observer.scale())
                self.replace(quantized)
                sizes, error, note = (0, 0), layer.converted.weight_error, layer.converted.note
                break
        else:
            if self.weight().is_meta:
                return self._convert_without_values(before, layer_options)
            options = {**layer_options, **({} if observer is None else {"x_scale": observer.scale()})}
            weight, quantized = adapter.weight(self.module), adapter.quantize(self.module, scheme, **options)
            if statistics is not None:
                quantized.set_weight(gptq.quantize_weight(weight, scheme, statistics))
            error, note = relative_error(weight, quantized), self._note(layer_options["mode"])
            self.replace(quantized)
            sizes = (before.bytes_before, quantized.storage_bytes())
        self.converted = LayerReport(self.name, before.kind, before.shape, scheme.name, *sizes, error, note=note)
        if observer is not None:
            x_scale, clipped = observer.scale().item(), observer.clipped_share()
            seen = f"x_scale {x_scale:.4g}, {100 * clipped:.3g} % of its inputs clipped"
            note = seen if note is None else f"{note}; {seen}"
            self.converted = replace(self.converted, note=note, x_scale=x_scale, clipped_share=clipped)
        return self.converted

    def _convert_without_values(self, before: LayerReport, layer_options: Mapping[str, str]) -> LayerReport:
        """Convert a layer on the meta device, into which a quantized state dict will be loaded."""
        assert self.scheme is not None
        quantized = self.adapter.empty(self.module, self.scheme, dtype=None, **layer_options)
        if (bias := self.adapter.bias(self.module)) is not None:
            quantized.bias = bias
        if (scales := quantized._buffers.get("column_scales")) is not None:  # derived from the weight, and in no file
            quantized.column_scales = torch.zeros_like(scales, device="cpu")
        self.replace(quantized)
        sizes, note = (before.bytes_before, quantized.storage_bytes()), "without values: on the meta device"
        self.converted = LayerReport(self.name, before.kind, before.shape, self.scheme.name, *sizes, note=note)
        return self.converted

    def pruning(self) -> Pruning | None:
        """How the layer is pruned, by a mask that is there; None: it is not."""
        return None if self.key is not None else find_pruning(self.module, self.adapter.key)

    def _note(self, mode: str) -> str | None:
        """What the report says of a pruned layer, and of one whose parent had a fast path for float weights."""
        notes = []
        if (pruning := self.pruning()) is not None:
            zeros = 100 * (1 - pruning.mask.count_nonzero().item() / max(pruning.mask.numel(), 1))
            notes.append(f"pruned: {zeros:.1f} % zeros stay" + (", also in training" if mode != "frozen" else ""))
        parents = [parent for parent, _ in self.slots + ([] if self.split is None else self.split.slots)]
        for kind in (nn.TransformerEncoderLayer, nn.MultiheadAttention):
            if any(isinstance(parent, kind) for parent in parents):
                notes.append(f"nn.{kind.__name__}'s fast path is off: it reads floats")
                break
        return "; ".join(notes) or None

    def replace(self, quantized: Storage) -> None:
        """Register `quantized` wherever the layer is, with the layer's hooks and instance attributes."""
        if self.split is not None:
            self.split.enter()
        pruned = self.pruning() is not None
        if pruned:
            move_hooks(self.module, quantized, self.adapter.key)
        move_attributes(self.module, quantized, but=[self.adapter.key] if pruned else [])
        if not self.is_lookup:  # a quantized embedding holds the number in the buffer itself
            mask = f"{self.adapter.key}_mask" if pruned else None  # the quantized layer has its own, if it needs one
            quantized._buffers.update({key: value for key, value in self.module._buffers.items() if key != mask})
        quantized.train(self.module.training)
        quantized.float_type = parametrize.type_before_parametrizations(self.module)
        put_in_place(quantized, self.module, self.slots)
        self.module = quantized


def put_in_place(new: nn.Module, old: nn.Module, slots: Iterable[tuple[nn.Module, str]]) -> None:
    """Register a module in the place of another, also in plain lists of the parent, which some call instead.

    Args:
        slots: each parent, and the module's name in it.
    """
    for parent, key in slots:
        setattr(parent, key, new)
        for held in vars(parent).values():
            if isinstance(held, list):
                held[:] = [new if item is old else item for item in held]


def move_attributes(module: nn.Module, replacement: nn.Module, *, but: Iterable[str] = ()) -> None:
    """Give a module's hooks and instance attributes to what takes its place, but for those that this has.

    Args:
        but: names of attributes that stay behind.
    """
    own, left = vars(replacement), {"_compiled_call_impl", *but}
    for key, value in vars(module).items():
        is_hook = key.startswith(("_forward", "_backward", "_is_full_backward"))
        if is_hook or (key not in own and key not in left):
            own[key] = value


def rows_of(layers: Iterable[Layer]) -> list[LayerReport]:
    """The report's rows of layers that were converted or stay; a weight that several of them share counts once."""
    seen: set[int] = set()
    rows = []
    for layer in layers:
        row, shared = layer.converted or layer.row(), layer.weight_id() in seen
        seen.add(layer.weight_id())
        rows.append(replace(row, bytes_before=0, bytes_after=0) if shared and row.reason is not None else row)
    return rows
