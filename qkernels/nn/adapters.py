"""Layer adapters: what a conversion asks about the layers of a class, and the registry that answers for a class.

Everything that looks for layers in a model (`quantize_`, `dequantize_`, the integrations, `explain`) asks
`find_adapter(module)` instead of naming classes. Adapters of torch's and transformers' layers are in
`layer_adapters.py`; another library registers its own with `register_adapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, MAX_REDUCTION
from .masks import find_pruning, is_masked, own_names, pruning_hook
from .storage import Storage

# What a subclass may define and still compute the same; the dunders are those of any class statement.
_CONSTRUCTION = {"__init__", "reset_parameters", "extra_repr", "__repr__"} | {
    "__annotations__", "__doc__", "__firstlineno__", "__module__", "__qualname__", "__static_attributes__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__classdictcell__", "__orig_bases__",
    "__constants__", "__parameters__",
}  # fmt: skip


_L = TypeVar("_L", bound=nn.Module)


class LayerAdapter(ABC, Generic[_L]):
    """What a conversion asks about a layer of the class that the adapter is registered for.

    A subclass says how such a layer becomes quantized and comes back; the rest follows from `key` and `transposed`.
    `LinearAdapter` is the one to derive from for a layer that computes `x @ weight.T + bias`.

    Attributes:
        key: name of the parameter that holds the weight.
        transposed: the parameter holds the weight as [K, N].
        lookup: the layer looks up rows of the weight (an embedding) and multiplies nothing.
        measured: `forward(x)` takes one input [..., K] alone, so that it can be timed, and calibrated by its inputs.
        static_activations: `quantize` takes `x_scale`, the scale of the layer's input under `a8s` schemes.
    """

    key: str = "weight"
    transposed: bool = False
    lookup: bool = False
    measured: bool = True
    static_activations: bool = False

    def weight(self, layer: _L) -> Tensor:
        """The weight, detached: float [N, K], or [E, N, K] of E experts, a view of the parameter where that can be.

        Of a pruned layer, it is the weight as it is masked now.
        """
        pruning = find_pruning(layer, self.key) if is_masked(layer, self.key) else None
        weight: Tensor = getattr(layer, self.key).detach() if pruning is None else pruning.weight
        return weight.mT if self.transposed else weight

    def shape(self, layer: _L) -> tuple[int, ...]:
        """Shape of the weight: (N, K), or (E, N, K)."""
        return tuple(self.weight(layer).shape)

    def dtype(self, layer: _L) -> torch.dtype:
        """The dtype that the layer computes in."""
        return getattr(layer, self.key).dtype

    def weight_bytes(self, layer: _L) -> int:
        """Bytes of the weight, without the bias; of a parametrized one, those of the matrices that compute it."""
        weight = layer._parameters.get(self.key)
        parts = [weight] if weight is not None else filter(is_matrix, layer.parameters())
        return sum(part.numel() * part.element_size() for part in parts if not nn.parameter.is_lazy(part))

    def bias(self, layer: _L) -> nn.Parameter | None:
        """The bias [N] that the quantized layer shares with it."""
        return getattr(layer, "bias", None)

    def scheme(self, layer: _L) -> QuantScheme | None:
        """The scheme that the layer is quantized with; None: it is in float."""
        return None

    def reason(self, layer: _L, scheme: QuantScheme) -> str | None:
        """Why the layer must stay as it is; None: it can be quantized with `scheme`."""
        names, own = set(layer._parameters), own_names(layer, self.key)
        pruning = find_pruning(layer, self.key) if is_masked(layer, self.key) else None
        if pruning is None and self.key not in names:
            return "parametrized weight"
        if pruning_hook(layer, "bias") is not None:
            return "pruned bias: make it permanent with torch.nn.utils.prune.remove(layer, 'bias')"
        if not names <= own | {"bias"} or any(name != self.key for name in getattr(layer, "parametrizations", ())):
            return "parametrized weight"
        if pruning is not None and self.transposed and parametrize.is_parametrized(layer):
            return "parametrized weight"
        if (why := other_forward(layer)) is not None:
            return why
        weight = layer._parameters[self.key] if pruning is None else pruning.original
        if weight is None or weight.dtype not in FLOAT_DTYPES:
            return "no weight" if weight is None else f"{weight.dtype} weight"
        if type(weight) not in (Tensor, nn.Parameter):
            name = type(weight).__name__
            return f"weight is a {name}: " + (
                "quantize the model before it is sharded" if name == "DTensor" else "only plain tensors are quantized"
            )
        in_features = self.shape(layer)[-1]
        if scheme.static_activations and not self.static_activations:
            return f"no static activations (a8s) in a {type(layer).__name__}: use {scheme.of_dynamic}"
        if in_features == 0 or (scheme.int_activations and in_features > MAX_REDUCTION):
            return f"in_features {in_features} is not in 1..{MAX_REDUCTION}"
        return None

    @abstractmethod
    def quantize(self, layer: _L, scheme: str | QuantScheme, **layer_options: Any) -> Storage:
        """The quantized twin of a float layer, which shares its bias.

        Args:
            layer_options: mode, grad_dtype and weight_scale, as in `QuantLinear`, and x_scale under `a8s` schemes.

        Raises:
            ValueError: if the weight holds NaN or Inf, or the scheme does not fit.
        """

    @abstractmethod
    def empty(
        self, layer: _L, scheme: str | QuantScheme, *, dtype: torch.dtype | None = None, **layer_options: str
    ) -> Storage:
        """A quantized twin on the meta device, without values, of the layer's shape and dtype (or the given one).

        `set_weight` gives it a weight, also that of another layer: then they share one storage.
        """

    @abstractmethod
    def to_float(self, quantized: Storage, weight: nn.Parameter, float_type: type[nn.Module]) -> nn.Module:
        """A float layer of class `float_type` in the place of a quantized one.

        Args:
            quantized: a layer that `quantize` made, or one that was loaded; it shares its bias with the result.
            weight: float [N, K]; the parameter of the result is this one, unless it is held transposed.
        """


class SplitLayer(nn.Module):
    """What stands in the place of a layer of several weights when one of them is quantized (see `CompositeAdapter`).

    It computes what that layer computed, and each of its weights belongs to a layer of its own below it.
    """

    float_type: type[nn.Module]  # of the layer that was split, and that `dequantize_` joins again

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Its layers, and what it took over of the layer that was split."""


