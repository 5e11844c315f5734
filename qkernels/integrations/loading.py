"""`qkernels.load`: a model from any checkpoint that a reader of ours knows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.losses import Losses, OnLoss
from ..checkpoints.registry import format_of, open_checkpoint
from ..convert.schemes import Schemes
from .checkpoint_layers import Activations


def load(
    path: str | Path,
    scheme: Schemes | None = None,
    *,
    activations: Activations | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    on_loss: OnLoss = "refuse",
    **options: Any,
) -> nn.Module:
    """The transformers model in a folder or file, in the format of any library that `qkernels inspect` lists.

    Its quantized layers take the very integers of the file, one tensor at a time: there is no float copy of the model.
    They are frozen, as adapters need them. What the file has in float stays so. The result is a model like any other:
    LoRA trains on it, `save_pretrained` writes a folder of ours, `qkernels.export` one of any other format. Its
    `quantization_report` says what each layer is.

    Args:
        path: a folder of transformers with safetensors files, or a .gguf file.
        scheme: None: what the file says. A scheme, or schemes by pattern, as in `quantize_`: of a float folder, what it
            is quantized to; of a quantized one, what its layers are to be: with other activations they keep their
            integers, with another weight they need `on_loss="requantize"`.
        activations: without a `scheme`, "int8" or "float" for all quantized layers; None: what the file says, which is
            float for one that quantizes weights alone.
        dtype: of what is in float, and in which the layers compute; "auto": as the file says, float32 for GGUF.
        device: where the model is put.
        on_loss: "refuse" what our storage cannot hold exactly; "report" it, in a warning with count and largest error;
            "requantize": also quantize weights again that have no integers of ours.
        options: more arguments of transformers' `from_pretrained`, and of `QKernelsConfig`: `skip`, `include`,
            `embeddings`, `grad_dtype`.

    Returns:
        The model in evaluation mode, of the class that its config names.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: for an unknown format, a broken file, a scheme that does not fit, or weights that are missing.
        LossError: a ValueError, for what is not exact, by `on_loss`.
        ImportError: if transformers is not installed.

    Example:
        >>> import tempfile, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model, folder = transformers.LlamaForCausalLM(config), tempfile.mkdtemp()
        >>> report = qk.quantize_(model, "w8a8")
        >>> model.save_pretrained(folder)
        >>> qk.load(folder).model.layers[0].mlp.up_proj.scheme.name
        'w8a8'
    """
    path = Path(path)
    found = format_of(path)
    from . import load as integration

    config_class = integration("transformers").QKernelsConfig
    own = {key: options.pop(key) for key in ("skip", "include", "embeddings", "grad_dtype") if key in options}
    wanted = config_class(scheme, activations=activations, on_loss=on_loss, **own)
    gguf = path.suffix == ".gguf"
    if path.is_file() and not gguf:
        raise ValueError(f"path must be a folder with a config.json, or a .gguf file, got the file {path}")
    source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent if gguf else path}
    if gguf:
        source |= {"gguf_file": path.name, "config": _gguf_config(path)}
    elif not (path / "config.json").is_file():
        raise ValueError(f"path must be a folder with a config.json, which says what the model is; {path} has none")
    # A folder of ours says all of it itself, and a float one is left as it is unless a scheme is given.
    if found.name == "float" and scheme is None:
        wanted = None
    elif found.name == "qkernels" and scheme is None and activations is None and not own:
        wanted = None
    if wanted is not None:
        options["quantization_config"] = wanted
    model, info = _model_class(source).from_pretrained(**source, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path} lacks weights of {type(model).__name__}: {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{path} has tensors that {type(model).__name__} has no place for: {', '.join(unexpected[:3])} "
            f"({len(unexpected)} in all)",
            stacklevel=2,
        )
    return model if device is None else model.to(device)


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """The tokenizer beside a model, or the one in a GGUF file, by transformers.

    Args:
        path: as in `load`.
        options: more arguments of transformers' `from_pretrained`.

    Raises:
        OSError, ValueError: if there is none.
        ImportError: if transformers is not installed.
    """
    from . import load as integration

    integration("transformers")
    from transformers import AutoTokenizer

    path = Path(path)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **options)
    return AutoTokenizer.from_pretrained(path, **options)


def _gguf_config(path: Path) -> Any:
    """The config of a GGUF file, by our reader: that of transformers takes a minute for a large vocabulary."""
    import transformers

    config = dict(open_checkpoint(path, Losses("requantize")).config)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    if config.dtype is None:
        config.dtype = torch.float32
    return config


def _model_class(source: dict[str, Any]) -> Any:
    """The class that a config names; a causal language model if it names none."""
    import transformers

    config = source["config"] if "config" in source else transformers.AutoConfig.from_pretrained(**source)
    names = getattr(config, "architectures", None) or []
    if getattr(config, "auto_map", None) or not names:
        return transformers.AutoModelForCausalLM
    known = getattr(transformers, names[0], None)
    return transformers.AutoModelForCausalLM if known is None else known
