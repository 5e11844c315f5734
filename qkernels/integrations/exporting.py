"""`qkernels.export`: a model in memory to a file or folder in the format of any engine that we write."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from ..checkpoints.checkpoint_format import Progress, no_progress
from ..checkpoints.folder import files_beside
from ..checkpoints.losses import Loss, Losses, OnLoss
from ..checkpoints.registry import open_checkpoint, parse_target
from ..formats.storage import QuantizedWeight
from ..nn.adapters import SplitLayer
from ..nn.grouped_linear import GroupedLinear, QuantGroupedLinear
from ..nn.storage import Storage
from .folders import quantized_layers

_OF_EXPERTS = (GroupedLinear, QuantGroupedLinear)


def export(
    model: nn.Module,
    path: str | Path,
    to: str,
    *,
    tokenizer: Any = None,
    like: str | Path | None = None,
    on_loss: OnLoss = "refuse",
    progress: Progress = no_progress,
) -> list[Loss]:
    """Write a model in the format of another library or engine; `save_pretrained` writes ours.

    Quantized layers keep their integers where the format has a place for them, as the guide's table of formats says.

    Args:
        model: of transformers; layers of mode "qat" must be frozen (`freeze_`), a PEFT adapter merged
            (`merge_and_unload`).
        path: of the file or folder to write, which must not be there.
        to: a format by its name, or "NAME:TARGET", such as "gptq" or "float:bf16".
        tokenizer: of the model, written beside it.
        like: a checkpoint that the model came from, whose tokenizer and metadata are kept; without a `tokenizer`.
        on_loss: "refuse" what the format cannot hold exactly; "report" it; "requantize": also quantize weights again
            that the format has no integers for.
        progress: called after each tensor with how many are done, of how many, and its name.

    Returns:
        What was lost, one entry for each tensor that changed.

    Raises:
        TypeError: if `model` is none of transformers, or has an adapter that is not merged.
        ValueError: for an unknown format, or a layer that it has no place for; nothing is written.
        LossError: a ValueError, for what is not exact, by `on_loss`.
        FileExistsError: if something is at `path`.

    Example:
        >>> import tempfile, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> report = qk.quantize_(model, "w8a8")
        >>> folder = tempfile.mkdtemp()
        >>> qk.export(model, folder, "qkernels")
        []
        >>> qk.load(folder).lm_head.scheme.name
        'w8a8'
    """
    writer, target = parse_target(to)
    losses = Losses(on_loss)
    with checkpoint_of(model, tokenizer, like) as checkpoint:
        writer.write(checkpoint, Path(path), losses, target, progress)
        writer.warn_of_activations(checkpoint)
    return losses.entries


@contextmanager
def checkpoint_of(model: Any, tokenizer: Any = None, like: str | Path | None = None) -> Iterator[Checkpoint]:
    """A model in memory as a checkpoint, for as long as the context lasts; its tensors are those of the model.

    Args:
        model, tokenizer, like: as in `export`.

    Raises:
        TypeError, ValueError: as `export`.
    """
    _check(model)
    source = None if like is None else open_checkpoint(like, Losses("report"))
    layers, floats = _tensors(model)
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        elif source is not None:
            source.copy_files(Path(scratch))
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(scratch)
        metadata = {} if source is None else source.metadata
        yield Checkpoint("memory", _config(model), layers, floats, files_beside(Path(scratch)), metadata)


def _check(model: Any) -> None:
    from . import load as integration

    integration("transformers")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        hint = "; call merge_and_unload() first" if hasattr(model, "merge_and_unload") else ""
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}{hint}")
    for name, module in model.named_modules():
        if isinstance(module._modules.get("base_layer"), nn.Module):
            raise TypeError(f"model must have no adapter that is not merged, and {name} has one")
        if isinstance(module, SplitLayer) and not any(isinstance(part, _OF_EXPERTS) for part in module.children()):
            raise ValueError(
                f"{name} is a {module.float_type.__name__}, whose quantized weights only save_pretrained writes: leave "
                "it in float (skip)"
            )
    for name, module in quantized_layers(model).items():
        if module.mode == "qat":
            raise ValueError(f"{name} is in mode 'qat', with a float weight: call qkernels.freeze_(model) first")
        if len(module.scheme.storage_shapes(1, 1)["qweight"]) != 2 or hasattr(module, "kernel_size"):
            raise ValueError(f"{name} is a convolution, which only save_pretrained writes: leave it in float (skip)")


def _config(model: Any) -> dict[str, Any]:
    """What `save_pretrained` writes to config.json, without how the model is quantized."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    content = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in content.items() if key not in ("quantization_config", "_name_or_path")}


def _tensors(model: Any) -> tuple[dict[str, CheckpointLayer], dict[str, FloatTensor]]:
    """The quantized layers, and all other tensors, by the names that they have in a folder of transformers."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    from .transformers_experts import split_x_scales

    state = remove_tied_weights_from_state_dict(split_x_scales(model, model.state_dict()), model)
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):  # of experts of which others are quantized: what it was called before
            for suffix, before in ((".weight", ""), (".bias", "_bias")):
                if (tensor := state.pop(f"{name}{suffix}", None)) is not None:
                    state[f"{name}{before}"] = tensor
    modules: dict[str, Storage] = {}
    named: dict[str, Tensor] = {}
    # Each layer by itself, so that what it is called in a folder is known.
    for name, module in quantized_layers(model).items():
        own = {key: state.pop(key) for key in list(state) if key.rpartition(".")[0] == name}
        for key, tensor in revert_weight_conversion(model, own).items():
            named[key] = tensor
            modules[key.rpartition(".")[0]] = module
    named |= revert_weight_conversion(model, state)
    layers, parts = {}, set()
    for key in [key for key in named if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        layer, stored = _layer(name, modules[name], named)
        layers[layer.name] = layer
        parts |= stored
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    floats = {
        key: FloatTensor(tuple(tensor.shape), tensor.dtype, partial(_plain, tensor))
        for key, tensor in named.items()
        if key not in parts and key not in ignored
    }
    return layers, floats


def _layer(name: str, module: Storage, named: Mapping[str, Tensor]) -> tuple[CheckpointLayer, set[str]]:
    """A quantized layer, or the matrix of one expert; and the names of its tensors."""
    kinds = ("qweight", "scales", "zeros", "x_scale", "input_order")
    if named[f"{name}.qweight"].dim() != 2:
        raise ValueError(
            f"{name} has the experts of a layer in one tensor, which only save_pretrained writes: leave these layers "
            'in float (skip=["*.experts.*"])'
        )
    own = {kind: named[f"{name}.{kind}"] for kind in kinds if f"{name}.{kind}" in named}

    def read() -> LayerWeight:
        found = {kind: _plain(tensor) for kind, tensor in own.items()}
        weight = QuantizedWeight(found["qweight"], found["scales"], found.get("zeros"))
        x_scale = found.get("x_scale")
        return LayerWeight(weight, None if x_scale is None else x_scale.flatten()[:1], found.get("input_order"))

    layer = CheckpointLayer(
        name.removesuffix(".weight") if module.leading else name,
        module.in_features,
        own["qweight"].shape[0],
        module.scheme,
        "",
        tuple(f"{name}.{kind}" for kind in own),
        read,
        "input_order" in own,
    )
    return layer, set(layer.tensors)


def _plain(tensor: Tensor) -> Tensor:
    return torch.as_tensor(tensor.detach()).cpu().contiguous()
