"""The weight of a base layer that stores integers, as PEFT reads and writes it: as a float tensor."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from ...formats.storage import QuantizedWeight
from ...kernels.quantizers import quantize_weight
from ...nn.adapters import adapter_of, float_twin
from ...nn.linear import relative_error, stored_columns
from ...nn.matrix_layer import MatrixLayer
from ...nn.storage import Storage

# What PEFT leaves on a base layer, from a pass over data, for the creation of an adapter.
_PREPARED = ("eigens", "_peft_loraga_grad")
_register_parameter = nn.Module.register_parameter


def stores_integers(layer: nn.Module | None) -> bool:
    """True for a quantized layer whose weight is one matrix of integers, and not a float parameter."""
    return isinstance(layer, Storage) and layer.mode != "qat" and not layer.leading  # experts: experts.py


def tensors_of(base: Storage) -> dict[str, Tensor]:
    """By name, what the base layer stores now; later writes through `put_weight` do not reach it."""
    stored = {name: tensor for name, tensor in base.quantized_weight()._asdict().items() if tensor is not None}
    bias = getattr(base, "bias", None)
    tensors = {name: tensor.detach() for name, tensor in (stored if bias is None else {**stored, "bias": bias}).items()}
    return tensors if base.mode == "frozen" else {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def put_weight(base: Storage, weight: QuantizedWeight) -> None:
    """Make `weight` that of a frozen layer, or of one of mode "int8", whose parameter stays the same one.

    Its columns have the order in which the layer stores them: `stored_columns`.

    Raises:
        RuntimeError: for mode "qat", whose float weight is written to itself.
    """
    if base.mode == "qat":
        raise RuntimeError('the weight of a layer of mode "qat" is its parameter: write to that')
    if base.mode == "frozen":
        order = base._buffers.get("input_order")
        with _registered_as_given():
            base.set_weight(weight)
        base._order_input(order)
        return
    for own, new in zip(base.quantized_weight(), weight, strict=True):
        if own is not None and new is not None:
            own.copy_(new)


def float_copy(base: Storage, values: Tensor) -> nn.Module:
    """An `nn.Linear` or the like in the place of the base layer, with a weight that can be written to.

    Args:
        values: float [N, K].
    """
    with _registered_as_given():
        twin = float_twin(base, nn.Parameter(values, requires_grad=False), plain=True)
    for name in _PREPARED:
        if hasattr(base, name):
            setattr(twin, name, getattr(base, name))
    return twin


def _values(base: Storage) -> Tensor:
    """The weight [N, K] of a base layer as PEFT reads it: of mode "qat" the one that is trained."""
    if isinstance(base, MatrixLayer) and base.mode == "qat":
        return base._rows(base._trained_weight().detach()).to(torch.float32, copy=True)
    return base.dequantize()


def innermost(layer: Any) -> Any:
    """The PEFT layer that holds the base layer: with several methods at once, one layer holds another."""
    while isinstance(layer.base_layer, BaseTunerLayer):
        layer = layer.base_layer
    return layer


@contextlib.contextmanager
def float_base(layer: BaseTunerLayer) -> Iterator[None]:
    """In this context the base of a PEFT layer is a float copy; what was written to it is then quantized and stored.

    The base gets the attribute `initialization_error` if it has changed: how far its weight, with the adapter, is
    from the one before, relative to that.
    """
    base, holder = layer.get_base_layer(), innermost(layer)
    twin = holder.base_layer = float_copy(base, _values(base))
    try:
        yield
    finally:
        holder.base_layer = base
    for name in _PREPARED:
        if hasattr(base, name):
            delattr(base, name)
    before, after = _values(base), adapter_of(twin).weight(twin).to(torch.float32)
    if after.is_meta or torch.equal(before, after):
        return
    put_weight(base, quantize_weight(stored_columns(base, after), base.scheme))
    base.__dict__["initialization_error"] = relative_error(after, base) * (after.norm() / before.norm()).item()
    warnings.warn(
        "this initialization changes the weight of the base, which is rounded again; "
        "qkernels.integrations.peft.initialization_errors(model) gives the relative error of each layer, and it is "
        "smaller if the adapter is created on the float model, which quantize_ then quantizes",
        stacklevel=2,
    )


class QKernelsBackend(QuantizationBackend):
    """PEFT's access to the weight of a layer of qkernels: it is dequantized when read, and quantized when written.

    PEFT calls it for some methods, and shows its name in `get_layer_status`.

    Example:
        >>> from peft.utils import resolve_quantization_backend
        >>> layer = qk.QuantLinear.from_float(nn.Linear(8, 4), "w8a8")
        >>> backend = resolve_quantization_backend(layer)
        >>> backend.backend_name, backend.get_base_weight(layer).shape
        ('qkernels', torch.Size([4, 8]))
    """

    supports_merge = True
    backend_name = "qkernels"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The weight as it is multiplied, in the shape of the float layer's and of the layer's compute dtype."""
        if isinstance(base_layer, MatrixLayer):
            return base_layer._from_rows(base_layer.dequantize().to(base_layer.compute_dtype))
        return base_layer.weight.data  # type: ignore[return-value]  # a float copy, during creation or a merge

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantize a float weight of that shape with the scheme of the base layer, and store it."""
        base = peft_layer.get_base_layer()
        if isinstance(base, MatrixLayer):
            put_weight(base, quantize_weight(stored_columns(base, base._rows(weight_data)), base.scheme))
        else:
            base.weight.data = weight_data


def _resolve_first(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `resolve_quantization_backend`, which knows layers of qkernels too."""

    @functools.wraps(resolve)
    def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
        if stores_integers(base_layer) and not adapter_of(base_layer).lookup:
            return QKernelsBackend()
        return resolve(base_layer, **kwargs)

    return resolve_quantization_backend


@contextlib.contextmanager
def _registered_as_given() -> Iterator[None]:
    """Undo, for a moment, accelerate's `init_empty_weights`, which would take the values of new parameters away."""
    patched = nn.Module.register_parameter
    nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = patched  # type: ignore[method-assign]


def replace_everywhere(name: str, value: Any) -> None:
    """Give every module of PEFT that has imported the function `name` another one."""
    for module_name, module in list(sys.modules.items()):
        if (module_name == "peft" or module_name.startswith("peft.")) and hasattr(module, name):
            setattr(module, name, value)


def install() -> None:
    """Make layers of qkernels known to PEFT."""
    from peft.utils import quantization_utils

    replace_everywhere("resolve_quantization_backend", _resolve_first(quantization_utils.resolve_quantization_backend))
