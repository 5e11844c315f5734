"""The layer that is checked, its inputs, and how far from the exact result it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .report import FAILED, OK, Outcome, compare, equal, same_bits

ROWS = 70  # of the inputs: more than the kernels for few rows take
_PROBE_ROWS = 512
_SUM_ROUNDOFF = 2.0**-23  # float32 sums, whatever the order; taken for faithful, as bfloat16 instructions only are
_EXTRA_ROUNDINGS = 8  # scales, bias, sums over groups
_SEEDS = 32  # of a stochastic gradient
_NOISE = 1.5  # allowed over what chance explains of the mean of a stochastic gradient
# Constant part of such a gradient: activations (dW) and grouped weights (dX) that are rounded to int8 once more.
_ROUNDED_AGAIN = 0.02
_DEVIATIONS = 4  # of Gaussian inputs, at which the range of static activations ends


class Subject:
    """The layer, its inputs, and how far from the exact result it may be.

    Attributes:
        x, grad_out: [ROWS, K] and [ROWS, N] of `dtype`.
        in_features, out_features: K and N.
        exact: outputs must be equal bit for bit where the mathematics is, because all sums are of integers.
        float_activations: x is known to stay as it is.
        input_range: the largest magnitude of x that static activations represent; None: each row has its own scale.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, seed: int, input_range: float | None = None) -> None:
        self.layer, self.dtype, self.seed, self.input_range = layer, dtype, seed, input_range
        tensor = next((t for t in (*layer.parameters(), *layer.buffers())), torch.empty(0))
        self.device = tensor.device
        self.in_features, self.out_features = cast(tuple[int, int], (layer.in_features, layer.out_features))
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(ROWS, n, generator=generator) for n in (self.in_features, self.out_features)]
        if input_range is not None:
            rows[0] = (rows[0] * (input_range / _DEVIATIONS)).clamp(-input_range, input_range)
        self.x, self.grad_out = (values.to(self.device, dtype) for values in rows)
        scheme = getattr(layer, "scheme", None)
        self.plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        self.exact = bool(getattr(scheme, "int_activations", False))
        self.float_activations = self.plain or (scheme is not None and not self.exact)
        self._weight: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)

    def run(
        self, x: Tensor, grad_out: Tensor, layer: Callable[[Tensor], Tensor] | None = None, seed: int | None = None
    ) -> list[Tensor | None]:
        """Output, gradient of x, and gradients of the parameters that want one."""
        torch.manual_seed(self.seed if seed is None else seed)
        x = x.detach().requires_grad_()
        out = (self.layer if layer is None else layer)(x)
        wanted = [x, *(p for p in self.layer.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(out, wanted, grad_out, allow_unused=True)
        if grads[0] is None:
            raise RuntimeError("no gradient reaches x")
        return [out.detach(), *grads]

    def output_and_gradient(
        self, x: Tensor, grad_out: Tensor, layer: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output, and gradient of x."""
        out, grad_x = self.run(x, grad_out, layer)[:2]
        assert out is not None and grad_x is not None
        return out, grad_x

    @property
    def bias(self) -> Tensor:
        bias = getattr(self.layer, "bias", None)
        return torch.zeros((), dtype=torch.float64) if bias is None else bias.detach().double()

    @property
    def weight(self) -> tuple[Tensor, Tensor]:
        """W [N, K] in float64, and how far each element may be from what the layer multiplies with."""
        if self._weight is None:
            dequantize = getattr(self.layer, "dequantize", None)
            if callable(dequantize):
                weight = dequantize().detach().double()
            elif self.plain:
                weight = self.layer.get_parameter("weight").detach().double()
            else:
                weight = self.probe()
                self._weight = weight, self.probe_bound(weight)
                return self._weight
            self._weight = weight, torch.zeros_like(weight)
        return self._weight

    def probe(self) -> Tensor:
        """W by the outputs for the rows of an identity matrix, which rounding to 8 bits leaves as they are.

        Under static activations its diagonal is the end of their range, which is 127 steps.
        """
        size = self.in_features
        at_zero = self.forward(torch.zeros(1, size, dtype=self.dtype, device=self.device)).double()
        columns = []
        for start in range(0, size, _PROBE_ROWS):
            one_hot = torch.zeros(min(_PROBE_ROWS, size - start), size, dtype=self.dtype, device=self.device)
            one_hot.diagonal(start).fill_(self._one)
            columns.append(self.forward(one_hot).double() - at_zero)
        return torch.cat(columns).t() / self._one

    @property
    def _one(self) -> float:
        """The diagonal of the identity matrix that is probed with."""
        return 1.0 if self.input_range is None else self.input_range

    def probe_bound(self, weight: Tensor) -> Tensor:
        eps = torch.finfo(self.dtype).eps
        return 4 * eps * (weight.abs() + 2 * self.bias.abs().unsqueeze(-1) / self._one + self._minima)

    @property
    def _minima(self) -> Tensor:
        """The largest minimum of each row, [N, 1], which is rounded where it cancels most of a product; or 0."""
        minima = getattr(self.layer, "zeros", None)
        if not isinstance(minima, Tensor) or not minima.is_floating_point():
            return torch.zeros((), dtype=torch.float64)
        return minima.detach().double().abs().amax(-1, keepdim=True)

    def rounding(self, x: Tensor) -> Tensor:
        """How far each element of x [M, K] may be from what is multiplied, half of a step of 127: float64 [M, 1]."""
        if self.float_activations:
            return torch.zeros((), dtype=torch.float64, device=x.device)
        largest = x.double().abs().amax(1, keepdim=True)
        return (largest if self.input_range is None else torch.full_like(largest, self.input_range)) / 254

    def output_bound(self, x: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """The bound of an output of `dtype` for x, whose elements may be rounded."""
        weight, uncertain = self.weight
        rounding, x = self.rounding(x), x.double().abs()
        bound = float_bound(x @ weight.abs().t() + self.bias.abs(), exact, weight.shape[1], dtype)
        return bound + rounding * weight.abs().sum(1) + x @ uncertain.t()

    def expected(self, x: Tensor) -> Tensor:
        return x.double() @ self.weight[0].t() + self.bias

    def same(self, actual: Tensor, expected: Tensor, x: Tensor | None = None) -> Outcome:
        """Outputs for the same rows: equal bits where sums are exact, else as close as two orders of summation."""
        x = self.x if x is None else x
        if self.exact:
            return equal(actual, expected)
        exact = self.expected(x)
        bound = 2 * float_bound(x.double().abs() @ self.weight[0].abs().t() + self.bias.abs(), exact,
                                 self.in_features, actual.dtype)  # fmt: skip
        return compare(actual, expected, bound)

    def gradient(self, index: int, exact: Tensor, bound: Tensor) -> Outcome:
        """Check gradient `index` of `run` against its float64 value."""
        first, second = (self.run(self.x, self.grad_out, seed=self.seed + i)[index] for i in range(2))
        if same_bits(first, second):  # it does not depend on the seed
            return compare(first, exact, bound)
        results = [self.run(self.x, self.grad_out, seed=self.seed + i)[index] for i in range(_SEEDS)]
        draws = torch.stack([result.double() for result in results if result is not None])
        norm = exact.norm().item()
        error = ((draws.mean(0) - exact).norm() / norm).item()
        noise = (draws.std(0).norm() / norm).item()
        allowed = _NOISE * noise / math.sqrt(_SEEDS) + _ROUNDED_AGAIN
        detail = (
            f"stochastic: relative standard deviation {noise:.2g} of one draw, error of the mean of {_SEEDS} listed"
        )
        return Outcome(OK if error <= allowed else FAILED, error, allowed, detail)


def float_bound(magnitude: Tensor, exact: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """The bound of a sum of `terms` products in float32, factors and result rounded to `dtype`.

    gamma(n) = n u / (1 - n u) times the sum of magnitudes bounds any order of summation (Higham, Accuracy and
    Stability, 3.1).
    """
    terms += _EXTRA_ROUNDINGS
    info = torch.finfo(dtype)
    relative = terms * _SUM_ROUNDOFF / (1 - terms * _SUM_ROUNDOFF)
    if dtype != torch.float32:
        relative += info.eps
    return relative * magnitude + info.eps / 2 * exact.abs() + terms * info.smallest_normal
