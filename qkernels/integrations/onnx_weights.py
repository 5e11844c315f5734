"""`onnx_weights`: in which operators `torch.onnx.export` writes the weights of `a16` layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

Form = Literal["dequantize", "matmul_nbits", "qdq"]
_FORMS = ("dequantize", "matmul_nbits", "qdq")
_LEVELS = (0, 1, 2, 3, 4)


class WeightForm(NamedTuple):
    """What `onnx_weights` was told."""

    form: str
    accuracy_level: int


_DEFAULT = WeightForm("dequantize", 0)
_chosen: ContextVar[WeightForm] = ContextVar("onnx_weights", default=_DEFAULT)


def chosen() -> WeightForm:
    """The form of weights where this is called."""
    return _chosen.get()


@contextmanager
def onnx_weights(form: Form, accuracy_level: int = 0) -> Iterator[None]:
    """Choose how `torch.onnx.export(..., dynamo=True)` writes the linear layers of `a16` schemes.

    No form rounds a weight: the file holds the integers, scales and zero points of the layers.

    Args:
        form: "dequantize": `DequantizeLinear` of rows and `Gemm`, which every runtime has and computes in floats.
            "matmul_nbits": `MatMulNBits` of onnxruntime (domain com.microsoft), whose weight stays packed in memory.
            "qdq": `DequantizeLinear` in blocks of columns and `MatMul`, of opset 21 on, which runtimes fuse to a
            product of packed weights. onnxruntime then rounds activations to int8, unless its session option
            `session.qdq_matmulnbits_accuracy_level` is 1.
        accuracy_level: of `MatMulNBits`: 0 or 1 for float products, 4 to allow int8 activations, in blocks; 2 and 3
            stand for float16 and bfloat16.

    Raises:
        ValueError: for another form or level, or a level without `MatMulNBits`.

    Example:
        >>> import torch
        >>> import qkernels as qk
        >>> layer = qk.QuantLinear.from_float(torch.nn.Linear(64, 32), "w4a16-g32")
        >>> with qk.onnx_weights("matmul_nbits"):
        ...     program = torch.onnx.export(layer, (torch.randn(2, 64),), dynamo=True, verbose=False)
        >>> [node.op_type for node in program.model.graph if node.domain == "com.microsoft"]
        ['MatMulNBits']
    """
    if form not in _FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, _FORMS))}, got {form!r}")
    if accuracy_level not in _LEVELS:
        raise ValueError(f"accuracy_level must be one of {_LEVELS}, got {accuracy_level!r}")
    if accuracy_level and form != "matmul_nbits":
        raise ValueError(f"accuracy_level must be 0 for form {form!r}, got {accuracy_level}")
    token = _chosen.set(WeightForm(form, accuracy_level))
    try:
        yield
    finally:
        _chosen.reset(token)
