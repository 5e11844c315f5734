"""transformers: `resize_token_embeddings` of a model whose embedding or head is quantized.

The method of transformers writes to float weights, and replaces layers one after another. It gets float layers with
the values of the quantized ones; what comes out is quantized again: the rows that stay keep their bits, new rows are
rounded to nearest. If it fails the model is as it was.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..formats.storage import QuantizedWeight
from ..kernels.quantizers import quantize_weight
from ..nn.adapters import adapter_of, float_twin, is_frozen
from ..nn.linear import stored_columns
from ..nn.storage import Storage
from .folders import layer_options_of

_original = PreTrainedModel.resize_token_embeddings


@functools.wraps(_original)
def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
    table, head = self.get_input_embeddings(), self.get_output_embeddings()
    if not any(isinstance(layer, Storage) for layer in (table, head)):
        return _original(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
    vocabulary, rows, padding = self.config.get_text_config().vocab_size, table.num_embeddings, table.padding_idx
    values = table.weight.data  # which transformers replaces in a float embedding
    tied = _storage(table) is not None and _storage(table) is _storage(head)
    try:
        self.tie_weights = lambda *args, **kwargs: None  # whose keys name quantized tensors
        before = _float_layer(table)
        self.set_input_embeddings(before)
        if head is not None:
            self.set_output_embeddings(_float_layer(head, before.weight if tied else None))
        _original(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        new_table, new_head = self.get_input_embeddings(), self.get_output_embeddings()
        if new_table.num_embeddings == rows:
            new_table, new_head = table, head
        else:
            new_table = _quantized_again(new_table, table)
            new_head = None if head is None else _quantized_again(new_head, head)
            if tied:
                new_head.set_weight(new_table.quantized_weight())
    except BaseException:
        _put(self, table, head)
        table.num_embeddings, table.padding_idx = rows, padding
        if not isinstance(table, Storage):
            table.weight.data = values
        self.config.get_text_config().vocab_size = self.vocab_size = vocabulary
        raise
    finally:
        del self.tie_weights
    _put(self, new_table, new_head)
    self.tie_weights()
    return self.get_input_embeddings()


def _put(model: PreTrainedModel, table: nn.Module, head: nn.Module | None) -> None:
    model.set_input_embeddings(table)
    if head is not None:
        model.set_output_embeddings(head)


def _storage(layer: nn.Module | None) -> torch.Tensor | None:
    return layer.qweight if is_frozen(layer) else None


def _float_layer(layer: nn.Module, weight: nn.Parameter | None = None) -> nn.Module:
    """A float layer with the values of a quantized one, which is left alone; another layer itself.

    Args:
        weight: the parameter that the result shares with the embedding.
    """
    if not isinstance(layer, Storage):
        return layer
    if weight is None:
        weight = nn.Parameter(layer.dequantize().to(layer.compute_dtype), requires_grad=layer.mode != "frozen")
    return float_twin(layer, weight, plain=True)


def _quantized_again(resized: nn.Module, layer: nn.Module) -> nn.Module:
    """The resized float layer, quantized as `layer` is, with the rows of `layer` that are left."""
    if not isinstance(layer, Storage):
        return resized
    adapter = adapter_of(resized)
    options = {} if adapter.lookup else layer_options_of(layer)
    if layer.mode != "frozen":
        return adapter.quantize(resized, layer.scheme, **options).train(layer.training)
    kept = min(len(resized.weight), layer.out_features)
    added = quantize_weight(stored_columns(layer, resized.weight.detach()[kept:]), layer.scheme)
    pairs = zip(layer.quantized_weight(), added, strict=True)
    weight = QuantizedWeight(*(None if old is None else torch.cat([old[:kept], new]) for old, new in pairs))
    new = adapter.empty(resized, layer.scheme, dtype=layer.compute_dtype, **options)
    new.float_type = layer.float_type
    if adapter.lookup:
        new.embed_scale = layer.embed_scale
    else:
        new.bias = resized.bias
    new.set_weight(weight)
    new._order_input(layer._buffers.get("input_order"))
    return new.train(layer.training)


PreTrainedModel.resize_token_embeddings = resize_token_embeddings
