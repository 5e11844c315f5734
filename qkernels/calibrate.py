"""Calibrated quantization: choose the integers of a weight so that the layer's outputs change least.

Rounding each weight to the nearest value minimizes the error of the weight, not that of the outputs on the inputs x
that the layer sees. With x^ = x + e, what the kernel multiplies (e is the error of int8 activations, 0 under `a16`),
the outputs' error is, for errors e that are not correlated with x,

    E |W x - W' x^|^2 = tr (W' - W*) (H + N) (W' - W*)^T + const,
    W* = W H (H + N)^-1,   H = E x x^T,   N = E e e^T.

W* is the Wiener filter: it trusts an input channel the less the more of it is rounding error. 8-bit weights are W*
rounded to nearest. 4-bit weights come from W* and H + N by GPTQ (Frantar et al. 2022, arXiv:2210.17323), which rounds
one input column after the other and makes up for each column's error with the columns that are still to come, as far
as they are correlated. Stored format and kernels are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops, quantize
from .quantize import QuantizedWeight, expand_groups, int4_nibbles, int4_parameters, pack_int4
from .schemes import QuantScheme

# Share of the mean of the diagonal that is added to it, so that GPTQ's inverse exists (as in the paper).
DAMPING = 0.01
# H is estimated from few tokens: what stands beside its diagonal is reduced by this share.
SHRINKAGE = 0.05
# Columns that are updated at once; a multiple of every group size.
BLOCK = 128
# A narrower range clips the largest weights of a group and rounds the others more finely: the best of these is taken.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


class Moments(NamedTuple):
    """Of the inputs of a layer with K input features.

    Attributes:
        inputs: float32 [K, K], the sum of x xT.
        noise: float32 [K], the sum of the squared errors of the quantized inputs; zeros under `a16`.
    """

    inputs: Tensor
    noise: Tensor


def second_moments(
    model: nn.Module,
    layers: Iterable[nn.Module],
    batches: Iterable[Tensor | Mapping[str, Any]],
    scheme: str | QuantScheme,
) -> dict[int, Moments]:
    """Run `model` on sample inputs and sum up the moments of the inputs of each linear layer.

    Args:
        model: run in evaluation mode, without gradients.
        layers: the linear layers to watch.
        batches: inputs: a mapping is passed as keyword arguments, anything else as the only argument.
        scheme: says how the inputs will be quantized.

    Returns:
        By id of a layer that was called.
    """
    scheme = QuantScheme.parse(scheme)
    moments: dict[int, Moments] = {}

    def watch(layer: nn.Module, x: Tensor) -> None:
        noise = torch.zeros(x.shape[1], device=x.device)
        if scheme.int_activations:
            q, scales = ops.quantize_activation(x, scheme.name)
            rounded = q.to(torch.float32) * expand_groups(scales, scheme.act_group_size, x.shape[1])
            noise = (rounded - x).square().sum(dim=0)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the sum would not be positive definite
            inputs = x.t() @ x
        seen = moments.get(id(layer))
        moments[id(layer)] = (
            Moments(inputs, noise) if seen is None else Moments(seen.inputs + inputs, seen.noise + noise)
        )

    run_watched(model, layers, batches, watch)
    return moments


def run_watched(
    model: nn.Module,
    layers: Iterable[nn.Module],
    batches: Iterable[Tensor | Mapping[str, Any]],
    watch: Callable[[nn.Module, Tensor], None],
) -> None:
    """Run `model` on sample inputs, in evaluation mode and without gradients.

    Args:
        layers: the linear layers whose inputs are wanted.
        batches: inputs: a mapping is passed as keyword arguments, anything else as the only argument.
        watch: called before each of these layers with it and its input, float32 [M, K].
    """

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        watch(layer, (args[0] if args else kwargs["input"]).detach().flatten(0, -2).to(torch.float32))

    training = [module for module in model.modules() if module.training]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
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


def quantize_weight(weight: Tensor, scheme: str | QuantScheme, moments: Moments) -> QuantizedWeight:
    """Quantize a weight for the inputs that `moments` describes.

    Args:
        weight: float [N, K], finite.
        scheme: any scheme but w8a16 ones, whose rounding to nearest leaves nothing to gain.
        moments: of sample inputs of the layer.

    Raises:
        ValueError: if the scheme has 8-bit weights and float activations, or the moments do not fit or are not finite.
    """
    scheme = QuantScheme.parse(scheme)
    if not applies(scheme):
        raise ValueError(f"scheme must have 4-bit weights or 8-bit activations, got {scheme}")
    columns = weight.shape[1]
    for name, moment, shape in (("inputs", moments.inputs, [columns, columns]), ("noise", moments.noise, [columns])):
        if list(moment.shape) != shape or not moment.isfinite().all():
            raise ValueError(f"moments.{name} must be finite and of shape {shape}, got {list(moment.shape)}")
    target = _filtered(weight.detach().to(torch.float32), moments)
    if scheme.weight_bits == 8:
        return quantize.quantize_weight(target, scheme)
    return _gptq(target, scheme, moments.inputs + moments.noise.diag())


def applies(scheme: QuantScheme) -> bool:
    """Whether calibration can improve a scheme."""
    return scheme.weight_bits == 4 or scheme.int_activations


def _filtered(weight: Tensor, moments: Moments) -> Tensor:
    """W* = W H (H + N)^-1 = W - W N (H + N)^-1."""
    if not moments.noise.any():
        return weight.clone()
    noise = moments.noise.to(torch.float64)
    total = moments.inputs.to(torch.float64) * (1 - SHRINKAGE)
    diagonal = moments.inputs.diagonal().to(torch.float64) + noise
    total.diagonal().copy_(torch.where(diagonal > 0, diagonal, 1.0))
    correction = torch.cholesky_solve((weight * noise).t(), torch.linalg.cholesky(total)).t()
    return (weight - correction).to(torch.float32)


def _gptq(left: Tensor, scheme: QuantScheme, moment: Tensor) -> QuantizedWeight:
    """Round `left` [N, K] to 4 bits, column by column; it is overwritten."""
    rows, columns = left.shape
    compensation = _compensation(moment)
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