class CompositeAdapter(ABC, Generic[_L]):
    """What a conversion asks about a layer of several weights, such as attention or the experts of a mixture.

    Such a layer is split: a `SplitLayer` with the same parameters takes its place, in which each weight belongs to a
    layer of its own, of a class that has a `LayerAdapter`. These layers are quantized one by one, or stay in float, and
    each has its row of the report. Nothing is split in the model before the first of them is quantized.
    """

    def reason(self, layer: _L) -> str | None:
        """Why the layer cannot be split; None: it can. All of its weights then stay in float for that reason."""
        if parametrize.is_parametrized(layer):
            return "parametrized weight"
        return other_forward(layer)

    @abstractmethod
    def split(self, layer: _L) -> SplitLayer:
        """The twin of the layer, which shares its parameters and submodules; the layer itself is not changed.

        A parameter of the twin is the parameter object of the layer, whatever its name, also on the meta device: so a
        conversion knows which is which.
        """

    @abstractmethod
    def join(self, twin: SplitLayer, float_type: type[nn.Module]) -> nn.Module:
        """The float layer of class `float_type` in the place of a twin whose layers are all in float again.

        What is an instance attribute of the twin, and not of the result, is copied to it later.
        """


# By class, or by "module.name" of a class whose library need not be installed.
_ADAPTERS: dict[type[nn.Module] | str, LayerAdapter[Any] | CompositeAdapter[Any]] = {}
# For classes that have no common base: asked if the class of a module is not among the above.
_MATCHING: list[tuple[Callable[[type[nn.Module]], bool], CompositeAdapter[Any]]] = []


def register_adapter(layer_type: type[nn.Module] | str, adapter: LayerAdapter[Any] | CompositeAdapter[Any]) -> None:
    """Let conversions know the layers of a class, and of subclasses that compute the same.

    >>> class Projection(nn.Module):  # x @ kernel + bias
    ...     def __init__(self, features: int) -> None:
    ...         super().__init__()
    ...         self.kernel, self.bias = nn.Parameter(torch.randn(features, features)), None
    ...
    ...     def forward(self, x):
    ...         return x @ self.kernel
    >>> class ProjectionAdapter(qkernels.LinearAdapter):
    ...     key, transposed = "kernel", True
    >>> qkernels.register_adapter(Projection, ProjectionAdapter())
    >>> len(qkernels.quantize_(nn.Sequential(Projection(64)), "w8a8").quantized)
    1

    Args:
        layer_type: the class, or its full name, such as "library.module.Class", so that it need not be imported.
        adapter: answers for the layers of that class.

    Raises:
        TypeError: for something else.
    """
    if not isinstance(layer_type, str) and not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise TypeError(f"layer_type must be a class of nn.Module or its full name, got {layer_type!r}")
    if not isinstance(adapter, LayerAdapter | CompositeAdapter):
        raise TypeError(f"adapter must be an instance of a LayerAdapter or CompositeAdapter, got {adapter!r}")
    _ADAPTERS[layer_type] = adapter


