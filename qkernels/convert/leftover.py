"""What stays in float, and why: matrix weights that no adapter knows, and what transformers keeps in float32."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..nn.adapters import find_composite, is_matrix

# The reason of what chooses the experts of a mixture begins with it: `strict` accepts it.
ROUTER = "router"
_RULES = "only linear layers, convolutions of one or two dimensions, and embeddings are quantized"
_KINDS = (
    (nn.modules.conv._ConvTransposeNd, "transposed convolution"),
    (nn.modules.conv._ConvNd, "convolution"),
    (nn.Bilinear, "nn.Bilinear"),
    (nn.EmbeddingBag, "nn.EmbeddingBag"),
)


def matrix_weights(model: nn.Module, known: Iterable[nn.Module]) -> Iterator[tuple[list[str], nn.Module, str]]:
    """The matrix parameters of `model` that do not belong to one of the modules `known`, each once.

    Yields:
        Names by which patterns find it, the module that holds it, and its name in the module.
    """
    seen = {id(parameter) for module in known for parameter in module.parameters()}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if is_matrix(parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                full = f"{name}.{key}" if name else key
                yield ([name, full] if key == "weight" and name else [full, name]), module, key


def leftover_reason(name: str, module: nn.Module, key: str) -> str:
    """Why the parameter `key` of `module` stays in float; what stands before the colon names the kind."""
    if (adapter := find_composite(type(module))) is not None and (reason := adapter.reason(module)) is not None:
        return reason
    for kind, word in _KINDS:
        if isinstance(module, kind):
            return f"{word}: {_RULES}"
    words = f"{name} {type(module).__name__}".lower()
    if module.get_parameter(key).dim() > 2 and ("expert" in words or "moe" in words):
        return f"fused experts: no adapter knows how {type(module).__name__} multiplies the matrices of its experts"
    if "router" in words or words.partition(" ")[0].endswith(("gate", "gate.weight")):
        return f"{ROUTER}: rounding what {type(module).__name__} multiplies would change which experts are chosen"
    return f"parameter of {type(module).__name__}: {_RULES}"


def kept_in_float32(model: nn.Module) -> set[str]:
    """Names of the layers that transformers keeps in float32 when the rest of the model is float16 or bfloat16."""
    kept: set[str] = set()
    for prefix, owner in model.named_modules():
        always, half = (getattr(owner, f"_keep_in_fp32_modules{suffix}", None) or () for suffix in ("_strict", ""))
        if not (always or half):
            continue
        dtypes = {parameter.dtype for parameter in owner.parameters()}
        patterns = [*half] if torch.float16 in dtypes else []
        patterns += [*always] if dtypes & {torch.float16, torch.bfloat16} else []
        patterns = [pattern.replace("*", ".*") for pattern in patterns]  # as transformers reads them
        for name, _ in owner.named_modules(prefix=prefix):
            below = f"{name}.weight".removeprefix(f"{prefix}." if prefix else "")
            if any(re.search(pattern, below) for pattern in patterns):
                kept.add(name)
    return kept
