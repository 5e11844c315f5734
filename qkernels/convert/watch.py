"""One warning for who trains a model whose quantized layers are frozen, without adapters: it hardly learns.

A hook on the steps of all optimizers looks for it, so that no forward pays anything. It looks once at each optimizer,
and goes away with the last model that it watches.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..nn.adapters import is_matrix
from ..nn.matrix_layer import MatrixLayer
from .layers import Layer
from .schemes import NOT_INCLUDED, SKIPPED

# Frozen model -> ids of the parameters that it left trainable.
_watched: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_hook: torch.utils.hooks.RemovableHandle | None = None


def watch_frozen(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Let `watch_training` warn who trains the model as it is, unless a pattern left a layer in float to train."""
    frozen = any(isinstance(module, MatrixLayer) and module.mode == "frozen" for module in model.modules())
    adapted = any(getattr(module, "adapter_layer_names", ()) for module in model.modules())  # by PEFT, before
    if frozen and not adapted and not any((layer.reason or "").startswith((SKIPPED, NOT_INCLUDED)) for layer in layers):
        watch_training(model)


def watch_training(model: nn.Module) -> None:
    """Warn if an optimizer's step ever trains all that frozen quantized layers left of `model`, and nothing more."""
    global _hook
    left = frozenset(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if left:
        _watched[model] = left
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_look)


def _look(optimizer: Optimizer, *_: Any) -> None:
    global _hook
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    _seen.add(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    ids = {id(parameter) for parameter in trained}
    for model, left in list(_watched.items()):
        if ids.isdisjoint(left):
            continue
        del _watched[model]
        # A new head, adapters, layers that are trainable again: matrices that were not there.
        more = any(is_matrix(parameter) and id(parameter) not in left for parameter in trained)
        if left <= ids and not more:
            warnings.warn(
                f"the quantized layers of this {type(model).__name__} are frozen, and the optimizer trains only what "
                "is left: norms, biases, weights in float. Add adapters (PEFT), or quantize the float model with "
                'mode="qat" or mode="int8". If it is meant, set requires_grad to False for what is not to be trained.',
                stacklevel=3,
            )
    if not _watched and _hook is not None:
        _hook.remove()
        _hook = None
