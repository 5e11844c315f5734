"""Calibrated quantization: choose the integers of a weight so that the layer's outputs change least.

Rounding each weight to the nearest value minimizes the error of the weight, not that of the outputs on the inputs x
that the layer sees. With x^ = x + e, what the kernel multiplies (e is the error of int8 activations, 0 under `a16`),
the outputs' error is, for errors e that are not correlated with x,

    E |W x - W' x^|^2 = tr (W' - W*) (H + N) (W' - W*)^T + const,
    W* = W H (H + N)^-1,   H = E x x^T,   N = E e e^T.

W* is the Wiener filter: it trusts an input channel the less the more of it is rounding error. 4-bit weights come from
W* and H + N by GPTQ (Frantar et al. 2022, arXiv:2210.17323), which rounds one input column after the other and makes up
for each column's error with the columns that are still to come, as far as they are correlated. Stored format and
kernels are the same.

8-bit weights are refused: their own rounding leaves nothing to gain, and W* alone fits the model to the sample inputs
so closely that it computes worse on text of another kind. Smoothing (`smooth.py`) helps int8 activations there too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats.rules import QuantizedWeight, expand_groups, int4_nibbles, int4_parameters, pack_int4
from ..formats.scheme import QuantScheme
from ..kernels import ops

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
    batches: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
    scheme: str | QuantScheme,
) -> dict[int, Moments]:
    """Run `model` on sample inputs and sum up the moments of the inputs of each linear layer.

    Args:
        model: run in evaluation mode, without gradients.
        layers: the linear layers to watch.
        batches: see `run_watched`.
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
    batches: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
    watch: Callable[[nn.Module, Tensor], None],
    argument: str = "calibration",
) -> None:
    """Run `model` on sample inputs, in evaluation mode and without gradients.

    Args:
        layers: the linear layers whose inputs are wanted.
        batches: inputs: a mapping is passed as keyword arguments, a tensor as the only argument. Of a tuple or list
            as many elements are passed as `model.forward` requires, so that targets may follow.
        watch: called before each of these layers with it and its input, float32 [M, K].
        argument: what the caller calls `batches`.

    Raises:
        TypeError: if a batch is something else.
        ValueError: if there is no batch.
    """
    number = -1

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        watch(layer, x.reshape(-1, x.shape[-1]).to(torch.float32))

    training = [module for module in model.modules() if module.training]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    model.eval()
    try:
        with torch.no_grad():
            for number, batch in enumerate(checked_batches(batches, argument=argument)):
                args, kwargs = _arguments(model, batch, f"{argument}[{number}]")
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if number < 0:
        raise ValueError(f"{argument} must hold at least one batch, got none")


def quantize_weight(weight: Tensor, scheme: str | QuantScheme, moments: Moments) -> QuantizedWeight:
    """Quantize a weight for the inputs that `moments` describes.

    Args:
        weight: float [N, K], finite.
        scheme: any scheme with 4-bit weights.
        moments: of sample inputs of the layer.

    Raises:
        ValueError: if the scheme has 8-bit weights, or the moments do not fit or are not finite.
    """
    scheme = QuantScheme.parse(scheme)
    if not applies(scheme):
        raise ValueError(f"scheme must have 4-bit weights, got {scheme}")
    columns = weight.shape[1]
    for name, moment, shape in (("inputs", moments.inputs, [columns, columns]), ("noise", moments.noise, [columns])):
        if list(moment.shape) != shape or not moment.isfinite().all():
            raise ValueError(f"moments.{name} must be finite and of shape {shape}, got {list(moment.shape)}")
    target = _filtered(weight.detach().to(torch.float32), moments)
    return _gptq(target, scheme, moments.inputs + moments.noise.diag())


def applies(scheme: QuantScheme) -> bool:
    """Whether calibration is known to improve a scheme, on text that it has not seen too."""
    return scheme.weight_bits == 4


def checked_batches(
    batches: Any, scheme: str | QuantScheme | None = None, argument: str = "calibration"
) -> Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]:
    """Refuse what cannot be sample inputs, before any model runs; the single batches are checked as they are used.

    Raises:
        TypeError: if `batches` is one batch instead of an iterable of them, or text.
        ValueError: if it is empty, or the scheme has 8-bit weights.
    """
    expected = f"{argument} must be an iterable of batches"
    if isinstance(batches, Tensor | Mapping):
        got = f"a tensor of shape {list(batches.shape)}" if isinstance(batches, Tensor) else type(batches).__name__
        raise TypeError(f"{expected}, got one batch, {got}; pass [batch]")
    if isinstance(batches, str | bytes):
        raise TypeError(f"{expected}, got a string; tokenize it and pass [{{'input_ids': ids}}]")
    if not isinstance(batches, Iterable) or hasattr(batches, "__array__"):
        raise TypeError(f"{expected} such as [x], [{{'input_ids': ids}}] or a DataLoader, got {type(batches).__name__}")
    if scheme is not None and not applies(scheme := QuantScheme.parse(scheme)):
        smooth = (
            "; to lose less to int8 activations call qkernels.smooth_(model, inputs) before quantize_"
            if scheme.int_activations
            else ""
        )
        raise ValueError(
            f"{argument} must be None for {scheme}: it chooses 4-bit weights, and 8-bit weights are as good as can be "
            f"when rounded to nearest{smooth}"
        )
    if isinstance(batches, Sequence) and not batches:
        raise ValueError(f"{argument} must hold at least one batch, got an empty {type(batches).__name__}")
    return batches


def _arguments(model: nn.Module, batch: Any, where: str) -> tuple[tuple, dict[str, Any]]:
    """The arguments with which `model` is called for one batch.

    Raises:
        TypeError: if the batch is neither a tensor, nor a mapping, nor a tuple or list of tensors.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        kinds = inspect.signature(model.forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = sum(p.kind in positional and p.default is inspect.Parameter.empty for p in kinds)
        return tuple(batch[: max(required, 1)]), {}  # what is left are targets
    got = type(batch).__name__ + (f" of {type(batch[0]).__name__}" if isinstance(batch, tuple | list) and batch else "")
    how = "; tokenize texts first" if isinstance(batch, str) or got.endswith(" of str") else ""
    how = "; torch.as_tensor makes a tensor of it" if hasattr(batch, "__array__") else how
    raise TypeError(
        f"{where} must be a tensor, a mapping of the model's keyword arguments, or a tuple or list that begins with "
        f"the model's inputs as tensors, got {got}{how}"
    )


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
