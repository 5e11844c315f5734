"""`linear_cross_entropy`: the head of a language model and its loss in one step that never holds the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autograd.input_order import gather_features
from ..autograd.layer_calls import autocast_dtype
from ..formats.storage import QuantizedWeight
from ..kernels import ops
from ..kernels.arguments import LossOptions
from .embedding import QuantEmbedding
from .linear import QuantLinear

# torch computes so many logits at a time: of all tokens, for as many columns of the vocabulary as fit.
LOGITS_AT_ONCE = 1 << 22


def linear_cross_entropy(
    hidden: Tensor,
    head: QuantLinear | QuantEmbedding | Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross entropy of `head(hidden)` against class indices, without holding the logits.

    Keywords are those of `torch.nn.functional.linear_cross_entropy`, and `softcap` and `z_loss`. The gradient of a
    quantized head's input is made in the forward (docs/loss.md says how, and how exact it is) where grad mode is on
    and `hidden` requires it; the rounding draws from torch's default CPU generator. Double backward raises an error.

    Args:
        hidden: float [..., K].
        head: a frozen `QuantLinear` (with or without bias) or `QuantEmbedding` of N rows, or a float weight [N, K] of
            the dtype of `hidden`. A float weight and a bias get their gradients, from the logits made once more.
        target: int64 [...], the leading shape of `hidden`, in [0, N) or `ignore_index`.
        linear_bias: float [N]; added to the bias of a quantized head, if it has one.
        weight: float [N], by which the loss of each class is multiplied; not with `label_smoothing`.
        reduction: "none"; "sum"; "mean": over the targets that are not ignored (NaN if all are), by their `weight`.
        ignore_index: rows with this target have loss 0 and gradient 0.
        label_smoothing: share of the target in [0, 1] that is spread over all classes (Szegedy et al. 2015,
            arXiv:1512.00567).
        softcap: c of at least 2^-126: logits become `c * tanh(logit / c)` (Gemma 2, arXiv:2408.00118); infinity:
            they stay. For a quantized head c is rounded to float32, and not together with `label_smoothing`.
        z_loss: adds `z_loss * logsumexp(logits) ** 2` to the loss of each row (PaLM, arXiv:2204.02311).

    Returns:
        float32 (float64 for float64 hidden states): a scalar, or [...] for "none".

    Raises:
        TypeError: if `head` is neither a quantized layer nor a tensor.
        ValueError: naming the argument that does not fit.
        RuntimeError: for a target out of range.
    """
    check_options(reduction, label_smoothing, softcap, z_loss)
    cap = 0.0 if softcap is None or math.isinf(softcap) else float(softcap)
    terms = LossOptions(cap, float(z_loss), float(label_smoothing), ignore_index)
    if target.dtype != torch.int64 or target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must be torch.int64 of shape {list(hidden.shape[:-1])}, got {target.dtype} of shape "
            f"{list(target.shape)}"
        )
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if isinstance(head, QuantLinear | QuantEmbedding):
        losses = _quantized_losses(rows, head, linear_bias, targets, terms)
    elif isinstance(head, Tensor):
        losses = _labelled_losses(rows, head, linear_bias, targets, terms)
    else:
        raise TypeError(f"head must be a QuantLinear, a QuantEmbedding or a float weight, got {type(head).__name__}")
    valid = targets != ignore_index
    factors = valid.to(losses.dtype)
    if weight is not None:
        _check_weight(weight, _classes(head), hidden, label_smoothing)
        factors = factors * weight.to(losses.dtype)[targets.where(valid, 0)]
        losses = losses * factors
    if reduction == "none":
        return losses.reshape(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / factors.sum()


def check_options(reduction: str, label_smoothing: float, softcap: float | None, z_loss: float) -> None:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap >= 2.0**-126:
        raise ValueError(f"softcap must be None or at least 2^-126, got {softcap}")
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss must be finite, got {z_loss}")


def _classes(head: QuantLinear | QuantEmbedding | Tensor) -> int:
    return len(head) if isinstance(head, Tensor) else head.out_features


def _check_weight(weight: Tensor, classes: int, hidden: Tensor, label_smoothing: float) -> None:
    if label_smoothing != 0:
        raise ValueError("weight must be None with label_smoothing")
    if not isinstance(weight, Tensor) or weight.shape != (classes,) or not weight.is_floating_point():
        got = f"{weight.dtype} of shape {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must be float of shape [{classes}], got {got}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device} as hidden is, got {weight.device}")


