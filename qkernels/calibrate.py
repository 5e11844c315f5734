"""Calibrated 4-bit rounding: choose the integers of a weight so that the layer's outputs change least.

Rounding each weight to the nearest value minimizes the error of the weight, not that of the outputs. GPTQ (Frantar et
al. 2022, arXiv:2210.17323) rounds one input column after the other and makes up for each column's error with the
columns that are still to come, as far as the inputs seen in calibration are correlated. Stored format and kernels are
the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .quantize import QuantizedWeight, int4_nibbles, int4_parameters, pack_int4
from .schemes import QuantScheme

# Share of the mean of the diagonal that is added to it, so that the inverse exists (as in the paper).
DAMPING = 0.01
# Columns that are updated at once; a multiple of every group size.
BLOCK = 128
# A narrower range clips the largest weights of a group and rounds the others more finely: the best of these is taken.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def second_moments(
    model: nn.Module, layers: Iterable[nn.Module], batches: Iterable[Tensor | Mapping[str, Any]]
) -> dict[int, Tensor]:
    """Run `model` on sample inputs and sum x xT over the inputs x of each linear layer.

    Args:
        model: run in evaluation mode, without gradients.
        layers: the linear layers to watch.
        batches: inputs: a mapping is passed as keyword arguments, anything else as the only argument.

    Returns:
        By id of a layer that was called: float32 [K, K].
    """
    moments: dict[int, Tensor] = {}

    def watch(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach().flatten(0, -2).to(torch.float32)
        moments[id(layer)] = moments.get(id(layer), 0) + x.t() @ x

    training = [module for module in model.modules() if module.training]
    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return moments


def quantize_weight(weight: Tensor, scheme: str | QuantScheme, moment: Tensor) -> QuantizedWeight:
    """Quantize a weight to 4 bits by GPTQ.

    Args:
        weight: float [N, K], finite.
        scheme: a w4 scheme.
        moment: float32 [K, K], the sum of x xT over sample inputs x of the layer.

    Raises:
        ValueError: if the scheme has 8-bit weights, or the moment does not fit or is not finite.
    """
    scheme = QuantScheme.parse(scheme)
    rows, columns = weight.shape
    if scheme.weight_bits != 4:
        raise ValueError(f"scheme must be a w4 scheme, got {scheme}: 8-bit weights need no calibration")
    if moment.shape != (columns, columns) or not moment.isfinite().all():
        raise ValueError(f"moment must be finite and of shape [{columns}, {columns}], got {list(moment.shape)}")
    left = weight.detach().to(torch.float32).clone()
    compensation = _compensation(moment)
    group_size = scheme.group_size or columns
    nibbles = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(rows, stop - start, device=weight.device)
        for column in range(start, stop):
            if column % group_size == 0:
                group = slice(column, min(column + group_size, columns))
                importance = compensation.diagonal()[group].square().reciprocal()
                scale, inverse, zero = _parameters(left[:, group], importance, scheme.symmetric)
                scales.append(scale)
                zeros.append(zero)
            nibbles[:, column] = int4_nibbles(left[:, column], inverse, zero)
            rounded = (nibbles[:, column].to(torch.float32) - zero) * scale
            error = (left[:, column] - rounded) / compensation[column, column]
            left[:, column:stop] -= error.unsqueeze(1) * compensation[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ compensation[start:stop, stop:]
    return QuantizedWeight(
        pack_int4(nibbles),
        torch.stack(scales, dim=1),
        None if scheme.symmetric else torch.stack(zeros, dim=1).to(torch.uint8),
    )


def _compensation(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moment: row k says how later columns make up for column k."""
    damped = moment.to(torch.float64)
    mean = damped.diagonal().mean().item()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def _parameters(group: Tensor, importance: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, inverse and zero point [N] of a group [N, G]: of the shrunk ranges, the one with the least error."""
    best, least = None, None
    for shrink in SHRINK:
        scale, inverse, zero = int4_parameters(group.amin(dim=1) * shrink, group.amax(dim=1) * shrink, symmetric)
        nibbles = int4_nibbles(group, inverse.unsqueeze(1), zero.unsqueeze(1))
        rounded = (nibbles.to(torch.float32) - zero.unsqueeze(1)) * scale.unsqueeze(1)
        error = (rounded - group).square() @ importance
        if best is None:
            best, least = (scale, inverse, zero), error
            continue
        better = error < least
        best = tuple(torch.where(better, new, old) for new, old in zip((scale, inverse, zero), best, strict=True))
        least = torch.where(better, error, least)
    return best
