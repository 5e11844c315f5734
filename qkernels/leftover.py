"""The matrix weights of a model that no rule quantizes, and why: what `quantize_` reports beside its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

_RULES = "only linear layers and embeddings are quantized"
_KINDS = (
    (nn.modules.conv._ConvNd, "convolution"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layer"),
    (nn.MultiheadAttention, "nn.MultiheadAttention"),
    (nn.Bilinear, "nn.Bilinear"),
    (nn.EmbeddingBag, "nn.EmbeddingBag"),
)


def is_matrix(tensor: Tensor | None) -> bool:
    """True for a tensor with two dimensions or more that are longer than 1."""
    if tensor is None or nn.parameter.is_lazy(tensor):
        return False
    return sum(size > 1 for size in tensor.shape) > 1


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
    for kind, word in _KINDS:
        if isinstance(module, kind):
            return f"{word}: {_RULES}"
    words = f"{name} {type(module).__name__}".lower()
    if module._parameters[key].dim() > 2 and ("expert" in words or "moe" in words):
        return "fused experts: one parameter holds the matrices of all experts, and no kernel multiplies it"
    if "router" in words or words.partition(" ")[0].endswith(("gate", "gate.weight")):
        return f"router: a parameter of {type(module).__name__}; {_RULES}"
    return f"parameter of {type(module).__name__}: {_RULES}"
