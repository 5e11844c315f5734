"""What the layers share about their calls: the dtype of autocast, the check of the input, and what is refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

# Device types that autocast does not know. torch.amp.is_autocast_available would tell, but the Dynamo of torch 2.10
# cannot trace it.
_WITHOUT_AUTOCAST = ("meta", "vulkan", "lazy")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on devices of this type; None outside of autocast."""
    autocast = device_type not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else None


def refuse_write(what: str) -> RuntimeError:
    """The error for a write to the weight of a frozen layer."""
    return RuntimeError(
        f"{what}: the weight of a frozen quantized layer is read-only, because it is stored as integers and scales. "
        "Replace it with layer.set_weight(qkernels.quantize_weight(values, layer.scheme)); keep the layer in float "
        'with quantize_(model, ..., skip=[its name]); train it with mode="qat" or mode="int8"; or change a copy: '
        "layer.dequantize()"
    )


def check_input(x: Tensor, in_features: int) -> None:
    """Raise RuntimeError unless x is [..., in_features]."""
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(f"input must have shape [..., {in_features}], got {list(x.shape)}")


def refuse_script(layer: nn.Module) -> NoReturn:
    """Raise RuntimeError; `torch.jit.script` calls this first."""
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(layer).__name__}; use torch.export, torch.compile, or "
        "torch.jit.trace under torch.no_grad()"
    )


def traced(layer: nn.Module, proxy: Any) -> Any:
    """A call of the layer with a proxy of `torch.fx`: one node of the graph, as that of torch's own layers.

    Raises:
        TypeError: for anything else that is no tensor.
    """
    tracer = getattr(proxy, "tracer", None)
    if tracer is None:
        raise TypeError(f"input must be a tensor, got {type(proxy).__name__}")
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (proxy,), {})
