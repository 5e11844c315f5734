"""`Layer`: a linear layer or embedding in a model, its row of the report, and how it becomes a quantized one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..nn.embedding import QuantEmbedding
from ..nn.linear import QuantLinear, float_weight, is_conv1d, relative_error
from ..ptq import gptq
from ..ptq.inputs import InputStatistics
from .leftover import is_matrix
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

    def weight_id(self) -> int:
        """Equal for two layers that share their weight."""
        for name in (self.key or "weight", "qweight"):
            tensor = self.module._parameters.get(name, self.module._buffers.get(name))
            if tensor is not None:
                return id(tensor)
        return id(self.module)

    def row(self) -> LayerReport:
        """The report's row for the layer as it is."""
        module, scheme = self.module, None
        if self.key is not None:
            weight = module._parameters[self.key]
            shape, size = tuple(weight.shape), weight.numel() * weight.element_size()
        elif isinstance(module, QuantLinear):
            shape, size, scheme = (module.out_features, module.in_features), module.storage_bytes(), module.scheme.name
        elif isinstance(module, nn.Embedding):
            shape, size = (module.num_embeddings, module.embedding_dim), _weight_bytes(module)
            if isinstance(module, QuantEmbedding):
                size, scheme = module.storage_bytes(), module.scheme.name
        elif is_conv1d(module):
            shape, size = (module.nf, module.nx), _weight_bytes(module)
        else:
            shape, size = (module.out_features, module.in_features), _weight_bytes(module)
        return LayerReport(self.name, type(module).__name__, shape, scheme, size, size, reason=self.reason)

    def convert(self, layer_options: Mapping[str, str], statistics: InputStatistics | None = None) -> LayerReport:
        """Put a `QuantLinear` in the layer's place, let go of the float layer, and return the row.

        Args:
            layer_options: the keywords mode, grad_dtype and weight_scale of `QuantLinear`.
            statistics: of the layer's inputs, for calibration; see `gptq.quantize_weight`.
        """
        before, weight, scheme = self.row(), _weight(self.module), self.scheme
        owner = next((layer for layer in self.tied if layer.converted is not None), None)
        if owner is not None:
            self.replace(self._on_storage_of(owner.module, layer_options))
            sizes, error = (0, 0), owner.converted.weight_error
        else:
            if isinstance(self.module, nn.Embedding):
                quantized = QuantEmbedding.from_float(self.module, scheme)
            else:
                quantized = QuantLinear.from_float(self.module, scheme, **layer_options)
            if statistics is not None:
                quantized.set_weight(gptq.quantize_weight(weight, scheme, statistics))
            error = relative_error(weight, quantized)
            self.replace(quantized)
            sizes = (before.bytes_before, quantized.storage_bytes())
        self.converted = LayerReport(self.name, before.kind, before.shape, scheme.name, *sizes, error)
        return self.converted

    def _on_storage_of(
        self, owner: QuantLinear | QuantEmbedding, layer_options: Mapping[str, str]
    ) -> QuantLinear | QuantEmbedding:
        """A quantized twin of this layer that shares the parameters of `owner`."""
        if isinstance(self.module, nn.Embedding):
            twin = QuantEmbedding.like(self.module, owner.scheme)
        else:
            out_features, in_features = self.module.weight.shape
            like = {"device": "meta", "dtype": self.module.weight.dtype}
            twin = QuantLinear(in_features, out_features, False, owner.scheme, **layer_options, **like)
            twin.bias = self.module.bias
        twin.set_weight(QuantizedWeight(owner.qweight, owner.scales, owner.zeros))
        return twin

    def replace(self, quantized: QuantLinear | QuantEmbedding) -> None:
        """Register `quantized` wherever the layer is, with the layer's hooks and instance attributes."""
        own = vars(quantized)
        for key, value in vars(self.module).items():
            is_hook = key.startswith(("_forward", "_backward", "_is_full_backward"))
            if is_hook or (key not in own and key != "_compiled_call_impl"):
                own[key] = value
        if not isinstance(quantized, QuantEmbedding):  # whose number it holds itself
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


def _weight(module: nn.Module) -> Tensor:
    """The weight [N, K] of a float layer, detached."""
    return module.weight.detach() if isinstance(module, nn.Embedding) else float_weight(module)


def _weight_bytes(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    parts = [weight] if weight is not None else filter(is_matrix, module.parameters())  # a parametrized weight's
    return sum(part.numel() * part.element_size() for part in parts if not nn.parameter.is_lazy(part))
