"""What model a GGUF file holds: its config, where each tensor belongs, and how its values were changed.

The tables are those of transformers (`transformers.modeling_gguf_pytorch_utils`) and of the package gguf
(`TensorNameMap`): a file is read here if both know its architecture.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .gguf_file import GGUFFile, GGUFTensor, Written, write_gguf

_ARCHITECTURE = "general.architecture"
_MOST_ELEMENTS = 4096  # of an array that a config may want; a vocabulary has more
# What transformers does not read of every architecture that has it.
_UNREAD = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
_EXPERTS = re.compile(r"(?P<block>.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(?P<block>.*\.mlp\.experts)\.\d+\.(?P<part>\w+)\.weight")
_EXPERT_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# Of the pairs of an architecture, what says how positions are scaled: transformers reads none of it.
_SCALING = {"linear": ("factor",), "yarn": ("factor", "original_context_length")}


def _encode(key: str, kind: int, value: bytes) -> bytes:
    name = key.encode("utf-8")
    return len(name).to_bytes(8, "little") + name + kind.to_bytes(4, "little") + value


def pairs_of(file: GGUFFile, changed: dict[str, int] | None = None, most_elements: int | None = None) -> list[bytes]:
    """The key-value pairs of a file, encoded.

    Args:
        changed: numbers (uint32) that take the place of those of the file, or are added.
        most_elements: of an array that is not left out; None: all are there.
    """
    changed, out = dict(changed or {}), []
    with file.path.open("rb") as stream:
        for key, value in file.metadata.items():
            if key in changed:
                out.append(_encode(key, 4, changed.pop(key).to_bytes(4, "little")))
            elif most_elements is None or value.element < 0 or int(value.value) <= most_elements:
                stream.seek(value.begin)
                out.append(_encode(key, value.kind, stream.read(value.end - value.begin)))
    out += [_encode(key, 4, number.to_bytes(4, "little")) for key, number in changed.items()]
    return out


def _quietly_load(path: Path) -> dict[str, Any]:
    """The config that transformers reads from a GGUF file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    return dict(load_gguf_checkpoint(str(path), return_tensors=False)["config"])


