"""Pruned layers: a weight that is computed as a mask times a parameter.

Two things of torch do so: the pre-hook of `torch.nn.utils.prune`, with the parameter `weight_orig` and the buffer
`weight_mask`, and a parametrization, such as that of `torch.ao.pruning` (2:4 patterns). A parametrization is taken for
a mask if each of its values is that of the parameter or 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune


class Pruning(NamedTuple):
    """How the weight of a layer is masked.

    Attributes:
        original: the parameter, of any shape.
        weight: `original` where it is kept, else 0; of the same shape, detached.
        mask: bool of that shape, False where the weight stays 0.
    """

    original: nn.Parameter
    weight: Tensor
    mask: Tensor


def find_pruning(layer: nn.Module, key: str = "weight") -> Pruning | None:
    """The pruning of a layer's parameter `key` as it is now; None: it is not pruned.

    >>> layer = torch.nn.utils.prune.l1_unstructured(nn.Linear(8, 4), "weight", 0.5)
    >>> int(find_pruning(layer).mask.sum())
    16
    """
    if (hook := pruning_hook(layer, key)) is not None:
        with torch.no_grad():
            weight = hook.apply_mask(layer)
        mask = layer._buffers[f"{key}_mask"]
        original = layer._parameters[f"{key}_orig"]
        assert mask is not None and original is not None
        return Pruning(original, weight, mask != 0)
    if not parametrize.is_parametrized(layer, key):
        return None
    parametrization: Any = layer.parametrizations[key]  # type: ignore[index]
    original = getattr(parametrization, "original", None)
    if not isinstance(original, nn.Parameter):
        return None
    with torch.no_grad():
        weight = parametrization()
    if weight.shape != original.shape or not bool(((weight == original) | (weight == 0)).all()):
        return None
    return Pruning(original, weight, weight != 0)


def pruning_hook(layer: nn.Module, key: str = "weight") -> Any:
    """The pre-hook by which `torch.nn.utils.prune` masks the parameter `key`; None: there is none."""
    if f"{key}_orig" not in layer._parameters or f"{key}_mask" not in layer._buffers:
        return None
    hooks = layer._forward_pre_hooks.values()
    return next((h for h in hooks if isinstance(h, prune.BasePruningMethod) and h._tensor_name == key), None)


def is_masked(layer: nn.Module, key: str = "weight") -> bool:
    """True if the parameter `key` is computed by a hook of `torch.nn.utils.prune` or by a parametrization."""
    return pruning_hook(layer, key) is not None or parametrize.is_parametrized(layer, key)


def own_names(layer: nn.Module, key: str = "weight") -> set[str]:
    """Names of the parameters by which a layer holds the one called `key`."""
    if pruning_hook(layer, key) is not None:
        return {f"{key}_orig"}
    return set() if parametrize.is_parametrized(layer, key) else {key}


def keep_mask(layer: nn.Module, quantized: nn.Module, pruning: Pruning, key: str, transposed: bool) -> None:
    """Prune the trained `weight` of `quantized` as that of the float layer `layer`; the parameter is shared.

    Args:
        key, transposed: how `layer` holds its weight.

    Raises:
        ValueError: for a parametrization of a weight that is held as [K, N].
    """
    if not parametrize.is_parametrized(layer, key):
        original, mask = pruning.original, pruning.mask
        if transposed:
            original, mask = nn.Parameter(original.detach().t().contiguous(), original.requires_grad), mask.t()
        quantized.register_parameter("weight", original)
        prune.custom_from_mask(quantized, "weight", mask)
        return
    if transposed:
        raise ValueError(f"weight of a {type(layer).__name__} must not be parametrized, as it is held as [K, N]")
    quantized.register_parameter("weight", nn.Parameter(pruning.weight.clone()))
    for parametrization in layer.parametrizations[key]:  # type: ignore[index]
        parametrize.register_parametrization(quantized, "weight", parametrization, unsafe=True)
    parametrizations: Any = quantized.parametrizations
    parametrizations["weight"].original = pruning.original


def replace_original(layer: nn.Module, parameter: nn.Parameter) -> None:
    """Let `parameter` be what the mask of `layer.weight` is multiplied with, in the place of the one there."""
    if (hook := pruning_hook(layer)) is not None:
        layer.register_parameter("weight_orig", parameter)
        vars(layer)["weight"] = hook.apply_mask(layer)
    else:
        parametrizations: Any = layer.parametrizations
        parametrizations["weight"].original = parameter


def make_permanent(layer: nn.Module) -> None:
    """Make the computed `weight` of a layer a parameter with the same values."""
    if pruning_hook(layer) is not None:
        prune.remove(layer, "weight")
    elif parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def move_hooks(layer: nn.Module, quantized: nn.Module, key: str) -> None:
    """Let the float layer's dictionary of pre-hooks hold the mask of `quantized`, if any, and no longer its own."""
    hooks, own = layer._forward_pre_hooks, list(quantized._forward_pre_hooks.items())
    for number, hook in list(hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == key:
            del hooks[number]
    for number, hook in own:
        hooks[number] = hook


def clear_masked(qweight: Tensor, mask: Tensor) -> None:
    """Set integers to 0, in place, where the mask is False; integers that are 0 there already are not written to."""
    with torch.no_grad():
        if torch.compiler.is_compiling():
            qweight.mul_(mask)
        elif (wrong := (qweight != 0) & ~mask).any():
            qweight.masked_fill_(wrong, 0)
