"""Linear layers of real models, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A weight [n, k] and where it comes from."""

    name: str
    n: int
    k: int


# The distinct shapes of a model's layers, each under the name of one layer that has it.
MODELS = {
    "gpt2": (("attn.c_attn", 2304, 768), ("attn.c_proj", 768, 768), ("mlp.c_fc", 3072, 768), ("mlp.c_proj", 768, 3072)),
    "bert-base": (("query", 768, 768), ("intermediate", 3072, 768), ("output", 768, 3072)),
    "gemma-3-270m": (
        ("q_proj", 1024, 640), ("k_proj", 256, 640), ("o_proj", 640, 1024), ("up_proj", 2048, 640),
        ("down_proj", 640, 2048),
    ),
    "llama-7b": (("q_proj", 4096, 4096), ("up_proj", 11008, 4096), ("down_proj", 4096, 11008)),
    "llama-8b": (
        ("q_proj", 4096, 4096), ("k_proj", 1024, 4096), ("up_proj", 14336, 4096), ("down_proj", 4096, 14336),
    ),
}  # fmt: skip


def parse_layers(names: str) -> list[Layer]:
    """The layers of a comma-separated list of models and shapes NxK, each shape once.

    Raises:
        ValueError: for what is neither.
    """
    layers: dict[tuple[int, int], Layer] = {}
    for name in names.split(","):
        if shape := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            found = [Layer(name, int(shape[1]), int(shape[2]))]
        elif name in MODELS:
            found = [Layer(f"{name} {layer}", n, k) for layer, n, k in MODELS[name]]
        else:
            raise ValueError(
                f"layers must be models ({', '.join(MODELS)}) or shapes such as 3072x768 (N x K), got {name!r}"
            )
        for layer in found:
            layers.setdefault((layer.n, layer.k), layer)
    return list(layers.values())
