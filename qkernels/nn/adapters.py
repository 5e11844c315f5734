"""Layer adapters: what a conversion asks about the layers of a class, and the registry that answers for a class.

Everything that looks for layers in a model (`quantize_`, `dequantize_`, the integrations, `explain`) asks
`find_adapter(module)` instead of naming classes. Adapters of torch's and transformers' layers are in
`layer_adapters.py`; another library registers its own with `register_adapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, MAX_REDUCTION
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
    """

    key: str = "weight"
    transposed: bool = False
    lookup: bool = False

    def weights(self, layer: _L) -> dict[str, Tensor]:
        """By name of its parameter, each weight of the layer, detached: [N, K], or [E, N, K] of E experts.

        All of them are checked before a layer is quantized. A layer has the one of `weight` unless this is overridden.
        """
        return {self.key: self.weight(layer)}

    def weight(self, layer: _L) -> Tensor:
        """The weight, detached: float [N, K], a view of the parameter."""
        weight: Tensor = getattr(layer, self.key).detach()
        return weight.t() if self.transposed else weight

    def shape(self, layer: _L) -> tuple[int, ...]:
        """Shape of the weight: (N, K)."""
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
        names = set(layer._parameters)
        if parametrize.is_parametrized(layer) or self.key not in names or not names <= {self.key, "bias"}:
            return "parametrized weight"
        known = _registered(type(layer))
        if known is not None and not _computes_the_same(type(layer), known):
            name = f"nn.{known.__name__}" if known.__module__.startswith("torch.nn.") else known.__name__
            return f"{type(layer).__name__} is a subclass of {name}: its forward may compute something else"
        if "forward" in vars(layer):
            return "forward is replaced on the instance"
        weight = layer._parameters[self.key]
        if weight is None or weight.dtype not in FLOAT_DTYPES:
            return "no weight" if weight is None else f"{weight.dtype} weight"
        if type(weight) not in (Tensor, nn.Parameter):
            name = type(weight).__name__
            return f"weight is a {name}: " + (
                "quantize the model before it is sharded" if name == "DTensor" else "only plain tensors are quantized"
            )
        in_features = self.shape(layer)[-1]
        if in_features == 0 or (scheme.int_activations and in_features > MAX_REDUCTION):
            return f"in_features {in_features} is not in 1..{MAX_REDUCTION}"
        return None

    @abstractmethod
    def quantize(self, layer: _L, scheme: str | QuantScheme, **layer_options: str) -> Storage:
        """The quantized twin of a float layer, which shares its bias.

        Args:
            layer_options: mode, grad_dtype and weight_scale, as in `QuantLinear`.

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


# By class, or by "module.name" of a class whose library need not be installed.
_ADAPTERS: dict[type[nn.Module] | str, LayerAdapter[Any]] = {}


def register_adapter(layer_type: type[nn.Module] | str, adapter: LayerAdapter[Any]) -> None:
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
    if not isinstance(adapter, LayerAdapter):
        raise TypeError(f"adapter must be an instance of a LayerAdapter, got {adapter!r}")
    _ADAPTERS[layer_type] = adapter


def find_adapter(module: object) -> LayerAdapter[Any] | None:
    """The adapter of the nearest class of `module` that has one; None: it is no layer that can be quantized.

    >>> find_adapter(nn.ReLU()) is None
    True
    """
    return _find(type(module))


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
    if adapter is None:
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


def _find(layer_type: type) -> LayerAdapter[Any] | None:
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
