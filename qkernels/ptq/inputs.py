"""Sample inputs of a model, and what a method of quantization asks about the inputs of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats.scheme import QuantScheme
from ..formats.storage import expand_groups
from ..kernels import ops


class InputStatistics(NamedTuple):
    """Sums over the inputs x of a layer with K input features.

    Attributes:
        gram: float32 [K, K], the sum of x xT.
        quant_error: float32 [K], the sum of the squared errors of the quantized inputs; zeros under `a16`.
    """

    gram: Tensor
    quant_error: Tensor


def collect_input_statistics(
    model: nn.Module,
    layers: Iterable[nn.Module],
    calibration: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
    scheme: str | QuantScheme | Mapping[nn.Module, QuantScheme],
    observe: Mapping[nn.Module, Callable[[Tensor], None]] | None = None,
) -> dict[int, InputStatistics]:
    """Run `model` on sample inputs and collect the statistics of the inputs of each linear layer.

    Args:
        model: run in evaluation mode, without gradients.
        layers: the layers to watch.
        calibration: see `run_watched`.
        scheme: says how the inputs will be quantized, those of all layers or of each; there are no statistics of a
            layer that a mapping leaves out. Static activations, whose scales are not known yet, are taken for dynamic.
        observe: what is called with each input of a layer too, float32 [M, K].

    Returns:
        By id of a layer that was called.
    """
    layers = list(layers)
    schemes = scheme if isinstance(scheme, Mapping) else dict.fromkeys(layers, QuantScheme.parse(scheme))
    found: dict[int, InputStatistics] = {}

    def watch(layer: nn.Module, x: Tensor) -> None:
        if observe is not None and layer in observe:
            observe[layer](x)
        if layer not in schemes:
            return
        quant_error, scheme = torch.zeros(x.shape[1], device=x.device), schemes[layer].of_dynamic
        if scheme.int_activations:
            q, scales = ops.quantize_activation(x, scheme.name)
            rounded = q.to(torch.float32) * expand_groups(scales, scheme.act_group_size, x.shape[1])
            quant_error = (rounded - x).square().sum(dim=0)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the sum would not be positive definite
            own = InputStatistics(x.t() @ x, quant_error)
        if (before := found.get(id(layer))) is not None:
            own = InputStatistics(before.gram + own.gram, before.quant_error + own.quant_error)
        found[id(layer)] = own

    run_watched(model, layers, calibration, watch)
    return found


def run_watched(
    model: nn.Module,
    layers: Iterable[nn.Module],
    calibration: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
    watch: Callable[[nn.Module, Tensor], None],
) -> None:
    """Run `model` on sample inputs, in evaluation mode and without gradients.

    Args:
        layers: the linear layers whose inputs are wanted.
        calibration: sample inputs: a mapping is passed as keyword arguments, a tensor as the only argument. Of a tuple
            or list as many elements are passed as `model.forward` requires, so that targets may follow.
        watch: called before each of these layers with it and its input, float32 [M, K].

    Raises:
        TypeError: if a batch is something else.
        ValueError: if there is no batch.
    """
    number = -1

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        watch(layer, x.reshape(-1, x.shape[-1]).to(torch.float32))

    training = [module for module in model.modules() if module.training]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    model.eval()
    try:
        with torch.no_grad():
            for number, batch in enumerate(checked_batches(calibration)):
                args, kwargs = _arguments(model, batch, f"calibration[{number}]")
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if number < 0:
        raise ValueError("calibration must hold at least one batch, got none")


def checked_batches(calibration: Any) -> Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]:
    """Refuse what cannot be sample inputs, before any model runs; the single batches are checked as they are used.

    Raises:
        TypeError: if `calibration` is one batch instead of an iterable of them, or text.
        ValueError: if it is empty.
    """
    name, expected = type(calibration).__name__, "calibration must be an iterable of batches"
    if isinstance(calibration, Tensor | Mapping):
        got = f"a tensor of shape {list(calibration.shape)}" if isinstance(calibration, Tensor) else name
        raise TypeError(f"{expected}, got one batch, {got}; pass [batch]")
    if isinstance(calibration, str | bytes):
        raise TypeError(f"{expected}, got a string; tokenize it and pass [{{'input_ids': ids}}]")
    if not isinstance(calibration, Iterable) or hasattr(calibration, "__array__"):
        raise TypeError(f"{expected} such as [x], [{{'input_ids': ids}}] or a DataLoader, got {name}")
    if isinstance(calibration, Sequence) and not calibration:
        raise ValueError(f"calibration must hold at least one batch, got an empty {name}")
    return calibration


def _arguments(model: nn.Module, batch: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which `model` is called for one batch.

    Raises:
        TypeError: if the batch is neither a tensor, nor a mapping, nor a tuple or list of tensors.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        kinds = inspect.signature(model.forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in kinds)
        return tuple(batch[: max(required, 1)]), {}  # what is left are targets
    got = type(batch).__name__ + (f" of {type(batch[0]).__name__}" if isinstance(batch, tuple | list) and batch else "")
    how = "; tokenize texts first" if isinstance(batch, str) or got.endswith(" of str") else ""
    how = "; torch.as_tensor makes a tensor of it" if hasattr(batch, "__array__") else how
    raise TypeError(
        f"{where} must be a tensor, a mapping of the model's keyword arguments, or a tuple or list that begins with "
        f"the model's inputs as tensors, got {got}{how}"
    )
