"""`conformance`: what a layer must do to stand in for `nn.Linear`, measured on any layer, ours or another library's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checks import CHECKS
from .report import FAILED, OK, SKIPPED, Check, ConformanceReport, Outcome
from .subject import Subject

__all__ = ["FAILED", "OK", "SKIPPED", "Check", "ConformanceReport", "conformance"]


def conformance(
    layer: nn.Module, *, dtype: torch.dtype | None = None, seed: int = 0, input_range: float | None = None
) -> ConformanceReport:
    """Check a linear-like layer against what `nn.Linear` promises and against its own dequantized weight.

    The layer is y = x @ W.T + b for some weight W, perhaps with x rounded to 8 bits a row. W is asked of
    `layer.dequantize()`, or is the float weight of a plain `nn.Linear`; of any other layer it is read off the outputs
    for an identity matrix, so that nothing need be known about the library. Outputs and gradients are compared with
    float64 products of W, under bounds derived from the roundings that such a layer makes (`docs/training.md` states
    them). A gradient that differs between seeds is taken for stochastically rounded: its mean must be exact.

    The layer is neither changed nor moved. Whatever it raises is recorded as a failed check. What torch.compile has
    compiled before in this process is forgotten.

    Args:
        layer: with `in_features` and `out_features`, computing [..., in_features] -> [..., out_features].
        dtype: of the inputs; None: the layer's `compute_dtype` or that of its first float parameter.
        seed: of the inputs and of stochastic gradients.
        input_range: of a layer whose activations have one scale for all rows (static activations), the largest
            magnitude of x that it represents, 127 times that scale. Inputs are drawn inside, and what lies outside must
            saturate. None: by the layer's `x_scale`, as of a `QuantLinear` of an `a8s` scheme; without one, each row of
            x may be of any size.

    Raises:
        TypeError: if `layer` is no module with `in_features` and `out_features`.
        ValueError: if the range is not positive and finite.

    Example:
        >>> layer = qk.QuantLinear.from_float(nn.Linear(64, 32), "w8a8s", x_scale=torch.tensor([0.02]))
        >>> qk.testing.conformance(layer)["saturation"].status
        'ok'
    """
    sizes = [getattr(layer, name, None) for name in ("in_features", "out_features")]
    if not isinstance(layer, nn.Module) or not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"layer must be a module with in_features and out_features, got {type(layer).__name__}")
    subject = Subject(layer, dtype or _dtype(layer), seed, _input_range(layer, input_range))
    threads, was_training = torch.get_num_threads(), layer.training
    checks = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            for name, function in CHECKS.items():
                torch.manual_seed(seed)
                try:
                    outcome = function(subject)
                except Exception as error:  # whatever a foreign layer raises is the finding
                    outcome = Outcome(FAILED, detail=first_line(error))
                checks.append(Check(name, *outcome))
        finally:
            torch.set_num_threads(threads)
            layer.train(was_training)
    title = f"{type(layer).__name__}({layer.extra_repr()}), inputs {str(subject.dtype).removeprefix('torch.')}"
    return ConformanceReport(title, tuple(checks))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def _dtype(layer: nn.Module) -> torch.dtype:
    declared = getattr(layer, "compute_dtype", None)
    floats = (p.dtype for p in layer.parameters() if p.is_floating_point())
    return declared if isinstance(declared, torch.dtype) else next(floats, torch.float32)


def _input_range(layer: nn.Module, given: float | None) -> float | None:
    """The range of static activations: the one that is given, or what the `x_scale` of the layer represents."""
    x_scale = getattr(layer, "x_scale", None)
    if given is None and isinstance(x_scale, Tensor) and x_scale.numel() == 1:
        given = 127 * abs(x_scale.item())
    if given is not None and not (math.isfinite(given) and given > 0):
        raise ValueError(f"input_range must be positive and finite, got {given}")
    return given