def _check_bias(bias: Tensor, classes: int) -> None:
    if bias.shape != (classes,):
        raise ValueError(f"linear_bias must have shape [{classes}], got {list(bias.shape)}")


def _quantized_losses(
    hidden: Tensor, head: QuantLinear | QuantEmbedding, more_bias: Tensor | None, target: Tensor, terms: LossOptions
) -> Tensor:
    if head.mode != "frozen":
        raise ValueError(f"head must hold a quantized weight, got a {type(head).__name__} in mode {head.mode!r}")
    bias = getattr(head, "bias", None)
    if more_bias is not None:
        _check_bias(more_bias, head.out_features)
        bias = more_bias if bias is None else bias + more_bias
    if terms.softcap and terms.label_smoothing:
        raise ValueError("softcap must be None with label_smoothing for a quantized head")
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    # Where the rounding of each row starts: uniform numbers make it unbiased.
    dither = torch.randint(2**32, target.shape).to(hidden.device) if wanted else None
    scheme = head.scheme.name
    weight, x_scale = head.quantized_weight(), head._activation_scale()
    hidden = gather_features(hidden, head._buffers.get("input_order"))
    return _QuantizedCrossEntropy.apply(hidden, bias, target, *weight, scheme, dither, x_scale, terms)


def _float_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: LossOptions) -> Tensor:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head must have shape [N, {hidden.shape[1]}], got {list(weight.shape)}")
    if bias is not None:
        _check_bias(bias, len(weight))
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if weight.dtype != hidden.dtype:
        raise ValueError(f"head must be {hidden.dtype} as hidden is, got {weight.dtype}")
    outside = (target != terms.ignore_index) & ((target < 0) | (target >= weight.shape[0]))
    if outside.any():
        value = target[outside][0].item()
        raise RuntimeError(
            f"target must be in [0, {weight.shape[0]}) or {terms.ignore_index} (ignore_index), got {value}"
        )
    return _FloatCrossEntropy.apply(hidden, weight, bias, target, terms)


def _labelled_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: LossOptions) -> Tensor:
    """`_float_losses` of the rows that have a target, 0 for the others, which cost nothing."""
    labelled = target != terms.ignore_index
    if torch.compiler.is_compiling() or labelled.all():
        return _float_losses(hidden, weight, bias, target, terms)
    losses = _float_losses(hidden[labelled], weight, bias, target[labelled], terms)
    return losses.new_zeros(target.shape).masked_scatter(labelled, losses)