def register_matching(matches: Callable[[type[nn.Module]], bool], adapter: CompositeAdapter[Any]) -> None:
    """Let conversions know the layers of every class that `matches`, which is asked about classes unknown otherwise."""
    _MATCHING.append((matches, adapter))


def find_adapter(module: object) -> LayerAdapter[Any] | None:
    """The adapter of the nearest class of `module` that has one; None: it is no layer of one weight.

    >>> find_adapter(nn.ReLU()) is None
    True
    """
    adapter = _find(type(module))
    return adapter if isinstance(adapter, LayerAdapter) else None


def find_composite(layer_type: type[nn.Module]) -> CompositeAdapter[Any] | None:
    """The adapter of layers of several weights that knows the class; None: there is none."""
    adapter = _find(layer_type)
    if adapter is None:
        adapter = next((known for matches, known in _MATCHING if matches(layer_type)), None)
    return adapter if isinstance(adapter, CompositeAdapter) else None


def adapter_of(module: nn.Module) -> LayerAdapter[Any]:
    """Do as `find_adapter`, for a module that has one.

    >>> adapter_of(nn.Linear(3, 2)).shape(nn.Linear(3, 2))
    (2, 3)

    Raises:
        TypeError: if no adapter knows its class.
    """
    adapter = find_adapter(module)
    if adapter is None:
        raise TypeError(f"no layer adapter knows {type(module).__name__}")
    return adapter


def float_twin(quantized: Storage, weight: nn.Parameter, *, plain: bool = False) -> nn.Module:
    """The float layer in the place of a quantized one; they share the bias.

    Args:
        weight: float [N, K] of the result.
        plain: make an `nn.Linear` or `nn.Embedding`, and not what was quantized (such as a `Conv1D`).

    Raises:
        TypeError: if no adapter knows the class that was quantized.
    """
    float_type = type(quantized).float_type if plain else quantized.float_type
    adapter = _find(float_type)
    if not isinstance(adapter, LayerAdapter):
        raise TypeError(f"no layer adapter knows {float_type.__name__}, which {quantized} was before")
    return adapter.to_float(quantized, weight, float_type)


def is_frozen(module: nn.Module | None) -> bool:
    """True for a quantized layer whose weight is not trained."""
    return isinstance(module, Storage) and module.mode == "frozen"


def is_matrix(tensor: Tensor | None) -> bool:
    """True for a tensor with two dimensions or more that are longer than 1."""
    if tensor is None or nn.parameter.is_lazy(tensor):
        return False
    return sum(size > 1 for size in tensor.shape) > 1


def _full_name(layer_type: type) -> str:
    return f"{layer_type.__module__}.{layer_type.__qualname__}"


def other_forward(layer: nn.Module) -> str | None:
    """Why a layer may compute something else than its adapter takes it for; None: it computes that."""
    layer_type = parametrize.type_before_parametrizations(layer)
    known = _registered(layer_type)
    if known is not None and not _computes_the_same(layer_type, known):
        name = f"nn.{known.__name__}" if known.__module__.startswith("torch.nn.") else known.__name__
        return f"{layer_type.__name__} is a subclass of {name}: its forward may compute something else"
    return replaced_forward(layer)


def replaced_forward(layer: nn.Module) -> str | None:
    """Why a layer whose `forward` is an attribute of its own stays as it is; None: it has none."""
    if "forward" not in vars(layer):
        return None
    if hasattr(layer, "_hf_hook"):
        return "dispatched by accelerate (device_map, offload): quantize the model first, then dispatch it"
    return "forward is replaced on the instance"


def _find(layer_type: type) -> LayerAdapter[Any] | CompositeAdapter[Any] | None:
    known = _registered(layer_type)
    return None if known is None else _ADAPTERS.get(known) or _ADAPTERS[_full_name(known)]


def _registered(layer_type: type) -> type | None:
    """The nearest base class that an adapter is registered for."""
    bases = (base for base in layer_type.__mro__ if base in _ADAPTERS or _full_name(base) in _ADAPTERS)
    return next(bases, None)


def _computes_the_same(layer_type: type, known: type) -> bool:
    """True if a subclass adds nothing to `known` but its construction."""
    bases = layer_type.__mro__
    return {name for base in bases[: bases.index(known)] for name in vars(base)} <= _CONSTRUCTION
