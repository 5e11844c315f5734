"""The adapters of `nn.Linear`, transformers' `Conv1D`, `nn.Embedding`, and of quantized layers themselves."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES
from .adapters import LayerAdapter, register_adapter, replaced_forward
from .embedding import QuantEmbedding
from .linear import QuantLinear
from .storage import Storage

# How the reason of a quantized layer to stay as it is begins.
QUANTIZED = "already quantized"


class LinearAdapter(LayerAdapter[nn.Module]):
    """The adapter of layers that compute `x @ weight.T + bias`: `nn.Linear`, and what is registered with it.

    Attributes:
        features: names of the attributes N and K of a layer.
    """

    features: tuple[str, str] = ("out_features", "in_features")
    static_activations = True

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        weight = layer._parameters.get(self.key)
        if weight is None or nn.parameter.is_lazy(weight):  # computed, or not known yet
            return tuple(getattr(layer, name, 0) for name in self.features)
        return super().shape(layer)

    def quantize(self, layer: nn.Module, scheme: str | QuantScheme, **layer_options: Any) -> QuantLinear:
        return QuantLinear.from_float(layer, scheme, **layer_options)

    def empty(
        self, layer: nn.Module, scheme: str | QuantScheme, *, dtype: torch.dtype | None = None, **layer_options: str
    ) -> QuantLinear:
        out_features, in_features = self.shape(layer)
        bias, dtype = self.bias(layer) is not None, dtype or self.dtype(layer)
        return QuantLinear(in_features, out_features, bias, scheme, device="meta", dtype=dtype, **layer_options)

    def to_float(self, quantized: Storage, weight: nn.Parameter, float_type: type[nn.Module]) -> nn.Module:
        """A layer that was not constructed: what it needs beside weight, bias and `features` is copied to it later."""
        layer = float_type.__new__(float_type)
        nn.Module.__init__(layer)
        for name, size in zip(self.features, weight.shape, strict=True):
            setattr(layer, name, size)
        if self.transposed:
            weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        layer.register_parameter(self.key, weight)
        layer.register_parameter("bias", cast("nn.Parameter | None", quantized.bias))
        return layer.train(quantized.training)


class _Conv1DAdapter(LinearAdapter):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored as [K, N]."""

    transposed, features = True, ("nf", "nx")


class EmbeddingAdapter(LayerAdapter[nn.Embedding]):
    """The adapter of `nn.Embedding`, also of transformers' that multiply its rows by a number."""

    lookup = True

    def shape(self, layer: nn.Embedding) -> tuple[int, ...]:
        return layer.num_embeddings, layer.embedding_dim

    def reason(self, layer: nn.Embedding, scheme: QuantScheme) -> str | None:
        if not _only_looks_up(type(layer)):
            return f"{type(layer).__name__} is a subclass of nn.Embedding"
        if parametrize.is_parametrized(layer) or set(layer._parameters) != {self.key}:
            return "parametrized weight"
        if (reason := replaced_forward(layer)) is not None:
            return reason
        if layer.max_norm is not None:
            return "max_norm changes the weight"
        if layer.weight.dtype not in FLOAT_DTYPES:
            return f"{layer.weight.dtype} weight"
        return "no columns" if layer.embedding_dim == 0 else None

    def quantize(self, layer: nn.Embedding, scheme: str | QuantScheme, **layer_options: Any) -> QuantEmbedding:
        return QuantEmbedding.from_float(layer, scheme)

    def empty(
        self, layer: nn.Embedding, scheme: str | QuantScheme, *, dtype: torch.dtype | None = None, **layer_options: str
    ) -> QuantEmbedding:
        return QuantEmbedding.like(layer, scheme)

    def to_float(self, quantized: Storage, weight: nn.Parameter, float_type: type[nn.Module]) -> nn.Module:
        assert isinstance(quantized, QuantEmbedding)
        scale = () if quantized.embed_scale is None or float_type is nn.Embedding else (quantized.embed_scale,)
        with torch.device("meta"):
            layer = float_type(*weight.shape, quantized.padding_idx, *scale)
        if "embed_scale" in layer._buffers:
            layer.embed_scale = torch.tensor(quantized.embed_scale, device=weight.device)
        layer.weight = weight
        return layer.train(quantized.training)


class QuantizedAdapter(LayerAdapter[Storage]):
    """The adapter of layers that are quantized already: they say what they are, and stay so."""

    def __init__(self, *, lookup: bool, measured: bool = True) -> None:
        self.lookup, self.measured = lookup, measured

    def weight(self, layer: Storage) -> Tensor:
        return layer.dequantize().to(layer.compute_dtype)

    def shape(self, layer: Storage) -> tuple[int, ...]:
        return layer.weight_shape

    def dtype(self, layer: Storage) -> torch.dtype:
        return layer.compute_dtype

    def weight_bytes(self, layer: Storage) -> int:
        return layer.storage_bytes()

    def scheme(self, layer: Storage) -> QuantScheme | None:
        return layer.scheme

    def reason(self, layer: Storage, scheme: QuantScheme) -> str | None:
        return f"{QUANTIZED} ({layer.scheme}, {layer.mode})"

    def quantize(self, layer: Storage, scheme: str | QuantScheme, **layer_options: Any) -> Storage:
        raise TypeError(f"layer is quantized already: {layer}")

    def empty(
        self, layer: Storage, scheme: str | QuantScheme, *, dtype: torch.dtype | None = None, **layer_options: str
    ) -> Storage:
        raise TypeError(f"layer is quantized already: {layer}")

    def to_float(self, quantized: Storage, weight: nn.Parameter, float_type: type[nn.Module]) -> nn.Module:
        raise TypeError(f"float_type must be the class of a float layer, got {float_type.__name__}")


def _only_looks_up(layer_type: type) -> bool:
    """True for `nn.Embedding` and transformers' embeddings that multiply it by a number (`...ScaledWordEmbedding`)."""
    module, name = layer_type.__module__, layer_type.__name__
    scaled = module.startswith("transformers.models.") and name.endswith("ScaledWordEmbedding")
    return scaled or layer_type is nn.Embedding


register_adapter(nn.Linear, LinearAdapter())
# Its forward is written out: x @ weight.T + bias.
register_adapter("transformers.models.falcon.modeling_falcon.FalconLinear", LinearAdapter())
register_adapter("transformers.pytorch_utils.Conv1D", _Conv1DAdapter())
register_adapter(nn.Embedding, EmbeddingAdapter())
register_adapter(QuantLinear, QuantizedAdapter(lookup=False))
register_adapter(QuantEmbedding, QuantizedAdapter(lookup=True))
