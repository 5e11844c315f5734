"""ONNX files: the weights of `MatMulNBits` of onnxruntime, and those that `DequantizeLinear` makes floats of.

They are defined in https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md and
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html. A file holds a program, of which a `Checkpoint` keeps the
weights alone; `torch.onnx.export` writes one (`integrations.onnx`).
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

from .checkpoint import Checkpoint, FloatTensor
from .checkpoint_format import CheckpointFormat, Variant
from .folder import CONFIG, files_beside, read_config
from .losses import Losses
from .onnx_graph import OnnxGraph
from .onnx_weights import biases, weights

_QUANTIZING = ("QuantizeLinear", "DynamicQuantizeLinear")
_HOW = "read are MatMulNBits, and DequantizeLinear before MatMul, Gemm or Gather"


class OnnxFile(CheckpointFormat):
    """A .onnx file, with its external data."""

    name = "onnx"
    title = "ONNX"
    writes = False
    variants = (
        Variant("MatMulNBits of 2, 4 bits", "w4a16-gN, -asym", "exact", "exact", "written by torch.onnx.export"),
        Variant("MatMulNBits of 8 bits, symmetric", "w8a16-gN", "exact", "exact", "written by torch.onnx.export"),
        Variant("DequantizeLinear of int4, uint4, int8", "w4a16, w8a16, -gN, -asym", "exact", "exact", "likewise"),
        Variant(
            "floats or 8 bits as zero points", "w4a16-min, w8a16-min, -gN", "with a report", "no", "rounded to float32"
        ),
        Variant("scales of columns", "w8a16-g32, w4a16-g32", "requantized", "no"),
    )

    def detects(self, path: Path) -> bool:
        return path.is_file() and path.suffix == ".onnx"

    def open(self, path: Path, losses: Losses) -> Checkpoint:
        graph = OnnxGraph(path)
        layers = {weight.name: weight.layer(losses) for weight in weights(graph)}
        floats = {
            name: FloatTensor(info.shape, info.dtype, partial(graph.tensor, name))
            for name, info in graph.constants.items()
            if info.dtype.is_floating_point
        }
        own = biases(graph)
        floats |= {bias.name: FloatTensor(bias.shape, bias.dtype, bias.read) for bias in own}
        consumed = {name for layer in layers.values() for name in layer.tensors}
        consumed |= {name for bias in own for name in bias.names}
        for name, info in graph.constants.items():
            users = sorted({node.op_type for node, _ in graph.consumers[name]})
            is_weight = info.is_code or ("DequantizeLinear" in users and graph.is_dequantized(name))
            if is_weight and name not in consumed:
                described = f"{info.dtype} {list(info.shape)} of {', '.join(users) or 'nothing'}"
                raise ValueError(f"{name}, {described}, is not read: {_HOW}")
        if layers and any(node.op_type in _QUANTIZING for node in graph.nodes):
            warnings.warn(f"{path.name} quantizes activations too; these layers leave them float", stacklevel=3)
        floats = {name: tensor for name, tensor in floats.items() if name not in consumed}
        beside = path.parent if (path.parent / CONFIG).is_file() else None
        config = {} if beside is None else read_config(beside)
        config.pop("quantization_config", None)
        return Checkpoint(self.name, config, layers, floats, () if beside is None else files_beside(beside), path=path)
