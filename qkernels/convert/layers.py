"""`Layer`: a linear layer or embedding in a model, its row of the report, and how it becomes a quantized one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..nn.adapters import LayerAdapter, adapter_of
from ..nn.linear import relative_error
from ..nn.storage import Storage
from ..ptq import gptq
from ..ptq.inputs import InputStatistics
from .report import LayerReport


@dataclass
class Layer:
    """A linear layer or embedding found in a model, every place it is registered at, and why it stays if it does.

    Or another matrix weight: the parameter `key` of `module`, which always stays.
    """

    names: list[str]
    module: nn.Module
    slots: list[tuple[nn.Module, str]]  # (parent, name in the parent)
    reason: str | None = None
    scheme: QuantScheme | None = None  # what it will be quantized to
    tied: list[Layer] = field(default_factory=list)  # all layers of its weight, which will share one storage
    converted: LayerReport | None = None
    key: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]

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

    def weights(self) -> list[Tensor]:
        """The weights of a float layer that has an adapter, detached."""
        return list(self.adapter.weights(self.module).values())

    def weight_id(self) -> int:
        """Equal for two layers that share their weight."""
        for name in (self.key or self.adapter.key, "qweight"):
            tensor = self.module._parameters.get(name, self.module._buffers.get(name))
            if tensor is not None:
                return id(tensor)
        return id(self.module)

    def row(self) -> LayerReport:
        """The report's row for the layer as it is."""
        module, kind = self.module, type(self.module).__name__
        if self.key is not None:
            weight = module.get_parameter(self.key)
            size = weight.numel() * weight.element_size()
            return LayerReport(self.name, kind, tuple(weight.shape), None, size, size, reason=self.reason)
        shape, size = self.adapter.shape(module), self.adapter.weight_bytes(module)
        scheme = self.adapter.scheme(module)
        name = None if scheme is None else scheme.name
        return LayerReport(self.name, kind, shape, name, size, size, reason=self.reason)

    def convert(self, layer_options: Mapping[str, str], statistics: InputStatistics | None = None) -> LayerReport:
        """Put a quantized layer in the layer's place, let go of the float layer, and return the row.

        Args:
            layer_options: the keywords mode, grad_dtype and weight_scale of `QuantLinear`.
            statistics: of the layer's inputs, for calibration; see `gptq.quantize_weight`.
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
                self.replace(quantized)
                sizes, error = (0, 0), layer.converted.weight_error
                break
        else:
            weight, quantized = adapter.weight(self.module), adapter.quantize(self.module, scheme, **layer_options)
            if statistics is not None:
                quantized.set_weight(gptq.quantize_weight(weight, scheme, statistics))
            error = relative_error(weight, quantized)
            self.replace(quantized)
            sizes = (before.bytes_before, quantized.storage_bytes())
        self.converted = LayerReport(self.name, before.kind, before.shape, scheme.name, *sizes, error)
        return self.converted

    def replace(self, quantized: Storage) -> None:
        """Register `quantized` wherever the layer is, with the layer's hooks and instance attributes."""
        own = vars(quantized)
        for key, value in vars(self.module).items():
            is_hook = key.startswith(("_forward", "_backward", "_is_full_backward"))
            if is_hook or (key not in own and key != "_compiled_call_impl"):
                own[key] = value
        if not self.is_lookup:  # a quantized embedding holds the number in the buffer itself
            quantized._buffers.update(self.module._buffers)
        quantized.train(self.module.training)
        quantized.float_type = type(self.module)
        for parent, key in self.slots:
            setattr(parent, key, quantized)
        self.module = quantized


def rows_of(layers: Iterable[Layer]) -> list[LayerReport]:
    """The report's rows of layers that were converted or stay; a weight that several of them share counts once."""
    seen: set[int] = set()
    rows = []
    for layer in layers:
        row, shared = layer.converted or layer.row(), layer.weight_id() in seen
        seen.add(layer.weight_id())
        rows.append(replace(row, bytes_before=0, bytes_after=0) if shared and row.reason is not None else row)
    return rows