def _read_config(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The config as transformers reads it: of a file with the same header, but for the vocabulary and the data."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError("it has no token_embd.weight")
    vocabulary = {f"{architecture}.vocab_size": embedding.shape[0]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.path.name
        pairs = pairs_of(file, vocabulary, _MOST_ELEMENTS)
        tensors = [Written(name, (1,), "F32", lambda: iter((torch.zeros(1),))) for name in file.tensors]
        for _ in write_gguf(path, b"".join(pairs), len(pairs), tensors, file.alignment):
            pass
        config = _quietly_load(path)
    config["vocab_size"] = embedding.shape[0]
    for key, name in _UNREAD.items():
        if (number := file.value(f"{architecture}.{key}")) is not None:
            config[name] = number
    config |= _rope(file, architecture, config)
    return config


def _rope(file: GGUFFile, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a file says of scaled positions; empty if they are not scaled.

    Raises:
        ValueError: for a kind of scaling that is not read.
    """
    prefix = f"{architecture}.rope.scaling."
    kind = file.value(prefix + "type")
    if "rope_scaling" in config:
        return {}
    theta = config.get("rope_theta", 10000.0)
    if kind in (None, "none", "") or (kind == "linear" and file.value(prefix + "factor") in (None, 1.0)):
        factors = file.tensors.get("rope_freqs.weight")
        return {} if factors is None else {"rope_parameters": {"rope_theta": theta, **_llama3(file, factors, theta)}}
    if kind not in _SCALING:
        raise ValueError(f"it scales positions by {kind!r}, which is not read")
    found = {name: file.value(prefix + name) for name in _SCALING[str(kind)]}
    if None in found.values():
        raise ValueError(f"it scales positions by {kind!r} and does not say {', '.join(found)}")
    out = {"rope_type": kind, "factor": found["factor"], "rope_theta": theta}
    if "original_context_length" in found:
        out["original_max_position_embeddings"] = found["original_context_length"]
    return {"rope_parameters": out}


def _llama3(file: GGUFFile, tensor: GGUFTensor, theta: float) -> dict[str, Any]:
    """The parameters of Llama 3 that give these factors of its frequencies, which are all that the file has of them.

    Raises:
        ValueError: if the usual ones do not.
    """
    if tensor.kind != "F32":
        raise ValueError(f"rope_freqs.weight must be F32, got {tensor.kind}")
    factors = file.bytes_of(tensor).view(torch.float32).flatten().to(torch.float64)
    count, factor = factors.numel(), float(factors.max())
    if factor == 1.0:
        return {"rope_type": "default"}
    lengths = 2 * torch.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    smooth = (8192 / lengths - 1) / 3
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected = torch.where(lengths < 2048, 1.0, torch.where(lengths > 8192, factor, expected))
    if not torch.allclose(factors, expected, rtol=1e-4):
        raise ValueError("rope_freqs.weight has factors that are not those of Llama 3, which is not read")
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **known}


@dataclass(frozen=True)
class Place:
    """Where a tensor of a GGUF file belongs.

    Attributes:
        name: of the parameter in the model.
        is_layer: it is the weight of a linear layer or an embedding.
        order: int64 [rows] or None. Row i of the parameter is row `order[i]` of the tensor.
        shape: of the parameter.
        changed: its values are others than the parameter's: `GGUFModel.restore` gives those.
        experts: names of the layers of the matrices [N, K] that it consists of; empty if it is one matrix.
    """

    name: str
    is_layer: bool
    order: Tensor | None
    shape: tuple[int, ...]
    changed: bool = False
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class GGUFModel:
    """The model of a GGUF architecture.

    Attributes:
        architecture: as the file calls it.
        config: the `config.json` of transformers.
        places: by the name of the GGUF tensor.
    """

    architecture: str
    config: dict[str, Any]
    places: dict[str, Place] = field(default_factory=dict)

    def restore(self, name: str, values: Tensor) -> Tensor:
        """float32 values of a tensor -> those of the parameter: the inverse of what llama.cpp's converter did."""
        return torch.from_numpy(
            np.ascontiguousarray(_process(_processor(self.architecture, self.config), name, values))
        )

    def convert(self, name: str, values: Tensor) -> Tensor:
        """float32 values of a parameter -> those of the tensor, as llama.cpp's converter makes them.

        Raises:
            ValueError: if they are changed by more than a constant that is added.
        """
        zeros = torch.zeros_like(values)
        stored = values - self.restore(name, zeros) if self.restore(name, zeros).shape == values.shape else values
        if stored.shape != values.shape or not torch.allclose(self.restore(name, stored), values, atol=1e-6):
            raise ValueError(f"{name} is changed by llama.cpp's converter in a way that is not written")
        return stored


def _processor(architecture: str, config: dict[str, Any]) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)


def _process(processor: Any, name: str, values: Any) -> Any:
    values = values.numpy() if isinstance(values, Tensor) else values
    return processor.process(
        weights=values, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
    ).weights


def read_model(file: GGUFFile) -> GGUFModel:
    """The model of a file, with a place for each of its tensors.

    Raises:
        ImportError: without transformers or gguf.
        ValueError: naming the file, for an architecture that is not known, or tensors that do not fit it.
    """
    architecture = file.value(_ARCHITECTURE)
    try:
        if not isinstance(architecture, str):
            raise ValueError("it does not say its general.architecture")
        found = _read_config(file, architecture)
        layers = found.get("num_hidden_layers")
        if not isinstance(layers, int) or not 0 < layers <= len(file.tensors):  # a billion of them would be built
            raise ValueError(f"it says that it has {layers} blocks, and has {len(file.tensors)} tensors")
        config, model = _build(found)
        processor = _processor(architecture, config)
        return GGUFModel(architecture, config, _places(file, model, processor))
    except ImportError:
        raise
    except Exception as error:  # whatever unusual metadata make transformers raise
        raise ValueError(f"{file.path}: the model of the GGUF file cannot be read: {error}") from error


def _build(found: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """A config as transformers writes it, and its causal language model without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in found.items() if key not in ("model_type", "quantization_config")}
    config = AutoConfig.for_model(found["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    written = config.to_diff_dict()
    written.pop("_name_or_path", None)
    written.pop("_model_name_or_path", None)
    return {**written, "model_type": config.model_type}, model


def tensor_names(architecture: str, model: nn.Module, processor: Any) -> dict[str, list[str]]:
    """The names of GGUF tensors by the parameter of the model that they are, or that they are parts of.

    Raises:
        ValueError: for an architecture that the package gguf does not know.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next((number for number, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise ValueError(f"the package gguf does not know the architecture {architecture!r}")
    settings: Any = model.config
    table, prefix = get_tensor_name_map(kind, settings.num_hidden_layers), f"{model.base_model_prefix}."
    names = {}
    for parameter in model.state_dict():
        own = processor.preprocess_name(parameter)
        stem, dot, leaf = own.rpartition(".")
        stem, suffix = (stem, dot + leaf) if leaf in ("weight", "bias") else (own, "")
        found = table.get_name(stem) or table.get_name(stem.removeprefix(prefix))
        if found is not None:
            names[parameter] = [found + suffix if suffix else found + ".weight" * ("_exps" in found)]
        else:  # matrices of experts that GGUF keeps apart
            parts: dict[str, str] = {}
            processor.perform_fallback_tensor_mapping(parts, suffix, "", own)
            names[parameter] = [name + ".weight" * ("_exps" in name and not suffix) for name in parts]
    return names


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """The causal language model of a `config.json`, without memory; its `config` has the defaults, too."""
    return _build(dict(config))[1]


def model_to_write(architecture: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> GGUFModel:
    """The model of a config, with a place for each of its parameters that there are.

    Args:
        architecture: as GGUF calls it.
        config: the `config.json` of transformers.
        shapes: of the parameters by their names; an expert's have its number in them.

    Raises:
        ValueError: for a parameter that GGUF has no tensor for.
    """
    _, model = _build(dict(config))
    settings = dict(config) | {"num_key_value_heads": getattr(model.config, "num_key_value_heads", None)}
    processor = _processor(architecture, settings)
    fused: dict[str, list[str]] = {}
    for name in shapes:
        if match := _EXPERT.fullmatch(name):
            fused.setdefault(f"{match['block']}.{match['part']}", []).append(name)
    places, known = {}, tensor_names(architecture, model, processor)
    for parameter, names in known.items():
        for name in names:
            experts = _EXPERTS.fullmatch(parameter)
            if experts:
                part = next(own for mark, own in _EXPERT_PARTS.items() if f"_{mark}_exps" in name)
                found = sorted(fused.pop(f"{experts['block']}.{part}", ()), key=lambda own: int(own.split(".")[-3]))
                if found:
                    layers = tuple(own.removesuffix(".weight") for own in found)
                    places[name] = Place(parameter, True, None, (len(found), *shapes[found[0]]), experts=layers)
            elif parameter in shapes:
                tensor = GGUFTensor(name, tuple(shapes[parameter]), "F32", 1, 4, 0)
                places[name] = _place(tensor, parameter, model, processor)
    placed = {place.name for place in places.values()}
    lost = [name for name in shapes if name not in placed and not _EXPERT.fullmatch(name)] + list(fused)
    if lost:
        raise ValueError(f"GGUF has no tensor for {lost[0]} of the architecture {architecture}")
    return GGUFModel(architecture, settings, places)


def _places(file: GGUFFile, model: nn.Module, processor: Any) -> dict[str, Place]:
    by_parameter = tensor_names(str(file.value(_ARCHITECTURE)), model, processor)
    names = {name: parameter for parameter, own in by_parameter.items() for name in own}
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    places, missing = {}, set(model.state_dict())
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":
            continue  # the config has what it says
        target = names.get(name)
        if target is None:
            raise ValueError(f"the tensor {name} has no place in {type(model).__name__}")
        missing.discard(target)
        place = _place(tensor, target, model, processor)
        expected = tuple(parameters[target].shape)
        if not place.experts and place.shape != expected:
            raise ValueError(f"{name} gives {target} the shape {list(place.shape)}, which must be {list(expected)}")
        places[name] = place
    settings: Any = model.config
    if settings.tie_word_embeddings:
        missing -= set(getattr(model, "_tied_weights_keys", None) or ())
    if missing:
        raise ValueError(f"it has no tensor for {sorted(missing)[0]} ({len(missing)} in all)")
    return places


def _place(tensor: GGUFTensor, target: str, model: nn.Module, processor: Any) -> Place:
    experts = _EXPERTS.fullmatch(target)
    if len(tensor.shape) == 3 and experts:
        part = next((own for mark, own in _EXPERT_PARTS.items() if f"_{mark}_exps" in tensor.name), None)
        if part is None:
            raise ValueError(f"{tensor.name} is no matrix of experts that is read")
        layers = tuple(f"{experts['block']}.{index}.{part}" for index in range(tensor.shape[0]))
        return Place(target, True, None, tensor.shape, experts=layers)
    module = model.get_submodule(target.rpartition(".")[0])
    is_layer = target.endswith(".weight") and isinstance(module, (nn.Linear, nn.Embedding))
    columns = tensor.shape[1:]
    index = np.broadcast_to(np.arange(tensor.shape[0], dtype=np.int32).reshape(-1, *(1 for _ in columns)), tensor.shape)
    found = _process(processor, tensor.name, index)
    if found is index:
        return Place(target, is_layer, None, tensor.shape)
    if found.shape == tensor.shape and found.dtype == index.dtype:
        first = found.reshape(tensor.shape[0], -1)[:, :1]
        if (np.sort(first[:, 0]) == np.arange(tensor.shape[0])).all() and (
            found.reshape(len(first), -1) == first
        ).all():
            return Place(target, is_layer, torch.from_numpy(first[:, 0].astype(np.int64)), tensor.shape)
    unsqueezed = is_layer and found.ndim == 2 and found.dtype == index.dtype and len(tensor.shape) == 1
    return Place(target, bool(unsqueezed), None, tuple(found.shape), changed=True)
