"""The error bound of products that multiply floats on a tensor core."""

import torch
from helpers import UNIT_ROUNDOFF, gamma

# Tensor cores add products in an order and with a rounding of their own; taking each step for faithful covers both.
SUM_ROUNDOFF = 2 * UNIT_ROUNDOFF
EXTRA_TERMS = 8  # scale of the group and of the sum, the sums over groups and slices, the bias
# In the gradient each weight is rounded to the dtype of grad_out, which in float16 may be subnormal.
WEIGHT_ROUNDOFF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOAT16_SUBNORMAL = 2.0**-25


def assert_within_bound(actual, x, weight, bias=None, label: str = "", gradient: bool = False) -> None:
    """Check `actual` against `x @ weight.T + bias`; weight [N, K] and bias are exact, in float64."""
    exact, magnitude = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    terms = x.shape[1] + EXTRA_TERMS
    relative = gamma(terms, SUM_ROUNDOFF)
    bound = terms * 2.0**-126
    if gradient:
        relative = (1 + relative) * (1 + WEIGHT_ROUNDOFF[x.dtype]) * (1 + UNIT_ROUNDOFF) - 1
        if x.dtype == torch.float16:
            bound = bound + FLOAT16_SUBNORMAL * x.double().abs().sum(1, keepdim=True)
    bound = bound + relative * magnitude
    info = torch.finfo(actual.dtype)
    if actual.dtype != torch.float32:
        bound = bound + (exact.abs() + bound) * (info.eps / 2) + info.smallest_normal * info.eps
    assert actual.isfinite().all(), f"{label}: not finite"
    if exact.numel():
        worst = ((actual.double() - exact).abs() / bound.clamp(min=1e-300)).max().item()
        assert worst <= 1.0, f"{label}: error is {worst:.3g} times its bound"
