"""Which layers of a model are quantized, and why the others stay in float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from ..formats.scheme import QuantScheme
from ..nn.adapters import SplitLayer, find_adapter, find_composite
from ..nn.expert_families import has_experts
from ..nn.layer_adapters import QUANTIZED
from .layers import Layer, Split
from .leftover import ROUTER, kept_in_float32, leftover_reason, matrix_weights
from .report import QuantizationReport
from .schemes import NOT_INCLUDED, SKIPPED, SchemeRules, matches

# Why a layer stays as it is although it could be quantized: the reasons that `strict` accepts (all but KEPT).
SLOWER = "float is faster"
NOT_ASKED = "embedding: embeddings=True was not asked for"
KEPT = "kept in float32: transformers' _keep_in_fp32_modules, because its values overflow float16"


def find_layers(model: nn.Module, embeddings: bool = False) -> list[Layer]:
    """Every linear layer below `model` (also `QuantLinear`), each once, in the order of `named_modules`.

    A layer of several weights is listed as one layer for each, in a twin that is not in the model yet.

    Args:
        embeddings: list the embeddings too.
    """
    layers: dict[int, Layer] = {}
    splits: dict[int, Split] = {}

    def add(name: str, module: nn.Module, split: Split | None, whole: str) -> None:
        adapter = find_adapter(module)
        if adapter is None or (adapter.lookup and not embeddings):
            return
        layer = layers.setdefault(id(module), Layer([], module, [], split=split))
        layer.names.append(name)
        if split is not None:
            weight = split.parameter_name(module._parameters.get(adapter.key))
            layer.aliases += [f"{name}.{adapter.key}" if weight is None else f"{whole}.{weight}", whole]

    for name, module, split in walk(model, splits):
        if split is None:
            add(name, module, None, name)
        else:
            for part, child in split.twin.named_modules(prefix=name, remove_duplicate=False):
                add(part, child, split, name)
    for parent in [*model.modules(), *(part for split in splits.values() for part in split.twin.modules())]:
        for key, child in parent._modules.items():
            if id(child) in layers:
                layers[id(child)].slots.append((parent, key))
            if id(child) in splits:
                splits[id(child)].slots.append((parent, key))
    return list(layers.values())


def walk(model: nn.Module, splits: dict[int, Split]) -> Iterator[tuple[str, nn.Module, Split | None]]:
    """The modules of `model` by all of their names; a layer of several weights with its split, and not those below it.

    Args:
        splits: by the id of the layer, filled in.
    """
    inside = None  # a layer that is split, and all that is below it is a part of it
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        adapter = find_composite(type(module)) if module is not model else None
        if adapter is None or adapter.reason(module) is not None:
            yield name, module, None
            continue
        if id(module) not in splits:
            splits[id(module)] = Split.of(module, adapter)
        inside = f"{name}."
        yield name, module, splits[id(module)]


def find_weights(model: nn.Module) -> list[Layer]:
    """Every linear layer and embedding below `model`, and every other matrix weight, in the order of the modules."""
    layers = find_layers(model, embeddings=True)
    layers += [
        Layer(names, module, [], key=key)
        for names, module, key in matrix_weights(model, [layer.module for layer in layers])
    ]
    position = {id(module): at for at, module in enumerate(model.modules())}
    return sorted(layers, key=lambda layer: position[id(layer.owner)])


def select_layers(
    model: nn.Module,
    rules: SchemeRules,
    skip: Sequence[str] = (),
    include: Sequence[str] | None = None,
    *,
    ties: Mapping[str, str] | None = None,
    embeddings: bool | str | QuantScheme = False,
) -> tuple[list[Layer], list[str]]:
    """Decide which layers of `model` are quantized. Nothing is changed.

    Args:
        model, skip, include, embeddings: as in `quantize_`.
        rules: the scheme of each layer.
        ties: full names of parameters (target: source) that will be one, for a model whose weights are not tied yet.

    Returns:
        All layers and other matrix weights, each with its scheme or the reason to stay in float; and a warning for each
        pattern that matches none of them.

    Raises:
        TypeError: if `skip` or `include` is a single string or holds something else than strings.
    """
    for argument, patterns in (("skip", skip), ("include", include)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument} must be a sequence of patterns, got the string {patterns!r}")
        for pattern in patterns or ():
            if not isinstance(pattern, str):
                raise TypeError(f"{argument} must be patterns of layer names, such as 'lm_head', got {pattern!r}")
    layers = find_weights(model)
    messages = _match_patterns(layers, skip, include)
    messages += rules.assign(layers, None if isinstance(embeddings, bool) else QuantScheme.parse(embeddings))
    structure = _structure_reasons(model)
    groups = _tied_groups(model, ties or {})
    kept = kept_in_float32(model)
    for layer in layers:
        if layer.reason is None:
            layer.reason = structure.get(id(layer.module), structure.get(id(layer.owner)))
        if layer.reason is None:
            if layer.key is not None:
                layer.reason = leftover_reason(layer.name, layer.module, layer.key)
            elif layer.is_lookup and not layer.is_quantized and not embeddings:
                layer.reason = NOT_ASKED
            elif any(name in kept for name in layer.all_names) and not layer.is_quantized:
                layer.reason = KEPT
            elif layer.scheme is not None:
                layer.reason = layer.adapter.reason(layer.module, layer.scheme)
    by_parameter = {(id(module), key): layer for layer in layers for module, key in [layer.parameter()]}
    for group in groups:
        _settle_tied(group, by_parameter, bool(embeddings))
    # Of one weight, the embedding decides. It has no activations; a head on its storage finds their scales itself.
    for layer in layers:
        looked_up = next((member.scheme for member in (layer, *layer.tied) if member.is_lookup), None)
        if looked_up is not None:
            layer.scheme = looked_up.of_dynamic
    return layers, messages


def unexpected_results(
    layers: Sequence[Layer], report: QuantizationReport, embeddings: bool | str | QuantScheme
) -> list[str]:
    """What the caller will hardly expect: nothing is quantized, or layers keep another scheme or mode."""
    messages = []
    asked = {"mode": report.mode, "grad_dtype": report.grad_dtype, "weight_scale": report.weight_scale}
    looked_up = {id(layer.module.qweight) for layer in layers if layer.is_lookup and layer.is_quantized}
    other = []
    for layer in layers:
        module = layer.module
        if not (layer.reason or "").startswith(QUANTIZED):
            continue
        if layer.is_lookup:
            differs = bool(embeddings) and module.scheme != layer.scheme
        else:
            tied = module.mode == "frozen" and id(module.qweight) in looked_up
            own = {key: getattr(module, key) for key in asked}
            differs = own != asked or (module.scheme != layer.scheme and not tied)
        if differs:
            other.append(layer)
    if other:
        kinds = sorted({(layer.reason or "").partition(" (")[2].rstrip(")") for layer in other})
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


def _settle_tied(group: list[tuple[str, nn.Module, str]], layers: Mapping[tuple[int, str], Layer], share: bool) -> None:
    """Let the layers of one weight share a storage if all of it can be quantized; give them the reason otherwise.

    Args:
        layers: by the module that holds the weight, and its name there.
    """
    members = [
        member
        for _, module, key in group
        if (member := layers.get((id(module), key))) is not None and member.reason is None
    ]
    upright = not any(member.adapter.transposed or member.split is not None for member in members)
    if share and len(members) == len(group) and upright:
        for member in members:
            member.tied = members
        return
    for member in members:
        other = next((name for name, other, _ in group if other is not member.module), "itself")
        member.reason = f"tied to {other}"


def _match_patterns(layers: list[Layer], skip: Sequence[str], include: Sequence[str] | None) -> list[str]:
    """Give the layers that the patterns leave in float that reason; a warning for each pattern without a match."""
    messages: list[str] = []

    def matched(argument: str, patterns: Sequence[str]) -> set[int]:
        found: set[int] = set()
        for pattern in patterns:
            hits = {id(layer) for layer in layers if any(matches(pattern, name) for name in layer.all_names)}
            if not hits:
                messages.append(f"{argument} pattern {pattern!r} matches no layer")
            found |= hits
        return found

    skipped = matched("skip", skip)
    included = None if include is None else matched("include", include)
    for layer in layers:
        if id(layer) in skipped:
            layer.reason = SKIPPED
        elif included is not None and id(layer) not in included:
            layer.reason = NOT_INCLUDED
    return messages


def _structure_reasons(model: nn.Module) -> dict[int, str]:
    """By id of a linear layer: the reason its parents give for leaving it in float."""
    reasons: dict[int, str] = {}

    def mark(modules: Iterable[nn.Module], reason: str) -> None:
        reasons.update((id(module), reason) for module in modules)

    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention) and not isinstance(parent, SplitLayer):
            composite = find_composite(type(parent))
            if composite is not None and (reason := composite.reason(parent)) is not None:
                mark(parent.modules(), reason)
        if any(map(has_experts, parent.children())):
            for key in ("router", "gate"):
                if (child := parent._modules.get(key)) is not None:
                    mark(child.modules(), f"{ROUTER}: rounding it would change which experts are chosen")
        for name in getattr(parent, "adapter_layer_names", ()):  # PEFT's layers name their adapters so
            adapter = parent._modules.get(name.partition(".")[0])
            if adapter is not None:
                mark(adapter.modules(), "adapter of a PEFT layer")
        if (base := parent._modules.get("base_layer")) is not None:
            if getattr(parent, "merged", False):
                mark(base.modules(), "holds a merged PEFT adapter")
    return reasons


def _tied_groups(model: nn.Module, ties: Mapping[str, str]) -> list[list[tuple[str, nn.Module, str]]]:
    """The weights that several modules own: for each, (module's name, module, its name in the module)."""
    owners: dict[object, list[tuple[str, nn.Module, str]]] = {}
    sources = set(ties.values())
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                full_name = f"{module_name}.{key}" if module_name else key
                owner = ties.get(full_name) or (full_name if full_name in sources else id(parameter))
                owners.setdefault(owner, []).append((module_name or "the model", module, key))
    return [group for group in owners.values() if len(group) > 1]
