"""What a GGUF file says of a model, made from the config and the tokenizer of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import Checkpoint
from .folder import CONFIG, GGUF_TEMPLATE
from .gguf_model import build_model
from .gguf_vocabulary import add_vocabulary, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# By the `model_type` of transformers: the architecture of llama.cpp, the activation function that it has there.
_ARCHITECTURES = {
    "llama": ("llama", "silu"),
    "mistral": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
    "gemma3_text": ("gemma3", "gelu_pytorch_tanh"),
}
_PATTERN = 6  # of Gemma 3 each sixth layer sees all positions
_LOCAL_BASE = 10000.0  # of the other layers' positions
_ASK = f"give a template: put a GGUF file of the same model, of any type, beside the model as {GGUF_TEMPLATE}"


def make_template(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a GGUF file that says of a model what its config and its tokenizer say, without its weights.

    Args:
        checkpoint: whose config and files are read.
        folder: an empty one, where the file is written.

    Returns:
        The path of the file.

    Raises:
        ImportError: without transformers or gguf.
        ValueError: for an architecture, a setting of it, or a tokenizer that is not known to be one of llama.cpp's.
    """
    from gguf import GGUFWriter

    kind = checkpoint.config.get("model_type")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"metadata of GGUF are made for the model types {known}, got {kind!r}; {_ASK}")
    architecture, activation = _ARCHITECTURES[kind]
    checkpoint.copy_files(folder)
    (folder / CONFIG).write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
    path = folder / GGUF_TEMPLATE
    try:
        config: Any = build_model(checkpoint.config).config
        writer = GGUFWriter(path, architecture)
        writer.add_type("model")
        if checkpoint.path is not None:
            writer.add_name(checkpoint.path.name)
        _add_settings(writer, config, activation)
        _ADD[architecture](writer, config)
        add_vocabulary(writer, load_tokenizer(folder), config)
    except ValueError as error:
        raise ValueError(f"{error}; {_ASK}") from error
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def _expect(name: str, found: Any, *allowed: Any) -> None:
    if found not in allowed:
        raise ValueError(f"llama.cpp has this architecture with {name} {allowed[0]!r}, the config has {found!r}")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_settings(writer: GGUFWriter, config: Any, activation: str) -> None:
    """Add what all architectures have."""
    heads, head_dim = config.num_attention_heads, _head_dim(config)
    found = getattr(config, "hidden_activation", None) or config.hidden_act
    _expect("the activation", found, activation)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_llama(writer: GGUFWriter, config: Any) -> None:
    window = getattr(config, "sliding_window", None)  # of Mistral; llama.cpp has none here: no text may be longer
    lengths = [length for length in (config.max_position_embeddings, window) if length is not None]
    writer.add_context_length(min(lengths))
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(_head_dim(config))
    _add_positions(writer, config.rope_parameters, _head_dim(config))


def _add_qwen(writer: GGUFWriter, config: Any) -> None:
    _expect("layers of the kinds", set(config.layer_types), {"full_attention"})
    writer.add_context_length(config.max_position_embeddings)
    _add_positions(writer, config.rope_parameters, _head_dim(config))


def _add_gemma(writer: GGUFWriter, config: Any) -> None:
    kinds = ["sliding_attention" if (index + 1) % _PATTERN else "full_attention"
             for index in range(config.num_hidden_layers)]  # fmt: skip
    _expect("layers of the kinds", list(config.layer_types), kinds)
    scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    _expect("query_pre_attn_scalar", config.query_pre_attn_scalar, scale)
    _expect("final_logit_softcapping", config.final_logit_softcapping, None)
    _expect("attn_logit_softcapping", config.attn_logit_softcapping, None)
    _expect("use_bidirectional_attention", config.use_bidirectional_attention, False, None)
    local = config.rope_parameters["sliding_attention"]
    _expect("the positions of local layers", (local["rope_type"], local["rope_theta"]), ("default", _LOCAL_BASE))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_sliding_window(config.sliding_window)
    _add_positions(writer, config.rope_parameters["full_attention"], _head_dim(config))


_ADD: dict[str, Callable[[Any, Any], None]] = {
    "llama": _add_llama, "qwen2": _add_qwen, "qwen3": _add_qwen, "gemma3": _add_gemma,
}  # fmt: skip


def _add_positions(writer: GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    """Add the base of the positions and how they are scaled."""
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    _expect("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim).numpy())
    elif kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True}
        for name, number in usual.items():
            _expect(f"{name} of YaRN", rope.get(name, number), number, None)
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind != "default":
        raise ValueError(f"positions that are scaled by {kind!r} are not written")


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """By what each frequency is divided, float32 [head_dim / 2]: slow ones by the factor, fast ones by 1."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = rope["original_max_position_embeddings"] / (2 * torch.pi * rope["rope_theta"] ** exponents)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)
