"""`quantize_`: swap the layers of a model for quantized ones in place; `freeze_`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..formats.scheme import QuantScheme
from ..nn.adapters import find_adapter, find_composite
from ..nn.layer_adapters import QUANTIZED
from ..nn.matrix_layer import MatrixLayer
from ..profiling.layers import ROWS, SECONDS, time_layers
from ..ptq.gptq import applies, check_applies
from ..ptq.inputs import InputStatistics, checked_batches, collect_input_statistics
from ..ptq.observers import Observer, is_watched, observe_input, observer_factory
from ..system.deprecation import renamed_keywords
from .layers import Layer, rows_of
from .leftover import ROUTER
from .report import QuantizationReport
from .schemes import NOT_INCLUDED, SKIPPED, SchemeRules, Schemes
from .selection import NOT_ASKED, SLOWER, select_layers, unexpected_results
from .watch import watch_frozen

# From this share of exact zeros on, a weight that is to be trained is taken for one that was pruned.
LEAST_ZEROS = 0.05
# Why a layer has no scale for static activations.
UNSEEN = "saw no calibration input, which static activations need"
# Sample inputs of a model.
Batches: TypeAlias = Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]
# Called as f(model, report) after each `quantize_`; an integration adds its own when its library is imported.
AFTER_QUANTIZE: list[Callable[[nn.Module, QuantizationReport], None]] = []
# Called as f(model) after each `freeze_`, likewise.
AFTER_FREEZE: list[Callable[[nn.Module], None]] = []


@renamed_keywords(grad="grad_dtype")
def quantize_(
    model: nn.Module,
    scheme: Schemes,
    mode: str = "frozen",
    *,
    skip: Sequence[str] = (),
    include: Sequence[str] | None = None,
    strict: bool = False,
    grad_dtype: str = "float",
    weight_scale: str = "absmax",
    embeddings: bool | str | QuantScheme = False,
    calibration: Batches | None = None,
    observer: str | Callable[[], Observer] = "minmax",
    never_slower: bool = False,
) -> QuantizationReport:
    """Swap every linear layer and convolution of `model` for a quantized one, in place.

    `nn.Linear` and transformers' `Conv1D` become `QuantLinear`, `nn.Conv2d` and `nn.Conv1d` become `QuantConv2d` and
    `QuantConv1d`. A layer of several weights (`nn.MultiheadAttention`, `nn.LSTM` and the like, the fused experts of
    transformers) becomes a module that computes the same, in which each weight is a layer and a row of its own.

    Everything is checked before anything is changed. Layers are then converted one by one and each float weight is
    freed at once. Whatever stays in float is a row of the report, with the reason: depthwise and transposed
    convolutions, and every other matrix weight that is no such layer, too. A layer that cannot be quantized without
    changing what the model computes stays in float: its weight is tied to another module's (a head that shares the
    embedding), parametrized by something else than a mask, or not float32/bfloat16/float16; it is part of a PEFT
    adapter; transformers keeps it in float32 beside float16 (T5); or the layer is of a subclass with a behaviour of its
    own. A warning tells if nothing is quantized, if layers keep another scheme or mode from an earlier call, and once,
    later, if an optimizer trains the frozen model as it is.

    A layer on the meta device becomes one without values, there: load a quantized state dict into it, with
    `load_state_dict(..., assign=True)` or accelerate's `load_checkpoint_and_dispatch`.

    A pattern is a layer's name, the last component of its name ("lm_head"), the name of a module that it is in, or an
    fnmatch glob ("*.mlp.*").

    Args:
        model: the module that contains the layers. A transformers model can be saved with `save_pretrained` after
            the call and loaded again; call it on the model, not on a part of it, for that.
        scheme: scheme name or `QuantScheme`, or a mapping from patterns to those, such as
            `{"lm_head": None, "*.mlp.*": "w4a8-g32", "*": "w8a8"}`: the first pattern that matches a layer decides,
            and None leaves it in float, as does no match.
        mode, grad_dtype, weight_scale: what is trained, and how gradients are computed; see `QuantLinear`.
        skip: patterns of the layers to leave in float.
        include: patterns of the layers to quantize; None: all.
        strict: raise if a layer stays in float for another reason than `skip` and `include`, or if a pattern
            matches no layer (which is otherwise a warning).
        embeddings: also swap every embedding for a `QuantEmbedding` with the weight format of `scheme`, or of the
            scheme given here ("w8a8" with 4-bit layers, say). A head that is tied to an embedding is quantized with it,
            and both share one storage and scheme.
        calibration: an iterable of sample inputs of the model, for schemes with 4-bit weights or static activations
            (`a8s`): tensors, mappings of keyword arguments, or tuples and lists that begin with the inputs as tensors
            (a `DataLoader`, say). 4-bit weights are then chosen so that the layers' outputs on these inputs change
            least (`qkernels.ptq.gptq`), which takes the time of running them, a [K, K] float32 matrix a layer, and some
            seconds a layer. Embeddings, convolutions, experts, and heads that share their weight, are rounded to
            nearest. In mode "qat" the float weights become the values of the chosen ones, from which training then
            starts; `weight_scale="learned"` starts with their scales too, "absmax" finds scales anew and may round some
            groups a second time. Schemes of 8-bit weights with dynamic or float activations are refused: weights that
            are fitted to sample inputs compute worse on others; `smooth_` helps int8 activations.
            For schemes with static activations (`a8s`), which need it, the inputs of each layer also decide its
            `x_scale`, whatever the bits of the weight.
        observer: how they do: "minmax", "moving_average", "percentile" or "mse", or what makes an `Observer` for each
            layer when it is called; see `qkernels.ptq.observers`. `prepare_` and `convert_` do the same around a loop
            of one's own.
        never_slower: time the forward of each shape of a linear layer on this CPU, at the numbers of rows in
            `qkernels.profiling.layers.ROWS`, and leave those in float that would be slower quantized at any of them
            (`qkernels explain` shows the times). Convolutions are not timed.

    Returns:
        A `QuantizationReport` with one row for each linear layer, embedding and other matrix weight.

    Raises:
        TypeError: if `model` is itself a layer that is replaced, scripted, or wrapped by DDP, if `skip` or `include` is
            a single string or holds something else than strings, or for a `calibration` that is no iterable of inputs.
        ValueError: for an unknown scheme, mode, grad_dtype or weight_scale, a NaN or Inf weight or calibration input
            (naming the layer), an empty `calibration` or one for 8-bit weights, `embeddings` for another mode than
            "frozen", `never_slower` for layers on another device, or a violation of `strict`. The model is then as it
            was.
    """
    return quantize_layers(
        model,
        scheme,
        mode,
        skip=skip,
        include=include,
        strict=strict,
        grad_dtype=grad_dtype,
        weight_scale=weight_scale,
        embeddings=embeddings,
        calibration=calibration,
        observer=observer,
        never_slower=never_slower,
        stacklevel=4,  # 2 is this function, 3 its decorator
    )


def quantize_layers(
    model: nn.Module,
    scheme: Schemes,
    mode: str,
    *,
    skip: Sequence[str],
    include: Sequence[str] | None,
    strict: bool = False,
    grad_dtype: str,
    weight_scale: str,
    embeddings: bool | str | QuantScheme = False,
    calibration: Batches | None = None,
    observer: str | Callable[[], Observer] = "minmax",
    never_slower: bool = False,
    observers: Mapping[int, Observer] | None = None,
    stacklevel: int,
) -> QuantizationReport:
    """`quantize_`, also with inputs that were observed before.

    Args:
        observers: by id of a layer, what has seen its inputs, in the place of `calibration`.
        stacklevel: of whom the warnings name.
    """
    check_model(model)
    rules = SchemeRules(scheme)
    layer_options = {"mode": mode, "grad_dtype": grad_dtype, "weight_scale": weight_scale}
    rules.check(layer_options, embeddings)
    make_observer = observer_factory(observer)
    static = next((own for own in rules.schemes if own.static_activations), None)
    skeleton = any(parameter.is_meta for parameter in model.parameters())
    if static is not None and calibration is None and observers is None and not skeleton:
        raise ValueError(
            f"calibration must be sample inputs for {static}: they choose the scale of each layer's activations; or "
            "call prepare_(model, scheme), run the model on inputs, and convert_(model)"
        )
    if calibration is not None:
        calibration = checked_batches(calibration)
        if static is None and not any(map(applies, rules.schemes)):
            check_applies(rules.schemes[0])
    report = QuantizationReport(rules.label, mode, grad_dtype, weight_scale=weight_scale)
    layers, report.warnings = select_layers(model, rules, skip, include, embeddings=embeddings)
    for layer in layers:
        if layer.reason is None:
            assert layer.scheme is not None, "a layer without a scheme has a reason"
            if not (weight := layer.weight()).is_meta:
                _check_finite(layer.name, weight, layer.scheme)
            elif calibration is not None:
                raise ValueError(f"calibration must be None for a model on the meta device, and {layer.name} is there")
    if never_slower:
        _keep_faster_floats(layers)
    if strict:
        check_strict(layers, report.warnings)
    statistics: dict[int, InputStatistics] = {}
    if calibration is not None:
        calibrated = [layer for layer in _measured(layers) if layer.scheme is not None and applies(layer.scheme)]
        observed = static_layers(layers)
        observers = {id(layer.module): make_observer() for layer in observed}
        statistics = _statistics(model, calibrated, observed, calibration, observers)
        report.warnings += _unseen_inputs(calibrated, statistics)
    observers = observers or {}
    report.warnings += _leave_unobserved(layers, observers)
    if strict:
        check_strict(layers, report.warnings)
    if calibration is not None or observers:
        rounded = [layer for layer in layers if layer.scheme is not None and applies(layer.scheme)]
        report.warnings += _not_measured(rounded, "are rounded to nearest: calibration does not choose their weights")
    if never_slower:
        report.warnings += _not_measured(layers, "are quantized and not timed")
    report.warnings += unexpected_results(layers, report, embeddings)
    if mode != "frozen":
        report.warnings += _zeros_without_mask(layers)
    for message in report.warnings:
        warnings.warn(message, stacklevel=stacklevel)
    for layer in layers:
        if layer.reason is None:
            key = id(layer.module)
            layer.convert(layer_options, statistics.pop(key, None), observers.get(key))
    report.rows = rows_of(layers)
    watch_frozen(model, layers)
    for callback in AFTER_QUANTIZE:
        callback(model, report)
    return report


def check_model(model: object) -> None:
    """Raise TypeError unless layers of `model` can be replaced in place, and ValueError if it is prepared already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}{_modules_of(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be an nn.Module that is not scripted or traced; quantize it first")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("model must not be wrapped by DistributedDataParallel yet; quantize it first, then wrap it")
    if (adapter := find_adapter(model)) is not None:
        convolutions = (nn.Conv1d, nn.Conv2d)
        kind = next((f"Quant{known.__name__}" for known in convolutions if isinstance(model, known)), "QuantLinear")
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place; "
            f"use {'QuantEmbedding' if adapter.lookup else kind}.from_float(layer, scheme)"
        )
    if find_composite(type(model)) is not None:
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place; quantize a module that holds it"
        )
    if is_watched(model):
        raise ValueError("model is prepared already: run it on sample inputs and call convert_(model)")


