"""Other libraries with int8 or int4 linear layers; `pip install -r benchmarks/peers.txt` brings them.

Each adapter uses the library as its documentation tells a user to, and its error is recorded beside its time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .candidate import FORWARD, GRAD_INPUT, Candidate, Case

INT8_TOLERANCE, INT4_TOLERANCE = 0.03, 0.2
GROUP = 128
MAX_COPIES = 128  # of a session or a compiled graph, each with threads of its own


def _float_layer(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    layer.weight.data, layer.bias.data = weight.to(dtype, copy=True), bias.to(dtype, copy=True)
    return layer.requires_grad_(False).eval()


def _not_a_multiple(in_features: int, group: int) -> str | None:
    return f"in_features is not a multiple of {group}" if in_features % group else None


class _TorchAo(Candidate):
    module = "torchao"

    def config(self) -> Any:
        raise NotImplementedError

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        from torchao.quantization import quantize_

        model = nn.Sequential(_float_layer(weight, bias, self.dtype))
        quantize_(model, self.config())
        return model


class TorchAoInt8(_TorchAo):
    """Dynamic int8 activations per token, eager."""

    name, kind, weight_bits, tolerance = "torchao int8", "int8", 8, INT8_TOLERANCE

    def config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()


class TorchAoInt4(_TorchAo):
    """int4 weights, bfloat16 activations (the other float types run a scalar loop)."""

    name, kind, weight_bits, tolerance = "torchao int4", "bfloat16", 4 + 32 / GROUP, INT4_TOLERANCE
    dtype = torch.bfloat16

    def unavailable(self) -> str | None:
        return _not_a_multiple(self.case.k, GROUP) or super().unavailable()

    def config(self) -> Any:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP)


class _BitsAndBytes(Candidate):
    """Dequantizes the weight and multiplies in float; the one peer with a gradient."""

    module = "bitsandbytes"
    directions: tuple[str, ...] = (FORWARD, GRAD_INPUT)

    def layer(self, weight: Tensor, bias: Tensor) -> nn.Module:
        raise NotImplementedError

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        if self.case.direction == FORWARD:
            return self.layer(weight, bias).eval()
        layer = self.layer(weight, bias)
        x = torch.zeros(self.case.m, self.case.k, dtype=self.dtype, device=weight.device, requires_grad=True)
        with torch.enable_grad():
            out = layer(x)
        return lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


class BitsAndBytesNf4(_BitsAndBytes):
    name, weight_bits, tolerance = "bitsandbytes nf4", 4.5, INT4_TOLERANCE

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.case.dtype

    def layer(self, weight: Tensor, bias: Tensor) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        n, k = weight.shape
        layer = Linear4bit(k, n, compute_dtype=self.dtype, quant_type="nf4")
        layer.weight = Params4bit(weight.cpu().to(self.dtype), requires_grad=False, quant_type="nf4")
        layer.bias = nn.Parameter(bias.to(self.dtype), requires_grad=False)
        return layer.to(weight.device)


class BitsAndBytesInt8(_BitsAndBytes):
    name, kind, weight_bits, tolerance = "bitsandbytes int8", "int8", 8, INT8_TOLERANCE
    directions = (FORWARD,)

    @contextmanager
    def scope(self) -> Iterator[None]:
        logger = logging.getLogger("bitsandbytes.autograd._functions")  # it warns at every call
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)

    def layer(self, weight: Tensor, bias: Tensor) -> nn.Module:
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        n, k = weight.shape
        layer = Linear8bitLt(k, n, has_fp16_weights=False)
        layer.weight = Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
        layer.bias = nn.Parameter(bias.to(self.dtype), requires_grad=False)
        return layer.to(weight.device)


class OnnxRuntime(Candidate):
    """The operator MatMulNBits with int8 activations inside (accuracy level 4) and bias, in a session of its own."""

    name, kind, weight_bits, tolerance = "onnxruntime int4", "int8", 4 + 32 / 32, INT4_TOLERANCE
    module = "onnxruntime"
    max_copies = MAX_COPIES
    dtype = torch.float32
    block = 32
    _model: bytes | None = None

    def convert_input(self, x: Tensor) -> Any:
        return {"x": x.numpy()}

    def convert_output(self, out: Any) -> Tensor:
        return torch.from_numpy(out[0])

    def unavailable(self) -> str | None:
        return _not_a_multiple(self.case.k, self.block) or super().unavailable()

    def model(self, weight: Tensor, bias: Tensor) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        from ..kernels.quantizers import quantize_weight

        n, k = weight.shape
        stored = quantize_weight(weight, f"w4a16-g{self.block}-asym")  # its nibbles, low one first, are the operator's
        assert stored.zeros is not None
        zeros = torch.nn.functional.pad(stored.zeros, (0, stored.zeros.shape[1] % 2))
        constants = {
            "w": stored.qweight.reshape(n, k // self.block, self.block // 2),
            "scales": stored.scales,
            "zeros": zeros[:, 0::2] | zeros[:, 1::2] << 4,
            "bias": bias,
        }
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "scales", "zeros", "", "bias"],
            ["out"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=self.block,
            accuracy_level=4,
        )
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.case.m, k])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, [self.case.m, n])],
            [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Any], Any]:
        import onnxruntime

        if self._model is None:
            self._model = self.model(weight, bias)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.case.threads
        session = onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])
        return lambda feed: session.run(None, feed)


class _OpenVino(Candidate):
    """A compiled graph of compressed weight, product and bias; with VNNI it quantizes activations by groups."""

    kind = "int8"
    module = "openvino"
    max_copies = MAX_COPIES
    dtype = torch.float32
    element_type: str
    _model: Any = None

    def convert_input(self, x: Tensor) -> Any:
        return x.numpy()

    def convert_output(self, out: Any) -> Tensor:
        return torch.from_numpy(out[0])

    def unavailable(self) -> str | None:
        return _not_a_multiple(self.case.k, GROUP) or super().unavailable()

    def model(self, weight: Tensor, bias: Tensor) -> Any:
        import openvino as ov
        from openvino import opset13 as op

        n, k = weight.shape
        groups, largest = (1, 127) if self.element_type == "i8" else (k // GROUP, 7)
        grouped = weight.reshape(n, groups, k // groups)
        scales = grouped.abs().amax(-1, keepdim=True) / largest
        integers = (grouped / scales).round().to(torch.int8).numpy()
        stored = op.constant(integers, dtype=getattr(ov.Type, self.element_type))
        half = op.convert(stored, ov.Type.f16)
        scaled = op.multiply(half, op.constant(scales.to(torch.float16).numpy()))
        matrix = op.convert(op.reshape(scaled, [n, k], special_zero=False), ov.Type.f32)
        x = op.parameter([self.case.m, k], ov.Type.f32)
        product = op.matmul(x, matrix, transpose_a=False, transpose_b=True)
        return ov.Model([op.add(product, op.constant(bias.numpy().reshape(1, n)))], [x])

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Any], Any]:
        import openvino as ov

        if self._model is None:
            self._model = self.model(weight, bias)
        settings = {
            "INFERENCE_NUM_THREADS": self.case.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        }
        request = ov.compile_model(self._model, "CPU", settings).create_infer_request()
        return lambda array: request.infer([array], share_inputs=True, share_outputs=True)


class OpenVinoInt8(_OpenVino):
    name, weight_bits, tolerance, element_type = "openvino int8", 8, INT8_TOLERANCE, "i8"


class OpenVinoInt4(_OpenVino):
    name, weight_bits, tolerance, element_type = "openvino int4", 4 + 16 / GROUP, INT4_TOLERANCE, "i4"


class AutoRound(Candidate):
    """Intel's kernels behind AutoRound: int4 weights in groups, computing in what the library chooses."""

    name, kind, weight_bits, tolerance = "auto-round int4", "int8", 4 + 32 / GROUP, INT4_TOLERANCE
    module = "auto_round_kernel"
    dtype = torch.float32

    def unavailable(self) -> str | None:
        if self.case.threads != os.cpu_count():
            return "it runs on all cores, whatever torch uses"
        return _not_a_multiple(self.case.k, GROUP) or super().unavailable()

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        import auto_round_kernel

        n, k = weight.shape
        grouped = weight.reshape(n, k // GROUP, GROUP)
        scales = grouped.abs().amax(-1) / 7
        integers = (grouped / scales.unsqueeze(-1)).round().to(torch.int8).reshape(n, k)
        format = ("auto", "int4", "fp32", False)  # compute, weight, scales, zero points
        packed = auto_round_kernel.repack_quantized_weight(
            integers.t().contiguous(), scales.t().contiguous(), torch.empty(0, dtype=torch.int8), GROUP, *format
        )
        return lambda x: auto_round_kernel.woqgemm(x, packed, bias, n, k, GROUP, *format)


def peers(case: Case) -> list[Candidate]:
    """Every adapter; whether its library is here is asked by `unavailable`."""
    from .ggml import formats

    adapters = (
        TorchAoInt8,
        TorchAoInt4,
        BitsAndBytesNf4,
        BitsAndBytesInt8,
        OnnxRuntime,
        OpenVinoInt8,
        OpenVinoInt4,
        AutoRound,
    )
    return [adapter(case) for adapter in adapters] + formats(case)
