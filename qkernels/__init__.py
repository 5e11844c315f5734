"""qkernels: int8 and int4 linear layers for PyTorch, with straight-through gradients."""

from . import integrations, testing
from .convert.dequantize import dequantize_
from .convert.model import freeze_, quantize_
from .convert.report import QuantizationReport
from .convert.static import convert_, prepare_
from .diagnostics.compare import compare, compare_merge
from .diagnostics.inspection import inspect
from .formats.scheme import QuantScheme
from .formats.storage import QuantizedWeight
from .integrations.exporting import export
from .integrations.fused_loss import patch_loss
from .integrations.loading import load, load_tokenizer
from .integrations.onnx_weights import onnx_weights
from .kernels import isa, ops
from .kernels.quantizers import dequantize_weight, quantize_activation, quantize_weight
from .nn import expert_families as _expert_families  # noqa: F401  it registers them
from .nn.adapters import CompositeAdapter, LayerAdapter, SplitLayer, register_adapter
from .nn.attention import QuantMultiheadAttention
from .nn.conv import QuantConv1d, QuantConv2d
from .nn.embedding import QuantEmbedding
from .nn.experts import QuantExperts
from .nn.grouped_linear import QuantGroupedLinear
from .nn.layer_adapters import LinearAdapter
from .nn.linear import QuantLinear
from .nn.loss import linear_cross_entropy
from .nn.recurrent import QuantGRU, QuantGRUCell, QuantLSTM, QuantLSTMCell, QuantRNN, QuantRNNCell
from .ptq.smoothquant import smooth_
from .version import __version__ as __version__

__all__ = [
    "CompositeAdapter",
    "LayerAdapter",
    "LinearAdapter",
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantExperts",
    "QuantGRU",
    "QuantGRUCell",
    "QuantGroupedLinear",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantRNN",
    "QuantRNNCell",
    "QuantScheme",
    "QuantizationReport",
    "QuantizedWeight",
    "SplitLayer",
    "compare",
    "compare_merge",
    "convert_",
    "dequantize_",
    "dequantize_weight",
    "export",
    "freeze_",
    "inspect",
    "isa",
    "linear_cross_entropy",
    "load",
    "load_tokenizer",
    "onnx_weights",
    "ops",
    "patch_loss",
    "prepare_",
    "quantize_",
    "quantize_activation",
    "quantize_weight",
    "register_adapter",
    "smooth_",
    "testing",
]

integrations.register()


def __getattr__(name: str) -> object:
    if name == "QKernelsConfig":  # on first use, because it imports transformers
        return integrations.load("transformers").QKernelsConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
