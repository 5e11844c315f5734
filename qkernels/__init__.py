"""qkernels: int8 and int4 linear layers for PyTorch, with straight-through gradients."""

from .nn import QuantLinear
from .quantize import QuantizedWeight, dequantize_weight, quantize_activation, quantize_weight
from .schemes import QuantScheme

__version__ = "0.1.0"

__all__ = [
    "QuantLinear",
    "QuantScheme",
    "QuantizedWeight",
    "dequantize_weight",
    "quantize_activation",
    "quantize_weight",
]
