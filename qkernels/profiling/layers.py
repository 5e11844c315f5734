"""The time of linear layers quantized and in float, beside the limit of this CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.scheme import QuantScheme
from ..kernels import dispatch, ops
from ..kernels.isa import native
from ..kernels.quantizers import quantize_weight
from ..nn.adapters import adapter_of
from ..nn.storage import Storage
from .roofline import MatmulCost, Roofline, measure
from .timing import Turns, interleave

# Rows of x: decoding one sequence, a few sequences, and a block of tokens (prefill, training).
ROWS = (1, 16, 256)
# A layer counts as slower than its float twin only beyond what two timings of the same thing differ by.
NOISE = 1.05
SECONDS = 0.05  # of timing for each layer and M
ROOFLINE_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """One product of a layer with `m` rows of x.

    Attributes:
        layers: names of the layers with this shape.
        shape: (N, K) = (out_features, in_features).
        m: rows of x.
        scheme: of the quantized weight.
        kernel: the driver of the core that computes it.
        reason: why this one.
        threads: how many it uses.
        seconds, float_seconds: medians of the quantized and of the float layer, timed in turn.
        quartiles, float_quartiles: of the same timings, the first and the third.
        limit_seconds: no implementation of the quantized product is faster on this CPU.
        limited_by: the instruction or the memory that sets the limit.
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    m: int
    scheme: str
    kernel: str
    reason: str
    threads: int
    seconds: float
    float_seconds: float
    quartiles: tuple[float, float]
    float_quartiles: tuple[float, float]
    limit_seconds: float
    limited_by: str

    @property
    def speedup(self) -> float:
        return self.float_seconds / self.seconds

    @property
    def slower(self) -> bool:
        """True if the float layer is faster, beyond the noise of timing and the spread of both."""
        return self.seconds > NOISE * self.float_seconds and self.quartiles[0] > self.float_quartiles[1]


def time_layers(
    layers: Iterable[tuple[Sequence[str], nn.Module]], scheme: QuantScheme, rows: Sequence[int], seconds: float
) -> list[Timing]:
    """One timing for each distinct shape of `layers` (names, module) and each number of rows."""
    shapes: dict[tuple[Any, ...], tuple[list[str], nn.Module]] = {}
    for names, module in layers:
        adapter, device = adapter_of(module), next(module.parameters()).device
        if device.type != "cpu":
            raise ValueError(
                f"layer {names[0]!r} is on {device}; only layers on the CPU can be timed. There it runs on "
                f"{_backend(device)}"
            )
        assert adapter is not None, f"{names[0]} is no layer that can be quantized"
        own, bias = adapter.scheme(module) or scheme, adapter.bias(module) is not None
        shape = (*adapter.shape(module), own, adapter.dtype(module), bias)
        shapes.setdefault(shape, ([], module))[0].append(names[0])
    roofline = measure(torch.get_num_threads(), ROOFLINE_SECONDS)
    return [
        _time(tuple(names), module, shape[2], m, seconds, roofline)
        for shape, (names, module) in shapes.items()
        for m in rows
    ]


def _backend(device: torch.device) -> str:
    choice = dispatch.select(dispatch.facts_of(device))
    return f"{choice.backend}: {choice.reason}"


@torch.no_grad()
def _time(
    names: tuple[str, ...], module: nn.Module, scheme: QuantScheme, m: int, seconds: float, roofline: Roofline
) -> Timing:
    adapter = adapter_of(module)
    assert adapter is not None
    dtype, weight, bias = adapter.dtype(module), adapter.weight(module), adapter.bias(module)
    stored = module.quantized_weight() if isinstance(module, Storage) else quantize_weight(weight, scheme)
    n, k = weight.shape
    x = torch.randn(m, k).to(dtype)
    x_scale = torch.full((1,), 4 / 127) if scheme.static_activations else None  # a few values are clamped

    def quantized(x: Tensor) -> Tensor:
        return ops.linear(x, *stored, bias, scheme.name, None, x_scale)

    turns = [Turns([quantized], x), Turns([lambda x: nn.functional.linear(x, weight, bias)], x)]
    interleave(turns, seconds)
    ordered = [sorted(turn.samples) for turn in turns]
    seconds, float_seconds = (samples[len(samples) // 2] for samples in ordered)
    quartiles, float_quartiles = ((samples[len(samples) // 4], samples[3 * len(samples) // 4]) for samples in ordered)
    choice = native.choose_linear(scheme.name, m, n, k, torch.get_num_threads())
    limit = roofline.limit(MatmulCost.of(m, n, k, scheme.name, str(dtype).removeprefix("torch.")))
    return Timing(
        names, (n, k), m, scheme.name, choice["driver"], choice["reason"], choice["threads"], seconds, float_seconds,
        quartiles, float_quartiles, limit.seconds, limit.by,
    )  # fmt: skip
