"""Calibrated quantization: choose the integers of a weight so that the layer's outputs change least.

Rounding each weight to the nearest value minimizes the error of the weight, not that of the outputs on the inputs x
that the layer sees. With x^ = x + e, what the kernel multiplies (e is the error of int8 activations, 0 under `a16`),
the outputs' error is, for errors e that are not correlated with x,

    E |W x - W' x^|^2 = tr (W' - W*) (H + N) (W' - W*)^T + const,
    W* = W H (H + N)^-1,   H = E x x^T,   N = E e e^T.

W* is the Wiener filter: it trusts an input channel the less the more of it is rounding error. 4-bit weights come from
W* and H + N by GPTQ (Frantar et al. 2022, arXiv:2210.17323), which rounds one input column after the other and makes up
for each column's error with the columns that are still to come, as far as they are correlated. Stored format and
kernels are the same. A weight that is exactly 0 (pruned) stays 0, as in SparseGPT (Frantar and Alistarh 2023,
arXiv:2301.00774): the columns to come make up for what W* would have there.

8-bit weights are refused: their own rounding leaves nothing to gain, and W* alone fits the model to the sample inputs
so closely that it computes worse on text of another kind. Smoothing (`smoothquant.py`) helps int8 activations there
too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.rules import int4_nibbles, int4_parameters
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from .inputs import InputStatistics

# Share of the mean of the diagonal that is added to it, so that GPTQ's inverse exists (as in the paper).
DAMPING = 0.01
# H is estimated from few tokens: what stands beside its diagonal is reduced by this share.
GRAM_SHRINKAGE = 0.05
# Columns that are updated at once; a multiple of every group size.
BLOCK = 128
# A narrower range clips the largest weights of a group and rounds the others more finely: the best of these is taken.
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def quantize_weight(weight: Tensor, scheme: str | QuantScheme, statistics: InputStatistics) -> QuantizedWeight:
    """Quantize a weight for the inputs that `statistics` describes.

    Args:
        weight: float [N, K], finite.
        scheme: any scheme with 4-bit weights, but those with minima.
        statistics: of sample inputs of the layer.

    Raises:
        ValueError: if the scheme has 8-bit weights or minima, or the statistics do not fit or are not finite.
    """
    scheme = QuantScheme.parse(scheme)
    if not applies(scheme):
        wanted = "no minima" if scheme.has_min else "4-bit weights"
        raise ValueError(f"scheme must have {wanted}, got {scheme}")
    columns = weight.shape[1]
    for name, shape in (("gram", [columns, columns]), ("quant_error", [columns])):
        sums = getattr(statistics, name)
        if list(sums.shape) != shape or not sums.isfinite().all():
            raise ValueError(f"statistics.{name} must be finite and of shape {shape}, got {list(sums.shape)}")
    weight = weight.detach().to(torch.float32)
    target = _filtered(weight, statistics)
    return _gptq(target, weight == 0, scheme, statistics.gram + statistics.quant_error.diag())


def applies(scheme: QuantScheme) -> bool:
    """True if calibration is known to improve a scheme, on text that it has not seen too."""
    return scheme.weight_bits == 4 and not scheme.has_min


def check_applies(scheme: str | QuantScheme) -> None:
    """Refuse a scheme that calibration does not improve.

    Raises:
        ValueError: if the scheme has 8-bit weights or minima; the message says what helps there.
    """
    scheme = QuantScheme.parse(scheme)
    if scheme.has_min:
        instead = "-asym in the place of -min" if scheme.weight_format.has_zeros else "a w4 scheme"
        raise ValueError(f"calibration must be None for {scheme}: it chooses no minima; use {instead}")
    if not applies(scheme):
        smooth = (
            "; to lose less to int8 activations call qkernels.smooth_(model, calibration) before quantize_"
            if scheme.int_activations
            else ""
        )
        raise ValueError(
            f"calibration must be None for {scheme}: it chooses 4-bit weights, and 8-bit weights are as good as can be "
            f"when rounded to nearest{smooth}"
        )


def _filtered(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """W* = W H (H + N)^-1 = W - W N (H + N)^-1."""
    if not statistics.quant_error.any():
        return weight.clone()
    noise = statistics.quant_error.to(torch.float64)
    total = statistics.gram.to(torch.float64) * (1 - GRAM_SHRINKAGE)
    diagonal = statistics.gram.diagonal().to(torch.float64) + noise
    total.diagonal().copy_(torch.where(diagonal > 0, diagonal, 1.0))
    correction = torch.cholesky_solve((weight * noise).t(), torch.linalg.cholesky(total)).t()
    return (weight - correction).to(torch.float32)


def _gptq(left: Tensor, pruned: Tensor, scheme: QuantScheme, gram: Tensor) -> QuantizedWeight:
    """Round `left` [N, K] to 4 bits, column by column; it is overwritten.

    Args:
        pruned: bool [N, K], which values become 0. That is an error like any other, which later columns make up for.
    """
    rows, columns = left.shape
    compensation = _compensation(gram)
    group_size = scheme.group_size or columns
    nibbles = torch.empty(rows, columns, dtype=torch.uint8, device=left.device)
    scales, zeros = [], []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(rows, stop - start, device=left.device)
        for column in range(start, stop):
            if column % group_size == 0:
                group = slice(column, min(column + group_size, columns))
                importance = compensation.diagonal()[group].square().reciprocal()
                kept = left[:, group].masked_fill(pruned[:, group], 0.0)
                scale, inverse, zero = _parameters(kept, importance, scheme.symmetric)
                scales.append(scale)
                zeros.append(zero)
            kept = left[:, column].masked_fill(pruned[:, column], 0.0)
            nibbles[:, column] = int4_nibbles(kept, inverse, zero)
            rounded = (nibbles[:, column].to(torch.float32) - zero) * scale
            error = (left[:, column] - rounded) / compensation[column, column]
            left[:, column:stop] -= error.unsqueeze(1) * compensation[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ compensation[start:stop, stop:]
    return QuantizedWeight(
        scheme.weight_format.pack(nibbles),
        torch.stack(scales, dim=1),
        None if scheme.symmetric else torch.stack(zeros, dim=1).to(torch.uint8),
    )


def _compensation(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped `gram`: row k says how later columns make up for column k."""
    damped = gram.to(torch.float64)
    mean = damped.diagonal().mean().item()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def _parameters(group: Tensor, importance: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, inverse and zero point [N] of a group [N, G]: of the clipped ranges, the one with the least error."""
    scale, inverse, zero, least = _clipped(group, importance, symmetric, CLIP_RATIOS[0])
    for ratio in CLIP_RATIOS[1:]:
        *clipped, error = _clipped(group, importance, symmetric, ratio)
        better = error < least
        scale, inverse, zero, least = (
            torch.where(better, new, old)
            for new, old in zip((*clipped, error), (scale, inverse, zero, least), strict=True)
        )
    return scale, inverse, zero


def _clipped(group: Tensor, importance: Tensor, symmetric: bool, ratio: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, inverse and zero point [N] of ranges times `ratio`, and the error [N] of a group [N, G] rounded so."""
    scale, inverse, zero = int4_parameters(group.amin(dim=1) * ratio, group.amax(dim=1) * ratio, symmetric)
    nibbles = int4_nibbles(group, inverse.unsqueeze(1), zero.unsqueeze(1))
    rounded = (nibbles.to(torch.float32) - zero.unsqueeze(1)) * scale.unsqueeze(1)
    return scale, inverse, zero, (rounded - group).square() @ importance