def _chunks(tokens: int, classes: int) -> Iterator[slice]:
    width = max(1, LOGITS_AT_ONCE // max(tokens, 1))
    return (slice(start, min(start + width, classes)) for start in range(0, classes, width))


def _cap(logits: Tensor, softcap: float) -> Tensor:
    capped = 0 < softcap <= torch.finfo(logits.dtype).max
    return softcap * torch.tanh(logits / softcap) if capped else logits


def _grad_logits(logits: Tensor, chunk: slice, target: Tensor, lse: Tensor, classes: int, terms: LossOptions) -> Tensor:
    """Gradient of each row's loss by a chunk of its logits, which are not capped yet, and are overwritten."""
    y = _cap(logits, terms.softcap)
    grad = (y - lse[:, None] if terms.softcap else y.sub_(lse[:, None])).exp_()
    if terms.z_loss:
        grad *= 1.0 + 2.0 * terms.z_loss * lse[:, None]
    if terms.label_smoothing:
        grad -= terms.label_smoothing / classes
    row = ((target >= chunk.start) & (target < chunk.stop)).nonzero()[:, 0]
    grad[row, target[row] - chunk.start] -= 1.0 - terms.label_smoothing
    return grad * (1.0 - (y / terms.softcap) ** 2) if terms.softcap else grad


class _QuantizedCrossEntropy(torch.autograd.Function):
    """`ops.linear_cross_entropy` with gradients to the hidden states and to the bias of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor | None,
        target: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        scheme: str,
        dither: Tensor | None,
        x_scale: Tensor | None,
        terms: LossOptions,
    ) -> Tensor:
        options = terms._asdict()
        arguments = (hidden, target, qweight, scales, zeros, bias, scheme, dither)
        losses, lse, grad = ops.linear_cross_entropy(*arguments, x_scale=x_scale, **options)
        ctx.terms, ctx.scheme, ctx.dtype = terms, scheme, hidden.dtype
        kept = (hidden, bias, target, qweight, scales, zeros, lse) if ctx.needs_input_grad[1] else (None,) * 7
        ctx.x_scale = x_scale
        ctx.save_for_backward(grad if ctx.needs_input_grad[0] else None, *kept)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        grad, hidden, bias, target, *weight, lse = ctx.saved_tensors
        grad_hidden = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad * grad_losses[:, None]).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            factors = torch.where(target == ctx.terms.ignore_index, 0.0, grad_losses)
            grad_bias = torch.empty_like(bias)
            for chunk in _chunks(len(target), len(bias)):
                part = QuantizedWeight(*weight).map(itemgetter(chunk))
                logits = ops.linear(hidden, *part, bias[chunk], ctx.scheme, torch.float32, ctx.x_scale)
                grad_bias[chunk] = factors @ _grad_logits(logits, chunk, target, lse, len(bias), ctx.terms)
        return grad_hidden, grad_bias, *(None,) * 8


class _FloatCrossEntropy(torch.autograd.Function):
    """The loss of a float weight, which gets a gradient too; the backward makes the logits once more."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: LossOptions
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        rows, classes = len(target), len(weight)
        valid = target != terms.ignore_index
        largest = torch.full((rows,), -torch.inf, dtype=dtype, device=hidden.device)
        total, logit_sum, picked = (torch.zeros_like(largest) for _ in range(3))
        for chunk in _chunks(rows, classes):
            y = _cap(_FloatCrossEntropy.logits(hidden, weight, bias, chunk), terms.softcap)
            if terms.label_smoothing:
                logit_sum += y.sum(dim=1)
            row = ((target >= chunk.start) & (target < chunk.stop)).nonzero()[:, 0]
            picked[row] = y[row, target[row] - chunk.start]
            highest = torch.maximum(largest, y.amax(dim=1))
            total = total * torch.exp(largest - highest) + y.sub_(highest[:, None]).exp_().sum(dim=1)
            largest = highest
        lse = largest + total.log()
        expected = (1.0 - terms.label_smoothing) * picked + terms.label_smoothing / classes * logit_sum
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.terms = terms
        return torch.where(valid, lse - expected + terms.z_loss * lse * lse, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse = ctx.saved_tensors
        factors = torch.where(target == ctx.terms.ignore_index, 0.0, grad_losses)[:, None]
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        for chunk in _chunks(len(target), len(weight)):
            logits = _FloatCrossEntropy.logits(hidden, weight, bias, chunk)
            grad = _grad_logits(logits, chunk, target, lse, len(weight), ctx.terms).mul_(factors)
            if grad_bias is not None:
                grad_bias[chunk] = grad.sum(dim=0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden += grad @ weight[chunk]
            if grad_weight is not None:
                grad_weight[chunk] = grad.t() @ hidden
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: slice) -> Tensor:
        logits = (hidden @ weight[chunk].t()).to(torch.promote_types(hidden.dtype, torch.float32))
        return logits if bias is None else logits + bias[chunk].to(logits.dtype)
