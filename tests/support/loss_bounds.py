"""The exact cross entropy of float32 logits, and how far the fused one may be from it."""

import math

import torch
from helpers import UNIT_ROUNDOFF, gamma

from qkernels import QuantScheme
from qkernels.kernels import reference


def exact(logits, target, softcap=0.0, z_loss=0.0, label_smoothing=0.0, ignore_index=-100):
    """float64 losses, capped logits and log-sum-exps."""
    y = torch.tanh(logits / softcap) * softcap if softcap else logits
    lse = y.logsumexp(dim=1)
    losses = torch.nn.functional.cross_entropy(
        y, target, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index
    )
    return torch.where(target == ignore_index, 0.0, losses + z_loss * lse**2), y, lse


def lse_bound(y, lse, softcap=0.0):
    """Of the error of the log-sum-exp of float32 logits.

    Arguments of exp are rounded: relative errors u * d of terms exp(-d), which weighted by the terms are at most
    u * ln(n) of n terms. exp itself is off by 4 u. A chunk adds up 1 / 16 of its columns in a lane, then 16 lanes;
    chunks are put together in 8 ranges, and these, by two products and a sum each, with two more exponentials. Capping
    gives each logit a relative error of 14 u at most: from u = |y / c| = 0.625 on t = exp(-2 u) is off by t (4 + 4 u)
    units, which the derivative of (1 - t) / (1 + t), at most 2, takes to less than 4; a quotient, its operands and a
    product add 4, and tanh is above 0.55. Below, the square of u is off by a few units, of a term of at most 0.12.
    """
    chunks = math.ceil(y.shape[1] / reference.LOSS_CHUNK)
    roundings = math.log(reference.LOSS_CHUNK) + 4 + reference.LOSS_CHUNK / 16 + 4
    folds = math.ceil(chunks / 8) + 8
    capping = 14 * y.abs().amax(dim=1) if softcap else 0.0
    return gamma(roundings + folds * (3 + 4 + math.log(y.shape[1]) + 1)) + UNIT_ROUNDOFF * (lse.abs() + capping)


def loss_bound(losses, y, lse, softcap=0.0, z_loss=0.0, label_smoothing=0.0):
    error = lse_bound(y, lse, softcap)
    total = gamma(reference.LOSS_CHUNK / 16 + 4) * y.abs().mean(dim=1) * label_smoothing
    capping = 14 * y.abs().amax(dim=1) if softcap else 0.0
    return error * (1 + 2 * z_loss * (lse.abs() + error)) + UNIT_ROUNDOFF * (capping + losses.abs()) + total


def gradient_bound(logits, weight, storage, scheme, target, terms):
    """Of the gradient of the losses: one unit of each quantized probability, and the float sums around the products.

    A grouped weight is multiplied as integers of one scale a column and chunk, which are half a unit off.
    """
    _, y, lse = exact(logits, target, **terms)
    parsed, softcap = QuantScheme.parse(scheme), terms.get("softcap", 0.0)
    p = torch.exp(y - lse[:, None])
    slope = 1 - (y / softcap) ** 2 if softcap else torch.ones_like(y)
    others = (p * slope).scatter(1, target.clamp(min=0)[:, None], 0.0)
    bound = torch.zeros(len(y), weight.shape[1], dtype=torch.float64)
    for start in range(0, y.shape[1], reference.LOSS_CHUNK):
        columns, rows = others[:, start : start + reference.LOSS_CHUNK], weight[start : start + reference.LOSS_CHUNK]
        if parsed.row_scaled:
            scales = storage[1][start : start + reference.LOSS_CHUNK].double().t().abs()
            unit = (columns * scales).amax(dim=1, keepdim=True) / 127
            integers = torch.where(scales.t() == 0, 0.0, rows.abs() / scales.t())
            bound += unit * integers.sum(dim=0)
        else:
            unit, column = columns.amax(dim=1, keepdim=True) / 127, rows.abs().amax(dim=0) / 127
            bound += unit * (rows.abs() + column / 2).sum(dim=0) + columns.sum(dim=1, keepdim=True) * column / 2
    floats = ((p * slope) @ weight.abs() + weight.abs().amax(dim=0) * 2) * (
        100 * gamma(y.shape[1] // reference.LOSS_CHUNK + 100)
    )
    factor = (1 + 2 * terms.get("z_loss", 0.0) * lse.abs())[:, None]
    return (bound * 1.001 + floats) * factor