def _modules_of(value: object) -> str:
    """What to pass in the place of something that holds modules: a pipeline, or a list of models."""
    if isinstance(value, list | tuple | dict):
        return "; call it for each model"
    held = [name for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, nn.Module)]
    return f"; pass its {' or '.join(held[:5])}" if held and not isinstance(value, type) else ""


def freeze_(model: nn.Module) -> nn.Module:
    """Make every quantized layer of `model` frozen, in place, with the weight that it multiplies now.

    For the end of a training in mode "qat" or "int8": outputs keep their bits, the state dict becomes that of a
    quantized model, and float weights are freed.

    Returns:
        `model`.

    Raises:
        RuntimeError: naming the layer, if a weight, or a learned scale of activations, holds NaN or Inf, or a weight is
            computed by something else than a mask. The model is then as it was.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MatrixLayer)}
    for name, layer in layers.items():
        if (problem := layer.freezing_problem()) is not None:
            raise RuntimeError(f"{name or 'the layer'} cannot be frozen, and nothing was changed: {problem}")
    for layer in layers.values():
        layer.freeze_()
    for callback in AFTER_FREEZE:
        callback(model)
    return model


def _check_finite(name: str, weight: Tensor, scheme: QuantScheme) -> None:
    if weight.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(weight.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"weight of {name!r} must be finite, got NaN or Inf values; nothing was changed")
    if not scheme.symmetric and max(high, 0.0) - min(low, 0.0) > torch.finfo(torch.float32).max:
        raise ValueError(f"weight of {name!r} spans more than float32 can hold; nothing was changed")


def _zeros_without_mask(layers: list[Layer]) -> list[str]:
    """A warning if weights that will be trained were pruned, but have no mask: training fills their zeros."""
    found = {}
    for layer in layers:
        if layer.reason is None and layer.pruning() is None and not (weight := layer.weight()).is_meta:
            share = 1 - weight.count_nonzero().item() / max(weight.numel(), 1)
            if LEAST_ZEROS <= share < 1:  # a weight of nothing but zeros is one that is to be trained from there
                found[layer.name] = f"{100 * share:.0f} %"
    if not found:
        return []
    name, zeros_of_it = next(iter(found.items()))
    return [
        f"weights that seem pruned have no mask, and training fills their zeros: {name} ({zeros_of_it} are exactly 0)"
        f"{f' and {len(found) - 1} more layers' if len(found) > 1 else ''}; to keep the zeros call "
        "torch.nn.utils.prune.custom_from_mask(layer, 'weight', layer.weight != 0) for these layers before quantize_"
    ]


def _measured(layers: list[Layer]) -> list[Layer]:
    """The layers to quantize whose inputs are collected and that are timed: linear ones of a weight of their own."""
    return [
        layer
        for layer in layers
        if layer.reason is None and not layer.tied and not layer.is_lookup and layer.adapter.measured
    ]


def _not_measured(layers: list[Layer], what_happens: str) -> list[str]:
    """A warning for the layers to quantize that are no linear ones: convolutions, and the experts of a mixture."""
    names = [
        layer.name for layer in layers if layer.reason is None and not layer.is_lookup and not layer.adapter.measured
    ]
    return [f"convolutions and experts {what_happens} ({names[0]} and {len(names) - 1} more)"] if names else []


def _statistics(
    model: nn.Module,
    layers: list[Layer],
    static: list[Layer],
    calibration: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
    observers: Mapping[int, Observer],
) -> dict[int, InputStatistics]:
    """Statistics of the inputs of `layers`, also of those that are part of a layer of several weights.

    Those of the layers `static` are shown to their observers.

    Raises:
        ValueError: naming a layer whose observed inputs were not finite.
    """
    every = {layer.module: layer for layer in (*layers, *static)}
    fast_path = torch.backends.mha.get_fastpath_enabled()  # it calls no layer
    with ExitStack() as stack:
        for split in {id(layer.split): layer.split for layer in every.values() if layer.split is not None}.values():
            stack.enter_context(split.running())
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        schemes = {layer.module: layer.scheme for layer in layers if layer.scheme is not None}
        observe = {layer.module: partial(observe_input, layer.name, observers[id(layer.module)]) for layer in static}
        return collect_input_statistics(model, every, calibration, schemes, observe)


def static_layers(layers: list[Layer]) -> list[Layer]:
    """The layers to quantize whose activations will be static; one on the meta device will be given their scale."""
    static = [layer for layer in layers if layer.scheme is not None and layer.scheme.static_activations]
    return [layer for layer in static if layer.reason is None and not layer.weight().is_meta]


def _leave_unobserved(layers: list[Layer], observers: Mapping[int, Observer]) -> list[str]:
    """Leave layers of static activations whose inputs were not seen in float, and return a warning for each.

    Raises:
        ValueError: if no input of any layer was seen.
    """
    static = static_layers(layers)
    unseen = [
        layer for layer in static if (observer := observers.get(id(layer.module))) is None or not observer.has_observed
    ]
    if static and len(unseen) == len(static):
        raise ValueError("calibration reached none of the layers to quantize; nothing was changed")
    for layer in unseen:
        layer.reason = UNSEEN
    return [f"{layer.name} saw no calibration input and stays in float" for layer in unseen]


def _unseen_inputs(layers: list[Layer], statistics: Mapping[int, InputStatistics]) -> list[str]:
    """A warning for each of these layers that saw no calibration input.

    Raises:
        ValueError: naming a layer whose inputs were not finite.
    """
    messages = []
    for layer in layers:
        found = statistics.get(id(layer.module))
        if found is None:
            messages.append(f"{layer.name} saw no calibration input and is rounded to nearest")
        elif not found.gram.isfinite().all():
            raise ValueError(f"calibration input of {layer.name!r} must be finite, got NaN or Inf; nothing was changed")
    return messages


def _keep_faster_floats(layers: list[Layer]) -> None:
    """Give the layers that are faster in float that reason to stay."""
    by_scheme: dict[QuantScheme, list[tuple[list[str], nn.Module]]] = {}
    for layer in _measured(layers):
        assert layer.scheme is not None, "a layer without a scheme has a reason"
        by_scheme.setdefault(layer.scheme, []).append((layer.names, layer.module))
    timings = [timing for scheme, own in by_scheme.items() for timing in time_layers(own, scheme, ROWS, SECONDS)]
    slower = {name: timing for timing in timings if timing.slower for name in timing.layers}
    for layer in layers:
        if timing := slower.get(layer.name):
            times = f"{timing.float_seconds * 1e3:.3g} ms against {timing.seconds * 1e3:.3g} at M = {timing.m}"
            layer.reason = f"{SLOWER}: {times}"


def check_strict(layers: list[Layer], messages: list[str]) -> None:
    allowed = (SKIPPED, NOT_INCLUDED, SLOWER, NOT_ASKED, QUANTIZED, ROUTER)
    problems = [
        f"{layer.name} stays in float: {layer.reason}"
        for layer in layers
        if layer.reason is not None and not layer.reason.startswith(allowed)
    ]
    problems += messages
    if problems:
        raise ValueError("strict=True, and nothing was changed: " + "; ".join(problems))
