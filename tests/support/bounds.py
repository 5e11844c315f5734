"""The error bounds of what multiplies floats on a tensor core."""

import torch
from helpers import UNIT_ROUNDOFF, gamma
from loss_bounds import exact, gradient_bound, loss_bound, lse_bound

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


def assert_loss_within_bound(actual, sample_args, weight, label: str = "") -> None:
    """Check losses, log-sum-exps and gradients of an `a16` head, whose logits are float sums in any order.

    An error of at most d in each logit moves the log-sum-exp by d, the loss by 2 d, and a probability by a factor of at
    most exp(2 d).
    """
    hidden, target, *storage, bias, scheme, dither = sample_args
    valid = target != -100
    x, magnitude = hidden.double(), hidden.double().abs() @ weight.abs().t()
    logits = x @ weight.t()
    if bias is not None:
        logits, magnitude = logits + bias.double(), magnitude + bias.double().abs()
    off = (gamma(hidden.shape[1] + EXTRA_TERMS, SUM_ROUNDOFF) * magnitude).amax(dim=1)
    logits.requires_grad_()
    losses, y, lse = exact(logits, target)
    losses.sum().backward()
    losses, y, lse = losses.detach(), y.detach(), lse.detach()
    loss, log_sum, grad = (result.double() for result in actual)
    for result in actual[:2]:
        assert (result[~valid] == 0).all(), label
    assert ((loss - losses).abs() <= loss_bound(losses, y, lse) + 2 * off)[valid].all(), f"{label}: loss"
    assert ((log_sum - lse).abs() <= lse_bound(y, lse, 0.0) + off)[valid].all(), f"{label}: log-sum-exp"
    if dither is None:
        assert grad.shape == (0, hidden.shape[1]), label
        return
    factor = torch.exp(2 * off)[:, None]
    moved = (factor - 1) * (torch.exp(y - lse[:, None]) @ weight.abs())
    bound = gradient_bound(logits.detach(), weight, storage, scheme, target, {}) * factor + moved
    assert ((grad - logits.grad @ weight).abs() <= bound)[valid].all(), f"{label}: gradient"
