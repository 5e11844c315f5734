"""`dequantize_`: the way back from quantized layers to float ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..formats.storage import FLOAT_DTYPES
from ..nn.adapters import SplitLayer, adapter_of, find_composite, float_twin, is_frozen
from ..nn.embedding import QuantEmbedding
from ..nn.grouped_linear import QuantGroupedLinear
from ..nn.linear import QuantLinear
from ..nn.masks import make_permanent
from ..nn.storage import Storage
from ..ptq.observers import remove_watch
from .layers import move_attributes, put_in_place
from .selection import find_layers

# Called as f(model) after each `dequantize_`; an integration adds its own when its library is imported.
AFTER_DEQUANTIZE: list[Callable[[nn.Module], None]] = []


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put float layers in the place of every quantized layer of `model`, in place.

    A float layer is of the class that was quantized and has the weight that is multiplied now, rounded to its dtype:
    the model's outputs change by the rounding of activations and of that dtype, and what the quantization cost stays
    lost. Weights that were shared stay shared, and layers of several weights (attention, experts) are whole again. A
    transformers model forgets that it was quantized: the folder that `save_pretrained` writes needs no qkernels. A
    model that `prepare_` has prepared observes no more.

    >>> import torch, qkernels as qk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = qk.quantize_(model, "w8a8")
    >>> qk.dequantize_(model)
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )

    Args:
        model: the module that contains the layers.
        dtype: of the float weights; None: each layer's `compute_dtype`. Biases and all else keep theirs.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is itself a quantized layer, or `dtype` is not float32, bfloat16 or float16.
        ValueError: if a quantized layer has PEFT adapters. The model is then as it was.
    """
    if isinstance(model, Storage):
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place; use its dequantize()"
        )
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    layers = [layer for layer in find_layers(model, embeddings=True) if layer.is_quantized]
    adapted = {  # whose experts have adapters
        id(module._modules["base_layer"]) for module in model.modules() if "base_layer" in module._modules
    }
    for layer in layers:
        holders = {id(module) for module, key in layer.slots}
        if any(key == "base_layer" for _, key in layer.slots) or holders & adapted:
            raise ValueError(
                f"{layer.name} has PEFT adapters: call merge_and_unload() or unload() first; nothing was changed"
            )
    for module in model.modules():
        remove_watch(module)
    weights: dict[int, nn.Parameter] = {}  # by id of the storage
    held: dict[tuple[Any, ...], nn.Parameter] = {}  # the same, as the float layers hold it
    for layer in layers:
        quantized = layer.module
        assert isinstance(quantized, Storage)
        shared = id(quantized.qweight) if is_frozen(quantized) else id(quantized)
        if quantized.mode == "qat":
            make_permanent(quantized)  # what a mask made 0 stays 0 until it is trained
        if shared not in weights:
            values = quantized.dequantize().to(dtype or quantized.compute_dtype)
            weights[shared] = nn.Parameter(values)
        replacement = float_twin(quantized, weights[shared])
        adapter = adapter_of(replacement)
        own = replacement.get_parameter(adapter.key)
        setattr(replacement, adapter.key, held.setdefault((shared, adapter.transposed, own.shape), own))
        move_attributes(quantized, replacement, but=_attributes())
        put_in_place(replacement, quantized, layer.slots)
    _join_split_layers(model)
    for callback in AFTER_DEQUANTIZE:
        callback(model)
    return model


def _join_split_layers(model: nn.Module) -> None:
    """Put float layers of several weights in the place of their twins, all of whose layers are in float again."""
    joined: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if not isinstance(child, SplitLayer):
                continue
            if id(child) not in joined:
                adapter = find_composite(child.float_type)
                if adapter is None:
                    raise TypeError(f"no layer adapter knows {child.float_type.__name__}, which was split")
                whole = adapter.join(child, child.float_type)
                move_attributes(child, whole, but=("float_type",))
                joined[id(child)] = whole.train(child.training)
            parent._modules[key] = joined[id(child)]


@functools.cache
def _attributes() -> set[str]:
    """Instance attributes of the quantized layers, which a float layer does not have."""
    kinds = (functools.partial(QuantGroupedLinear, 1), QuantLinear, QuantEmbedding)
    layers = [kind(1, 1, device="meta", dtype=torch.float32) for kind in kinds]
    return {"float_type"}.union(*map(vars, layers))
