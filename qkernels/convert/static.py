"""`prepare_` and `convert_`: static activations in two steps, with a program's own loop over its data between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..ptq.observers import InputWatch, Observer, observer_factory, remove_watch
from .model import check_model, check_strict, quantize_layers, static_layers
from .report import QuantizationReport
from .schemes import SchemeRules, Schemes
from .selection import select_layers


@dataclass(frozen=True)
class _Request:
    """The arguments of `prepare_` that `convert_` goes on with."""

    scheme: Schemes
    options: dict[str, Any]


class _Watch(InputWatch):
    def __init__(self, name: str, observer: Observer, request: _Request) -> None:
        super().__init__(name, observer)
        self.request = request


def prepare_(
    model: nn.Module,
    scheme: Schemes = "w8a8s",
    mode: str = "frozen",
    *,
    observer: str | Callable[[], Observer] = "minmax",
    skip: Sequence[str] = (),
    include: Sequence[str] | None = None,
    strict: bool = False,
    grad_dtype: str = "float",
    weight_scale: str = "absmax",
) -> nn.Module:
    """Let each layer that is to be quantized observe its inputs, until `convert_` quantizes it.

    The model stays in float and computes what it did. Run it on a few hundred sample inputs, in any way that its layers
    are called: its own `forward`, `generate`, a training loop, an evaluation of another library. For a model that a
    call with one batch runs, `quantize_(model, scheme, calibration=batches)` does all three steps. In several processes
    each must see the same inputs, or one calibrates and the others load.

    In torch.ao these are `prepare` and `prepare_qat` (`mode="qat"`), `convert`, and after a training `freeze_`.

    Args:
        model: as in `quantize_`.
        scheme: a scheme with static activations, `a8s`, or a mapping from patterns to schemes; see `quantize_`.
        mode, skip, include, strict, grad_dtype, weight_scale: what `convert_` will do; see `quantize_`.
        observer: how the scale of a layer's inputs is chosen: "minmax", "moving_average", "percentile" or "mse"
            (`qkernels.ptq.observers`), or what makes an `Observer` for each layer when it is called.

    Returns:
        `model`.

    Raises:
        ValueError: for a scheme without static activations, a model that is prepared already, and as `quantize_`.
        TypeError: for something else as the observer, and as `quantize_`.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model = qk.prepare_(model, "w8a8s", observer="minmax")
        >>> for _ in range(8):
        ...     y = model(torch.randn(5, 16))
        >>> report = qk.convert_(model)
        >>> [row.scheme for row in report.rows]
        ['w8a8s', 'w8a8s']
    """
    make_observer, rules = observer_factory(observer), SchemeRules(scheme)
    if not any(own.static_activations for own in rules.schemes):
        raise ValueError(f"scheme must have static activations (a8s) to be prepared, got {rules.label}; call quantize_")
    check_model(model)
    layer_options = {"mode": mode, "grad_dtype": grad_dtype, "weight_scale": weight_scale}
    rules.check(layer_options)
    layers, messages = select_layers(model, rules, skip, include)
    if strict:
        check_strict(layers, messages)
    for message in messages:
        warnings.warn(message, stacklevel=2)
    chosen = static_layers(layers)
    if not chosen:
        raise ValueError("model has no layer to prepare: " + "; ".join(f"{x.name}: {x.reason}" for x in layers[:3]))
    request = _Request(scheme, {"skip": skip, "include": include, **layer_options})
    for layer in chosen:
        if layer.split is not None:
            layer.split.enter()
        watch = _Watch(layer.name, make_observer(), request)
        layer.module.register_forward_pre_hook(watch, with_kwargs=True)
    return model


def convert_(model: nn.Module) -> QuantizationReport:
    """Quantize the layers of a model that `prepare_` prepared, with the scales that their observers chose.

    A layer that saw no input stays in float; it is a row of the report with that reason, and a warning names it.

    Returns:
        The report of `quantize_`, whose rows hold `x_scale` and the share of the inputs that was clipped.

    Raises:
        ValueError: if the model was not prepared, or saw no input at all, and as `quantize_`; it is then as it was.
    """
    watches = _watches(model) if isinstance(model, nn.Module) else {}
    if not watches:
        raise ValueError("model must be prepared: call prepare_(model, scheme), then run it on sample inputs")
    observers = {key: watch.observer for key, (_, watch) in watches.items()}
    if not any(observer.has_observed for observer in observers.values()):
        raise ValueError("model saw no input since prepare_: run it on sample inputs, then call convert_")
    request = next(iter(watches.values()))[1].request
    for module, _ in watches.values():
        remove_watch(module)
    try:
        return quantize_layers(model, request.scheme, **request.options, observers=observers, stacklevel=3)
    except Exception:
        for module, watch in watches.values():
            module.register_forward_pre_hook(watch, with_kwargs=True)
        raise


def _watches(model: nn.Module) -> dict[int, tuple[nn.Module, _Watch]]:
    """By id of a layer that is prepared: the layer and its hook."""
    return {
        id(module): (module, hook)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, _Watch)
    }
