"""`quantize_`: swap a model's linear layers for `QuantLinear` in place, and the report of what was done."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import calibrate
from .embedding import QuantEmbedding, embedding_reason
from .nn import QuantLinear, float_weight, is_conv1d, relative_error
from .quantize import FLOAT_DTYPES, MAX_REDUCTION, QuantizedWeight
from .schemes import QuantScheme

# Why a layer stays in float although it could be quantized: the reasons that `strict` accepts.
SKIPPED = "skipped by pattern"
NOT_INCLUDED = "not included"
SLOWER = "float is faster"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer, or embedding.

    Attributes:
        name: its first name in the model.
        kind: the class of the layer before the conversion.
        shape: (N, K) = (out_features, in_features).
        scheme: name of the scheme it is quantized with; None: it is in float.
        bytes_before, bytes_after: of the weight, without the bias; 0 if it is shared with an earlier row.
        weight_error: relative error of the dequantized weight (Frobenius norm); None: not quantized by this call.
        reason: why this call left it as it was; None: it was quantized.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    scheme: str | None
    bytes_before: int
    bytes_after: int
    weight_error: float | None = None
    reason: str | None = None


@dataclass
class QuantizationReport:
    """One row for each linear layer, and each embedding if they were asked for; `str()` is a plain-text table.

    Attributes:
        scheme, mode, grad, weight_scale: what the call asked for.
        rows: in the order of the model's modules.
        warnings: patterns that matched nothing.
    """

    scheme: str
    mode: str
    grad: str
    rows: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    weight_scale: str = "absmax"

    @property
    def quantized(self) -> list[LayerReport]:
        """The rows of the layers that this call quantized."""
        return [row for row in self.rows if row.reason is None]

    @property
    def left(self) -> list[LayerReport]:
        """The rows of the layers that this call left as they were."""
        return [row for row in self.rows if row.reason is not None]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict:
        """The report as plain data, with the totals; JSON can hold it."""
        totals = {
            "layers": len(self.rows),
            "quantized_layers": len(self.quantized),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "scheme", "before", "after", "error", "left because")
        lines = [header, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        ratio = f" ({self.bytes_after / self.bytes_before:.2f}x)" if self.bytes_before else ""
        text.append(
            f"total: {len(self.quantized)} of {len(self.rows)} layers quantized to {self.scheme}, "
            f"{_megabytes(self.bytes_before)} -> {_megabytes(self.bytes_after)}{ratio}"
        )
        return "\n".join(text + [f"warning: {warning}" for warning in self.warnings])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


def _cells(row: LayerReport) -> tuple[str, ...]:
    error = "" if row.weight_error is None else f"{row.weight_error:.4f}"
    sizes = (_megabytes(row.bytes_before), _megabytes(row.bytes_after))
    return (row.name, row.kind, f"{row.shape[0]}x{row.shape[1]}", row.scheme or "-", *sizes, error, row.reason or "")


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
    calibration: Iterable[Tensor | Mapping[str, Any]] | None = None,
    never_slower: bool = False,
) -> QuantizationReport:
    """Swap every `nn.Linear` and transformers `Conv1D` of `model` for a `QuantLinear`, in place.

    Everything is checked before anything is changed. Layers are then converted one by one and each float weight is
    freed at once. A layer that cannot be quantized without changing what the model computes stays in float and is
    listed with the reason: its weight is tied to another module's (a head that shares the embedding), parametrized,
    not float32/bfloat16/float16, on the meta device, or read directly by its parent (`nn.MultiheadAttention`,
    `nn.TransformerEncoderLayer`, PEFT adapters); or the layer is a subclass of `nn.Linear` with a behaviour of its own.

    A pattern is a layer's name, the last component of its name ("lm_head"), or an fnmatch glob ("*.mlp.*").

    Args:
        model: the module that contains the layers. A transformers model can be saved with `save_pretrained` after
            the call and loaded again; call it on the model, not on a part of it, for that.
        scheme: scheme name or `QuantScheme`.
        mode, grad, weight_scale: what is trained, and how gradients are computed; see `QuantLinear`.
        skip: patterns of the layers to leave in float.
        include: patterns of the layers to quantize; None: all.
        strict: raise if a layer stays in float for another reason than `skip` and `include`, or if a pattern
            matches no linear layer (which is otherwise a warning).
        embeddings: also swap every embedding for a `QuantEmbedding` with the weight format of `scheme`, or of the
            scheme given here ("w8a8" with 4-bit layers, say). A head that is tied to an embedding is quantized with it,
            and both share one storage and scheme.
        calibration: sample inputs of the model (a mapping is passed as keyword arguments), for any scheme but w8a16:
            weights are then chosen so that the layers' outputs on these inputs change least (`qkernels.calibrate`),
            which takes the time of running them, a [K, K] float32 matrix a layer, and, for w4, some seconds a layer.
            Embeddings, and heads that share their weight, are rounded to nearest. In mode "qat" the float weights
            become the values of the chosen ones, from which training then starts; `weight_scale="learned"` starts
            with their scales too, "absmax" finds scales anew and may round some groups a second time.
        never_slower: time the forward of each layer shape on this CPU, at the numbers of rows in `explain.ROWS`, and
            leave those in float that would be slower quantized at any of them (`qkernels.explain` shows the times).

    Returns:
        A `QuantizationReport` with one row for each linear layer.

    Raises:
        TypeError: if `model` is itself a linear layer, or `skip` or `include` is a single string.
        ValueError: for an unknown scheme, mode, grad or weight_scale, a NaN or Inf weight or calibration input (naming
            the layer), `calibration` for w8a16, `embeddings` for another mode than "frozen",
            `never_slower` for layers on another device, or a violation of `strict`. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place; "
            "use QuantLinear.from_float(layer, scheme)"
        )
    scheme = QuantScheme.parse(scheme)
    kind = {"mode": mode, "grad": grad, "weight_scale": weight_scale}
    QuantLinear(1, 1, False, scheme, **kind, device="meta")  # what does not exist is refused here
    if embeddings and mode != "frozen":
        raise ValueError(f"embeddings must be False for mode={mode!r}: the weight of a QuantEmbedding is not trained")
    if calibration is not None and not calibrate.applies(scheme):
        raise ValueError(f"calibration must be None for {scheme}: it is for 4-bit weights and 8-bit activations")
    report = QuantizationReport(scheme.name, **kind)
    layers = plan(model, scheme, skip, include, report, embeddings=embeddings)
    for layer in layers:
        if layer.reason is None and layer.module.weight.is_meta:
            layer.reason = "weight on the meta device"
    for layer in layers:
        if layer.reason is None:
            _check_finite(layer.name, layer.module.weight, scheme)
    if never_slower:
        _keep_faster_floats(layers, scheme)
    if strict:
        _check_strict(layers, report)
    moments = {} if calibration is None else _calibrate(model, layers, calibration, scheme, report)
    for message in report.warnings:
        warnings.warn(message, stacklevel=2)
    for layer in layers:
        seen = moments.pop(id(layer.module), None)
        report.rows.append(layer.convert(kind, seen) if layer.reason is None else layer.row())
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
    """A linear layer or embedding found in a model, every place it is registered at, and why it stays if it does."""

    names: list[str]
    module: nn.Module
    slots: list[tuple[nn.Module, str]]  # (parent, name in the parent)
    reason: str | None = None
    scheme: QuantScheme | None = None  # what it will be quantized to
    peers: list[Layer] = field(default_factory=list)  # all layers of its weight, which will share one storage
    converted: LayerReport | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def row(self) -> LayerReport:
        """The report's row for the layer as it is."""
        module, scheme = self.module, None
        if isinstance(module, QuantLinear):
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
    layers = find_layers(model, bool(embeddings))
    _match_patterns(layers, skip, include, report)
    structure = _structure_reasons(model)
    groups = _tied_groups(model, tied or {})
    for layer in layers:
        if layer.reason is None:
            layer.reason = structure.get(id(layer.module)) or _layer_reason(layer.module, scheme)
    for group in groups:
        _settle_tied(group, {id(layer.module): layer for layer in layers}, bool(embeddings))
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
        return "already quantized"
    if isinstance(module, nn.Embedding):
        return embedding_reason(module)
    if parametrize.is_parametrized(module) or set(module._parameters) != {"weight", "bias"}:
        return "parametrized weight"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"{type(module).__name__} is a subclass of nn.Linear"
    if "forward" in vars(module):
        return "forward is replaced on the instance"
    if module.weight is None or module.weight.dtype not in FLOAT_DTYPES:
        return "no weight" if module.weight is None else f"{module.weight.dtype} weight"
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
    batches: Iterable[Tensor | Mapping[str, Any]],
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
    from . import explain

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
    allowed = (SKIPPED, NOT_INCLUDED, SLOWER, "already quantized")
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
    if weight is None or nn.parameter.is_lazy(weight):
        return 0
    return weight.numel() * weight.element_size()
