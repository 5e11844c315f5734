"""What torch itself offers: float32, bfloat16, and its own int8."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear

from .candidate import FORWARD, GRAD_INPUT, OVERHEAD, Candidate, Case


class Float32(Candidate):
    """The layer as it is, on torch's default BLAS."""

    name, kind, weight_bits, tolerance = "torch float32", "float32", 32, 1e-5
    directions: tuple[str, ...] = (FORWARD, GRAD_INPUT, OVERHEAD)
    dtype = torch.float32

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        weight, bias = weight.to(self.dtype, copy=True), bias.to(self.dtype)
        if self.case.direction == GRAD_INPUT:
            return lambda grad: grad @ weight
        return lambda x: linear(x, weight, bias)


@contextmanager
def onednn_float32() -> Iterator[None]:
    """Products of float32 go to oneDNN."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class OneDnn(Float32):
    """float32 through oneDNN: allowing bfloat16 inside moves the product there, where the CPU may or may not use it."""

    name, tolerance = "torch float32 oneDNN", 1e-2
    directions = (FORWARD, GRAD_INPUT)

    def scope(self) -> AbstractContextManager[None]:
        return onednn_float32()


class BFloat16(Float32):
    name, kind, weight_bits, tolerance = "torch bfloat16", "bfloat16", 16, 1e-2
    dtype = torch.bfloat16

    def unavailable(self) -> str | None:
        from ..system.host import fast_bf16

        if not fast_bf16():
            return "this CPU has no bfloat16 instructions: torch would take many times as long as in float32"
        return super().unavailable()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias)


class CompiledBFloat16(BFloat16):
    name = "torch bfloat16 compiled"
    directions = (FORWARD,)
    _compiled: Callable[..., Tensor] | None = None

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        if self._compiled is None:
            torch.compiler.reset()  # or, after the shapes of several cases, it would give up and run eagerly
            self._compiled = torch.compile(_linear, dynamic=False)
        compiled, weight, bias = self._compiled, weight.to(self.dtype), bias.to(self.dtype)
        return lambda x: compiled(x, weight, bias)


class DynamicInt8(Candidate):
    """`torch.ao.quantization.quantize_dynamic`: 7-bit activations with one scale for the whole input."""

    kind, weight_bits, tolerance = "int8", 8, 0.05
    dtype = torch.float32  # it takes nothing else

    def __init__(self, case: Case, engine: str):
        super().__init__(case)
        self.name, self.engine = f"torch.ao int8 {engine}", engine

    def unavailable(self) -> str | None:
        if self.engine not in torch.backends.quantized.supported_engines:
            return f"this torch has no quantized engine {self.engine}"
        return super().unavailable()

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        layer = torch.nn.Linear(self.case.k, self.case.n)
        layer.weight.data, layer.bias.data = weight, bias
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.engine
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated, and says so several times
                return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), dtype=torch.qint8)
        finally:
            torch.backends.quantized.engine = before


class IntMm(Candidate):
    """`torch._int_mm`: the bare integer product, with neither the quantization of x nor the scales timed."""

    name, kind, weight_bits, tolerance = "torch._int_mm, bare", "int8", 8, 0.02
    dtype = torch.float32

    def convert_input(self, x: Tensor) -> Tensor:
        from ..formats.rules import quantize_activation

        quantized, self._x_scales = quantize_activation(x, "w8a8")
        return quantized

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        from ..kernels.quantizers import quantize_weight

        stored = quantize_weight(weight, "w8a8")
        self._w_scales, self._bias = stored.scales, bias
        transposed = stored.qweight.t()
        return lambda x: torch._int_mm(x, transposed)

    def convert_output(self, out: Tensor) -> Tensor:
        return out.to(torch.float32) * (self._x_scales * self._w_scales.t()) + self._bias


def baselines(case: Case, *, compiled: bool) -> list[Candidate]:
    """Every baseline; `compiled`: with torch.compile too, which takes seconds for each case."""
    return [
        Float32(case),
        OneDnn(case),
        BFloat16(case),
        *([CompiledBFloat16(case)] if compiled else []),
        *(DynamicInt8(case, engine) for engine in ("x86", "fbgemm", "onednn")),
        IntMm(case),
    ]
