"""qkernels itself: the operators and the module, verified against the reference before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedRows, QuantizedWeight, StoredWeight
from ..kernels import ops, reference
from ..kernels.quantizers import quantize_activation, quantize_weight
from ..nn.linear import QuantLinear
from ..profiling.roofline import MatmulCost
from .candidate import FORWARD, GRAD_INPUT, OVERHEAD, Candidate, Case

# Of float products (a16 schemes, gradients): the largest error over the root mean square of the reference. Both round
# sums of K products and, in bfloat16, perhaps the weight (2^-9) and for certain the result, which may be 5 times its
# root mean square.
FLOAT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


class WrongResult(RuntimeError):
    """A kernel of ours does not compute what the reference says; nothing is timed then."""


class Operator(Candidate):
    """`ops.linear` or `ops.linear_grad_input` of one scheme."""

    directions: tuple[str, ...] = (FORWARD, GRAD_INPUT, OVERHEAD)
    tolerance = float("inf")  # it is verified against the reference instead

    def __init__(self, case: Case, scheme: str):
        super().__init__(case)
        self.scheme = QuantScheme.parse(scheme)
        self.name = scheme
        self._stored: QuantizedWeight | None = None

    def stored(self, weight: Tensor) -> QuantizedWeight:
        """The quantized weight, the same for every call."""
        if self._stored is None:
            self._stored = quantize_weight(weight, self.scheme)
        return self._stored

    def product(self) -> MatmulCost:
        case = self.case
        gradient = case.direction == GRAD_INPUT
        return MatmulCost.of(case.m, case.n, case.k, self.scheme.name, case.dtype, gradient=gradient)

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Any], Tensor]:
        stored = self.stored(weight).map(Tensor.clone)
        name, in_features = self.scheme.name, self.case.k
        if self.case.direction == GRAD_INPUT:
            return lambda grad: ops.linear_grad_input(grad, *stored, in_features, name)
        return lambda x: ops.linear(x, *stored, bias, name)

    def verify(self, x: Any, out: Tensor, weight: Tensor, bias: Tensor) -> str:
        """Compare rows of `out` with the reference on the same rows of x; say how they compare.

        Raises:
            WrongResult: unless they are equal (a8 forward) or, but for the last place of a value, within
                `FLOAT_TOLERANCE`.
        """
        case, known = self.case, StoredWeight(*self.stored(weight), self.case.k, self.scheme)
        if case.direction == GRAD_INPUT:
            expected = reference.linear_grad_input(x, known)
        else:
            expected = reference.linear(x, known, bias)
        if case.direction != GRAD_INPUT and self.scheme.int_activations:
            return self._expect_equal(out, expected)
        expected = expected.to(torch.float32)
        # Both are rounded to the dtype, for the largest values by more than the tolerance.
        excess = (out.to(torch.float32) - expected).abs() - torch.finfo(out.dtype).eps * expected.abs()
        worst = (excess.clamp(min=0).max() / expected.square().mean().sqrt()).item()
        if not worst <= FLOAT_TOLERANCE[self.dtype]:
            raise WrongResult(
                f"{self.name}, {case}: off by {worst:.3g} times the root mean square, "
                f"allowed {FLOAT_TOLERANCE[self.dtype]:g}"
            )
        return f"within {FLOAT_TOLERANCE[self.dtype]:g} of the reference"

    def _expect_equal(self, out: Tensor, expected: Tensor) -> str:
        differing = int((out != expected).sum())
        if differing or out.dtype != expected.dtype:
            raise WrongResult(
                f"{self.name}, {self.case}: {differing} of {out.numel()} values differ from the reference"
            )
        return "equal to the reference"


class IntGradient(Operator):
    """`ops.int_grad_input` of an a8 scheme, on a gradient that was quantized before."""

    directions = (GRAD_INPUT,)

    def __init__(self, case: Case, scheme: str):
        super().__init__(case, scheme)
        self.name = f"{scheme} int8"

    def product(self) -> MatmulCost:
        case = self.case
        product = MatmulCost.of(case.m, case.n, case.k, self.scheme.name, case.dtype)
        return replace(product, activation_bytes=case.m * (case.n + case.k * self.dtype.itemsize))

    def convert_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8 rows and their scales; those of an ungrouped weight, which `prepare` stored, are folded in."""
        if self.scheme.group_size is None:
            assert self._stored is not None
            x = x * self._stored.scales.t()
        q, scales = quantize_activation(x, "w8a8")
        return q, scales[:, 0]

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Any], Tensor]:
        stored, k, name = self.stored(weight).map(Tensor.clone), self.case.k, self.scheme.name
        column_scales = None if self.scheme.row_scaled else ops.column_scales(*stored, k, name)

        def call(grad: tuple[Tensor, Tensor]) -> Tensor:
            q, scales = grad
            return ops.int_grad_input(q, scales, *stored, k, name, column_scales, out_dtype=self.dtype)

        return call

    def verify(self, x: Any, out: Tensor, weight: Tensor, bias: Tensor) -> str:
        known = StoredWeight(*self.stored(weight), self.case.k, self.scheme)
        column_scales = None if self.scheme.row_scaled else reference.column_scales(known)
        expected = reference.int_grad_input(QuantizedRows(*x), known, column_scales, self.dtype)
        return self._expect_equal(out, expected)


class Module(Operator):
    """`QuantLinear` in inference: what the module adds to the call of the operator."""

    directions = (OVERHEAD,)

    def __init__(self, case: Case, scheme: str):
        super().__init__(case, scheme)
        self.name = f"{scheme} QuantLinear"

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Any], Tensor]:
        layer = QuantLinear(self.case.k, self.case.n, scheme=self.scheme, device=weight.device).requires_grad_(False)
        layer.set_weight(self.stored(weight))
        layer.bias.copy_(bias)
        return layer
