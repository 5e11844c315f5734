"""`GraphNodes`: nodes of ONNX operators on their way into a graph."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import evaluator
from torch import Tensor

from ..formats.rules import TINY, inverse_of

OFFSET = 128  # of a signed byte, where it stands as an unsigned one
_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


class GraphNodes:
    """Nodes on their way into a graph.

    Args:
        prefix: of the names of the values, which must differ from those of any graph around this one.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a new node of the operator `op_type`; an input may be left out."""
        return self.add_of("", op_type, *inputs, **attributes)

    def add_of(self, domain: str, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """As `add`, for an operator that is not of the standard."""
        output = ir.Value(name=f"{self.prefix}_{len(self.nodes)}")
        attributes_ir = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node(domain, op_type, inputs, attributes_ir, outputs=[output]))
        return output

    def constant(self, value: Any, dtype: Any = np.float32) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.array(value, dtype=dtype)))

    def integers(self, *values: int) -> ir.Value:
        """A shape, or axes: int64 [n]."""
        return self.constant(values, np.int64)

    @functools.cached_property
    def offset(self) -> ir.Value:
        """What stands for 0 in unsigned bytes."""
        return self.constant(OFFSET, np.uint8)

    def matmul_integer(
        self, x: ir.Value, weight: ir.Value, zeros: ir.Value, offset: ir.Value | None = None
    ) -> ir.Value:
        """The exact product as floats: uint8 x [M, K], whose zero point is `offset`, and uint8 weight [K, N]."""
        return self.cast(self.add("MatMulInteger", x, weight, offset or self.offset, zeros), _FLOAT)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return x if x.dtype == dtype else self.add("Cast", x, to=int(dtype))

    def pad_columns(self, x: ir.Value, columns: int, padded: int) -> ir.Value:
        """A float matrix with zeros behind its `columns`, so that they are `padded`."""
        missing = padded - columns
        return x if missing == 0 else self.add("Pad", x, self.integers(0, 0, 0, missing), self.constant(0.0))

    def quantize(
        self, x: ir.Value, x_scale: Tensor | None, axes: tuple[int, ...] = (-1,)
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Rules 1 and 2, or 13, over axes: uint8 integers plus 128 of the shape of x, scales and faults [..., 1].

        A fault is NaN where a value is Inf or NaN, and else 0. It is added to sums of products before they are
        multiplied by the scale, which also keeps onnxruntime from a fused operator that rounds otherwise.

        Args:
            x_scale: the scale [1] of static activations; None: the scales are found here.
        """
        along = self.integers(*axes)
        faults = self.add("ReduceSum", self.add("Mul", x, self.constant(0.0)), along, keepdims=1)
        if x_scale is not None:
            scales, inverse = (self.constant(scale.numpy()) for scale in (x_scale, inverse_of(x_scale)))
            return self._rounded(x, inverse), scales, faults
        absmax = self.add("ReduceMax", self.add("Abs", x), along, keepdims=1)
        usable = self.add("GreaterOrEqual", absmax, self.constant(TINY))
        one, levels = self.constant(1.0), self.constant(127.0)
        safe = self.add("Where", usable, absmax, one)
        scales = self.add("Where", usable, self.add("Div", safe, levels), one)
        inverse = self.add("Where", usable, self.add("Div", levels, safe), self.constant(0.0))
        return self._rounded(x, inverse), scales, faults

    def _rounded(self, x: ir.Value, inverse: ir.Value) -> ir.Value:
        rounded = self.add("Round", self.add("Mul", x, inverse))
        clipped = self.add("Clip", rounded, self.constant(-127.0), self.constant(127.0))
        return self.cast(self.add("Add", clipped, self.constant(OFFSET)), _UINT8)

    def done(self, output: ir.Value) -> ir.Value:
        """Hand the nodes to the exporter."""
        evaluator.default().nodes.extend(self.nodes)
        return output
