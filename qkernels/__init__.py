"""qkernels: int8 and int4 linear layers for PyTorch, with straight-through gradients."""

from . import integrations, testing
from .convert import QuantizationReport, freeze_, quantize_
from .dequantize import dequantize_
from .embedding import QuantEmbedding
from .loss import linear_cross_entropy
from .nn import QuantLinear
from .patch import patch_loss
from .quantize import QuantizedWeight
from .quantizers import dequantize_weight, quantize_activation, quantize_weight
from .schemes import QuantScheme
from .smooth import smooth_

__version__ = "0.1.0"

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "QuantScheme",
    "QuantizationReport",
    "QuantizedWeight",
    "dequantize_",
    "dequantize_weight",
    "freeze_",
    "linear_cross_entropy",
    "patch_loss",
    "quantize_",
    "quantize_activation",
    "quantize_weight",
    "smooth_",
    "testing",
]

integrations.register()


def __getattr__(name: str):
    if name == "QKernelsConfig":  # on first use, because it imports transformers
        return integrations.load("transformers").QKernelsConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
