"""`quantize_`: swap a model's linear layers for `QuantLinear` in place, and the report of what was done."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..formats.rules import FLOAT_DTYPES, MAX_REDUCTION, QuantizedWeight
from ..formats.scheme import QuantScheme
from ..nn.embedding import QuantEmbedding, embedding_reason
from ..nn.linear import QuantLinear, float_weight, is_conv1d, relative_error
from ..ptq import gptq as calibrate
from .leftover import is_matrix, is_plain_linear, kept_in_float32, leftover_reason, matrix_weights
from .report import LayerReport, QuantizationReport
from .watch import watch_training

# Why a layer stays as it is although it could be quantized: the reasons that `strict` accepts (all but KEPT).
SKIPPED = "skipped by pattern"
NOT_INCLUDED = "not included"
SLOWER = "float is faster"
NOT_ASKED = "embedding: embeddings=True was not asked for"
QUANTIZED = "already quantized"
KEPT = "kept in float32: transformers' _keep_in_fp32_modules, because its values overflow float16"


# Called as f(model, report) after each `quantize_`; an integration adds its own when its library is imported.
AFTER_QUANTIZE: list[Callable[[nn.Module, QuantizationReport], None]] = []
# Called as f(model) after each `freeze_`, likewise.
AFTER_FREEZE: list[Callable[[nn.Module], None]] = []


def quantize_(
    model: nn.Module,
    scheme: str | QuantScheme,
    mode: str = "frozen",
    skip: Sequence[str] = (),
    include: Sequence[str] | None = None,
    strict: bool = False,
    *,
    grad: str = "float",
    weight_scale: str = "absmax",
    embeddings: bool | str | QuantScheme = False,
    calibration: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]] | None = None,
    never_slower: bool = False,
) -> QuantizationReport:
    """Swap every `nn.Linear` and transformers `Conv1D` of `model` for a `QuantLinear`, in place.

    Everything is checked before anything is changed. Layers are then converted one by one and each float weight is
    freed at once. Whatever stays in float is a row of the report, with the reason: convolutions, fused experts and all
    other matrix weights that are no linear layer, too. A layer that cannot be quantized without changing what the
    model computes stays in float: its weight is tied to another module's (a head that shares the embedding),
    parametrized, not float32/bfloat16/float16, on the meta device, or read directly by its parent
    (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`, PEFT adapters); transformers keeps it in float32 beside
    float16 (T5); or the layer is a subclass of `nn.Linear` with a behaviour of its own. A warning tells if nothing is
    quantized, if layers keep another scheme or mode from an earlier call, and once, later, if an optimizer trains the
    frozen model as it is.

    A pattern is a layer's name, the last component of its name ("lm_head"), or an fnmatch glob ("*.mlp.*").

    Args:
        model: the module that contains the layers. A transformers model can be saved with `save_pretrained` after
            the call and loaded again; call it on the model, not on a part of it, for that.
        scheme: scheme name or `QuantScheme`.
        mode, grad, weight_scale: what is trained, and how gradients are computed; see `QuantLinear`.
        skip: patterns of the layers to leave in float.
        include: patterns of the layers to quantize; None: all.
        strict: raise if a layer stays in float for another reason than `skip` and `include`, or if a pattern
            matches no layer (which is otherwise a warning).
        embeddings: also swap every embedding for a `QuantEmbedding` with the weight format of `scheme`, or of the
            scheme given here ("w8a8" with 4-bit layers, say). A head that is tied to an embedding is quantized with it,
            and both share one storage and scheme.
        calibration: an iterable of sample inputs of the model, for schemes with 4-bit weights: tensors, mappings of
            keyword arguments, or tuples and lists that begin with the inputs as tensors (a `DataLoader`, say). Weights
            are then chosen so that the layers' outputs on these inputs change least (`qkernels.ptq.gptq`), which takes
            the time of running them, a [K, K] float32 matrix a layer, and some seconds a layer. Embeddings, and
            heads that share their weight, are rounded to nearest. In mode "qat" the float weights become the
            values of the chosen ones, from which training then starts; `weight_scale="learned"` starts with their
            scales too, "absmax" finds scales anew and may round some groups a second time. 8-bit weights are
            refused: fitted to sample inputs they compute worse on others; `smooth_` helps int8 activations.
        never_slower: time the forward of each layer shape on this CPU, at the numbers of rows in `explain.ROWS`, and
            leave those in float that would be slower quantized at any of them (`qkernels explain` shows the times).

    Returns:
        A `QuantizationReport` with one row for each linear layer, embedding and other matrix weight.

    Raises:
        TypeError: if `model` is itself a linear layer, scripted, or wrapped by DDP, if `skip` or `include` is a single
            string or holds something else than strings, or for a `calibration` that is no iterable of inputs.
        ValueError: for an unknown scheme, mode, grad or weight_scale, a NaN or Inf weight or calibration input (naming
            the layer), an empty `calibration` or one for 8-bit weights, `embeddings` for another mode than "frozen",
            `never_slower` for layers on another device, or a violation of `strict`. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be an nn.Module that is not scripted or traced; quantize it first")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("model must not be wrapped by DistributedDataParallel yet; quantize it first, then wrap it")
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place; "
            "use QuantLinear.from_float(layer, scheme)"
        )
    scheme = QuantScheme.parse(scheme)
    kind = {"mode": mode, "grad": grad, "weight_scale": weight_scale}
    QuantLinear(1, 1, False, scheme, **kind, device="meta", dtype=torch.float32)  # what does not exist is refused here
    if embeddings and mode != "frozen":
        raise ValueError(f"embeddings must be False for mode={mode!r}: the weight of a QuantEmbedding is not trained")
    if calibration is not None:
        calibration = calibrate.checked_batches(calibration, scheme)
    report = QuantizationReport(scheme.name, **kind)
    layers = plan(model, scheme, skip, include, report, embeddings=embeddings)
    for layer in layers:
        if layer.reason is None and layer.module.weight.is_meta:
            layer.reason = "weight on the meta device: load it first, then quantize"
    for layer in layers:
        if layer.reason is None:
            _check_finite(layer.name, layer.module.weight, scheme)
    if never_slower:
        _keep_faster_floats(layers, scheme)
    if strict:
        _check_strict(layers, report)
    moments = {} if calibration is None else _calibrate(model, layers, calibration, scheme, report)
    report.warnings += unexpected_results(layers, report, embeddings)
    for message in report.warnings:
        warnings.warn(message, stacklevel=2)
    for layer in layers:
        if layer.reason is None:
            layer.convert(kind, moments.pop(id(layer.module), None))
    report.rows = rows_of(layers)
    watch_frozen(model, layers)
    for callback in AFTER_QUANTIZE:
        callback(model, report)
    return report


def freeze_(model: nn.Module) -> nn.Module:
    """Make every `QuantLinear` of `model` frozen, in place, with the weight that it multiplies now.

    For the end of a training in mode "qat" or "int8": outputs keep their bits, the state dict becomes that of a
    quantized model, and float weights are freed.

    Returns:
        `model`.

    Raises:
        RuntimeError: if a weight holds NaN or Inf.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.freeze_()
    for callback in AFTER_FREEZE:
        callback(model)
    return model


@dataclass
class Layer:
    """A linear layer or embedding found in a model, every place it is registered at, and why it stays if it does.

    Or another matrix weight: the parameter `key` of `module`, which always stays.
    """

    names: list[str]
    module: nn.Module
    slots: list[tuple[nn.Module, str]]  # (parent, name in the parent)
    reason: str | None = None
    scheme: QuantScheme | None = None  # what it will be quantized to
    peers: list[Layer] = field(default_factory=list)  # all layers of its weight, which will share one storage
    converted: LayerReport | None = None
    key: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def weight_id(self) -> int:
        """Equal for two layers that share their weight."""
        for name in (self.key or "weight", "qweight"):
            tensor = self.module._parameters.get(name, self.module._buffers.get(name))
            if tensor is not None:
                return id(tensor)
        return id(self.module)

    def row(self) -> LayerReport:
        """The report's row for the layer as it is."""
        module, scheme = self.module, None
        if self.key is not None:
            weight = module._parameters[self.key]
            shape, size = tuple(weight.shape), weight.numel() * weight.element_size()
        elif isinstance(module, QuantLinear):
            shape, size, scheme = (module.out_features, module.in_features), module.storage_bytes(), module.scheme.name
        elif isinstance(module, nn.Embedding):
            shape, size = (module.num_embeddings, module.embedding_dim), _weight_bytes(module)
            if isinstance(module, QuantEmbedding):
                size, scheme = module.storage_bytes(), module.scheme.name
        elif is_conv1d(module):
            shape, size = (module.nf, module.nx), _weight_bytes(module)
        else:
            shape, size = (module.out_features, module.in_features), _weight_bytes(module)
        return LayerReport(self.name, type(module).__name__, shape, scheme, size, size, reason=self.reason)

    def convert(self, kind: Mapping[str, str], moments: calibrate.Moments | None = None) -> LayerReport:
        """Put a `QuantLinear` in the layer's place, let go of the float layer, and return the row.

        Args:
            kind: the keywords mode, grad and weight_scale of `QuantLinear`.
            moments: of the layer's inputs, for calibration; see `calibrate.quantize_weight`.
        """
        before, weight, scheme = self.row(), _weight(self.module), self.scheme
        owner = next((peer for peer in self.peers if peer.converted is not None), None)
        if owner is not None:
            self.replace(self._on_storage_of(owner.module, kind))
            sizes, error = (0, 0), owner.converted.weight_error
        else:
            if isinstance(self.module, nn.Embedding):
                quantized = QuantEmbedding.from_float(self.module, scheme)
            else:
                quantized = QuantLinear.from_float(self.module, scheme, **kind)
            if moments is not None:
                quantized.set_weight(calibrate.quantize_weight(weight, scheme, moments))
            error = relative_error(weight, quantized)
            self.replace(quantized)
            sizes = (before.bytes_before, quantized.storage_bytes())
        self.converted = LayerReport(self.name, before.kind, before.shape, scheme.name, *sizes, error)
        return self.converted

    def _on_storage_of(
        self, owner: QuantLinear | QuantEmbedding, kind: Mapping[str, str]
    ) -> QuantLinear | QuantEmbedding:
        """A quantized twin of this layer that shares the parameters of `owner`."""
        if isinstance(self.module, nn.Embedding):
            twin = QuantEmbedding.like(self.module, owner.scheme)
        else:
            out_features, in_features = self.module.weight.shape
            like = {"device": "meta", "dtype": self.module.weight.dtype}
            twin = QuantLinear(in_features, out_features, False, owner.scheme, **kind, **like)
            twin.bias = self.module.bias
        twin.set_weight(QuantizedWeight(owner.qweight, owner.scales, owner.zeros))
        return twin

    def replace(self, quantized: QuantLinear | QuantEmbedding) -> None:
        """Register `quantized` wherever the layer is, with the layer's hooks and instance attributes."""
        own = vars(quantized)
        for key, value in vars(self.module).items():
            is_hook = key.startswith(("_forward", "_backward", "_is_full_backward"))
            if is_hook or (key not in own and key != "_compiled_call_impl"):
                own[key] = value
        if not isinstance(quantized, QuantEmbedding):  # whose number it holds itself
            quantized._buffers.update(self.module._buffers)
        quantized.train(self.module.training)
        quantized.float_type = type(self.module)
        for parent, key in self.slots:
            setattr(parent, key, quantized)
        self.module = quantized


def find_layers(model: nn.Module, embeddings: bool = False) -> list[Layer]:
    """Every linear layer below `model` (also `QuantLinear`), each once, in the order of `named_modules`.

    Args:
        embeddings: list the embeddings too.
    """
    layers: dict[int, Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or is_conv1d(module) or (embeddings and isinstance(module, nn.Embedding)):
            layers.setdefault(id(module), Layer([], module, [])).names.append(name)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if id(child) in layers:
                layers[id(child)].slots.append((parent, key))
    return list(layers.values())


def find_weights(model: nn.Module) -> list[Layer]:
    """Every linear layer and embedding below `model`, and every other matrix weight, in the order of the modules."""
    layers = find_layers(model, embeddings=True)
    layers += [
        Layer(names, module, [], key=key)
        for names, module, key in matrix_weights(model, [layer.module for layer in layers])
    ]
    position = {id(module): at for at, module in enumerate(model.modules())}
    return sorted(layers, key=lambda layer: position[id(layer.module)])


def rows_of(layers: Iterable[Layer]) -> list[LayerReport]:
    """The report's rows of layers that were converted or stay; a weight that several of them share counts once."""
    seen: set[int] = set()
    rows = []
    for layer in layers:
        row, shared = layer.converted or layer.row(), layer.weight_id() in seen
        seen.add(layer.weight_id())
        rows.append(replace(row, bytes_before=0, bytes_after=0) if shared and row.reason is not None else row)
    return rows


def watch_frozen(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Let `watch_training` warn who trains the model as it is, unless a pattern left a layer in float to train."""
    frozen = any(isinstance(module, QuantLinear) and module.mode == "frozen" for module in model.modules())
    if frozen and not any((layer.reason or "").startswith((SKIPPED, NOT_INCLUDED)) for layer in layers):
        watch_training(model)


def unexpected_results(
    layers: Sequence[Layer], report: QuantizationReport, embeddings: bool | str | QuantScheme
) -> list[str]:
    """What the caller will hardly expect: nothing is quantized, or layers keep another scheme or mode."""
    messages = []
    asked = {"mode": report.mode, "grad": report.grad, "weight_scale": report.weight_scale}
    lookups = [layer.module for layer in layers if isinstance(layer.module, QuantEmbedding)]
    shared = {id(module.qweight) for module in lookups}
    other = []
    for layer in layers:
        module = layer.module
        if not (layer.reason or "").startswith(QUANTIZED):
            continue
        if isinstance(module, QuantEmbedding):
            differs = bool(embeddings) and module.scheme != layer.scheme
        else:
            tied = module.mode == "frozen" and id(module.qweight) in shared
            own = {key: getattr(module, key) for key in asked}
            differs = own != asked or (module.scheme != layer.scheme and not tied)
        if differs:
            other.append(layer)
    if other:
        kinds = sorted({layer.reason.partition(" (")[2].rstrip(")") for layer in other})
        change = (
            "call freeze_(model) to freeze them"
            if report.mode == "frozen" and any(layer.module.mode != "frozen" for layer in other)
            else "quantize the float model instead, or call dequantize_(model) first"
        )
        messages.append(
            f"already quantized ({'; '.join(kinds)}), and not changed to {report.scheme}, {report.mode}: "
            f"{other[0].name}{f' and {len(other) - 1} more layers' if other[1:] else ''}; {change}, "
            "or name them in skip= if they are to stay"
        )
    patterns = (SKIPPED, NOT_INCLUDED)
    left = [layer for layer in layers if not (layer.reason or "").startswith((*patterns, QUANTIZED))]
    if any((layer.reason or "").startswith(patterns) for layer in layers):
        left = [layer for layer in left if layer.reason != NOT_ASKED]
    if all(layer.reason is not None for layer in left) and (left or not layers):
        reasons = dict.fromkeys(f"{layer.name}: {layer.reason}" for layer in left)
        why = "; ".join([*reasons][:3]) or "the model has no linear layer"
        messages.append(f"nothing was quantized: {why}{'; ...' if len(reasons) > 3 else ''}")
    return messages


def plan(
    model: nn.Module,
    scheme: QuantScheme,
    skip: Sequence[str],
    include: Sequence[str] | None,
    report: QuantizationReport,
    tied: Mapping[str, str] | None = None,
    *,
    embeddings: bool | str | QuantScheme = False,
) -> list[Layer]:
    """The linear layers of `model`, each with its scheme or the reason to stay in float. Nothing is changed.

    Args:
        model, scheme, skip, include, embeddings: as in `quantize_`.
        report: receives a warning for each pattern that matches no layer.
        tied: full names of parameters that will share one storage, for a model whose weights are not tied yet.
    """
    for argument, patterns in (("skip", skip), ("include", include)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument} must be a sequence of patterns, got the string {patterns!r}")
        for pattern in patterns or ():
            if not isinstance(pattern, str):
                raise TypeError(f"{argument} must be patterns of layer names, such as 'lm_head', got {pattern!r}")
    layers = find_weights(model)
    _match_patterns(layers, skip, include, report)
    structure = _structure_reasons(model)
    groups = _tied_groups(model, tied or {})
    kept = kept_in_float32(model)
    for layer in layers:
        if layer.reason is None:
            layer.reason = structure.get(id(layer.module))
        if layer.reason is None:
            if layer.key is not None:
                layer.reason = leftover_reason(layer.name, layer.module, layer.key)
            elif type(layer.module) is not QuantEmbedding and isinstance(layer.module, nn.Embedding) and not embeddings:
                layer.reason = NOT_ASKED
            elif any(name in kept for name in layer.names) and not isinstance(layer.module, QuantLinear):
                layer.reason = KEPT
            else:
                layer.reason = _layer_reason(layer.module, scheme)
    by_module = {id(layer.module): layer for layer in layers if layer.key is None}
    for group in groups:
        _settle_tied(group, by_module, bool(embeddings))
    embedding_scheme = scheme if isinstance(embeddings, bool) else QuantScheme.parse(embeddings)
    for layer in layers:
        looked_up = any(isinstance(member.module, nn.Embedding) for member in (layer, *layer.peers))
        layer.scheme = embedding_scheme if looked_up else scheme
    return layers


def _settle_tied(group: list[tuple[str, nn.Module, str]], layers: Mapping[int, Layer], share: bool) -> None:
    """Let the layers of one weight share a storage if all of it can be quantized; give them the reason otherwise."""
    members = [layers.get(id(module)) if key == "weight" else None for _, module, key in group]
    if share and all(member is not None and member.reason is None for member in members):
        if not any(is_conv1d(member.module) for member in members):  # which holds the weight transposed
            for member in members:
                member.peers = members
            return
    for member, (_, module, _) in zip(members, group, strict=True):
        if member is not None and member.reason is None:
            other = next((name for name, other, _ in group if other is not module), "itself")
            member.reason = f"tied to {other}"


def _match_patterns(
    layers: list[Layer], skip: Sequence[str], include: Sequence[str] | None, report: QuantizationReport
) -> None:
    def matched(argument: str, patterns: Sequence[str]) -> set[int]:
        found: set[int] = set()
        for pattern in patterns:
            hits = {id(layer) for layer in layers if any(_matches(pattern, name) for name in layer.names)}
            if not hits:
                report.warnings.append(f"{argument} pattern {pattern!r} matches no linear layer")
            found |= hits
        return found

    skipped = matched("skip", skip)
    included = None if include is None else matched("include", include)
    for layer in layers:
        if id(layer) in skipped:
            layer.reason = SKIPPED
        elif included is not None and id(layer) not in included:
            layer.reason = NOT_INCLUDED


def _matches(pattern: str, name: str) -> bool:
    return pattern in (name, name.rpartition(".")[2]) or fnmatchcase(name, pattern)


def _structure_reasons(model: nn.Module) -> dict[int, str]:
    """By id of a linear layer: the reason its parents give for leaving it in float."""
    reasons: dict[int, str] = {}

    def mark(modules: Iterable[nn.Module], reason: str) -> None:
        reasons.update((id(module), reason) for module in modules)

    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            mark(parent.modules(), "inside nn.MultiheadAttention, which reads the weight itself")
        elif isinstance(parent, nn.TransformerEncoderLayer):
            mark((parent.linear1, parent.linear2), "inside nn.TransformerEncoderLayer, which reads the weight itself")
        for name in getattr(parent, "adapter_layer_names", ()):  # PEFT's layers name their adapters so
            adapter = parent._modules.get(name.partition(".")[0])
            if adapter is not None:
                mark(adapter.modules(), "adapter of a PEFT layer")
        if "base_layer" in parent._modules:
            if getattr(parent, "merged", False):
                mark(parent.base_layer.modules(), "holds a merged PEFT adapter")
            elif getattr(parent, "lora_variant", None):
                mark(parent.base_layer.modules(), "read by the variant (such as DoRA) of its PEFT layer")
    return reasons


def _layer_reason(module: nn.Module, scheme: QuantScheme) -> str | None:
    """The reason the layer itself gives for leaving it as it is."""
    if isinstance(module, QuantLinear | QuantEmbedding):
        return f"{QUANTIZED} ({module.scheme}, {module.mode})"
    if isinstance(module, nn.Embedding):
        return embedding_reason(module)
    if parametrize.is_parametrized(module) or set(module._parameters) != {"weight", "bias"}:
        return "parametrized weight"
    if not (is_conv1d(module) or is_plain_linear(type(module))):
        return f"{type(module).__name__} is a subclass of nn.Linear: its forward may compute something else"
    if "forward" in vars(module):
        return "forward is replaced on the instance"
    if module.weight is None or module.weight.dtype not in FLOAT_DTYPES:
        return "no weight" if module.weight is None else f"{module.weight.dtype} weight"
    if type(module.weight) not in (Tensor, nn.Parameter):
        kind = type(module.weight).__name__
        return f"weight is a {kind}: " + (
            "quantize the model before it is sharded" if kind == "DTensor" else "only plain tensors are quantized"
        )
    in_features = float_weight(module).shape[1]
    if in_features == 0 or (scheme.int_activations and in_features > MAX_REDUCTION):
        return f"in_features {in_features} is not in 1..{MAX_REDUCTION}"
    return None


def _tied_groups(model: nn.Module, tied: Mapping[str, str]) -> list[list[tuple[str, nn.Module, str]]]:
    """The weights that several modules own: for each, (module's name, module, its name in the module)."""
    owners: dict[object, list[tuple[str, nn.Module, str]]] = {}
    sources = set(tied.values())
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                full_name = f"{module_name}.{key}" if module_name else key
                owner = tied.get(full_name) or (full_name if full_name in sources else id(parameter))
                owners.setdefault(owner, []).append((module_name or "the model", module, key))
    return [group for group in owners.values() if len(group) > 1]


def _check_finite(name: str, weight: Tensor, scheme: QuantScheme) -> None:
    if weight.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(weight.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"weight of {name!r} must be finite, got NaN or Inf values; nothing was changed")
    if not scheme.symmetric and max(high, 0.0) - min(low, 0.0) > torch.finfo(torch.float32).max:
        raise ValueError(f"weight of {name!r} spans more than float32 can hold; nothing was changed")


def _calibrate(
    model: nn.Module,
    layers: list[Layer],
    batches: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
    scheme: QuantScheme,
    report: QuantizationReport,
) -> dict[int, calibrate.Moments]:
    """The input moments of the layers to quantize, by id of the module; a warning for each layer that saw no input."""
    chosen = [
        layer
        for layer in layers
        if layer.reason is None and not layer.peers and not isinstance(layer.module, nn.Embedding)
    ]
    moments = calibrate.second_moments(model, [layer.module for layer in chosen], batches, scheme)
    for layer in chosen:
        seen = moments.get(id(layer.module))
        if seen is None:
            report.warnings.append(f"{layer.name} saw no calibration input and is rounded to nearest")
        elif not seen.inputs.isfinite().all():
            raise ValueError(f"calibration input of {layer.name!r} must be finite, got NaN or Inf; nothing was changed")
    return moments


def _keep_faster_floats(layers: list[Layer], scheme: QuantScheme) -> None:
    """Give the layers that are faster in float that reason to stay."""
    from ..diagnostics import explain

    chosen = [
        (layer.names, layer.module)
        for layer in layers
        if layer.reason is None and not layer.peers and not isinstance(layer.module, nn.Embedding)
    ]
    timings = explain.time_layers(chosen, scheme, explain.ROWS, explain.SECONDS) if chosen else []
    slower = {name: timing for timing in timings if timing.slower for name in timing.layers}
    for layer in layers:
        if timing := slower.get(layer.name):
            times = f"{timing.float_seconds * 1e3:.3g} ms against {timing.seconds * 1e3:.3g} at M = {timing.m}"
            layer.reason = f"{SLOWER}: {times}"


def _check_strict(layers: list[Layer], report: QuantizationReport) -> None:
    allowed = (SKIPPED, NOT_INCLUDED, SLOWER, NOT_ASKED, QUANTIZED)
    problems = [
        f"{layer.name} stays in float: {layer.reason}"
        for layer in layers
        if layer.reason is not None and not layer.reason.startswith(allowed)
    ]
    problems += report.warnings
    if problems:
        raise ValueError("strict=True, and nothing was changed: " + "; ".join(problems))


def _weight(module: nn.Module) -> Tensor:
    """The weight [N, K] of a float layer, detached."""
    return module.weight.detach() if isinstance(module, nn.Embedding) else float_weight(module)


def _weight_bytes(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    parts = [weight] if weight is not None else filter(is_matrix, module.parameters())  # a parametrized weight's
    return sum(part.numel() * part.element_size() for part in parts if not nn.parameter.is_lazy(part))
