"""How each linear layer of a model is computed on this CPU, how fast, and how fast the float layer is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _native
from ..formats.scheme import QuantScheme
from ..kernels import dispatch, isa, ops
from ..kernels.quantizers import quantize_weight
from ..nn.linear import QuantLinear, float_weight
from ..profiling.roofline import Product, Roofline, measure
from ..profiling.timing import Turns, interleave

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
        """Whether the float layer is faster, beyond the noise of timing and the spread of both."""
        return self.seconds > NOISE * self.float_seconds and self.quartiles[0] > self.float_quartiles[1]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` is a plain-text table.

    Attributes:
        isa: instruction set of the kernels.
        dtype: of the float layers.
        timings: a row for each shape and number of rows.
    """

    isa: str
    dtype: str
    timings: list[Timing]

    @property
    def slower(self) -> list[Timing]:
        """The timings in which the float layer is faster."""
        return [timing for timing in self.timings if timing.slower]

    def to_dict(self) -> dict[str, Any]:
        """As plain data; JSON can hold it."""
        rows = [asdict(t) | {"speedup": t.speedup, "slower": t.slower} for t in self.timings]
        return {"isa": self.isa, "dtype": self.dtype, "timings": rows}

    def __str__(self) -> str:
        header = (
            "layers",
            "N x K",
            "M",
            "kernel",
            "threads",
            "ms",
            "quartiles",
            f"{self.dtype} ms",
            "quartiles",
            "speed-up",
            "of limit",
            "limit",
        )
        lines = [header, *(_cells(timing) for timing in self.timings)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        reasons = {(t.kernel, t.reason): None for t in self.timings}
        text += [f"{kernel}: {reason}" for kernel, reason in reasons]
        text += [
            f"slower than {self.dtype}: {', '.join(t.layers)} at M = {t.m} ({t.speedup:.2f}x)" for t in self.slower
        ] or [f"no layer is slower than {self.dtype}"]
        return "\n".join(text)


def _cells(t: Timing) -> tuple[str, ...]:
    layers = t.layers[0] if len(t.layers) == 1 else f"{t.layers[0]} and {len(t.layers) - 1} more"
    return (
        layers, f"{t.shape[0]} x {t.shape[1]}", str(t.m), t.kernel, str(t.threads),
        f"{t.seconds * 1e3:.3f}", _range(t.quartiles), f"{t.float_seconds * 1e3:.3f}", _range(t.float_quartiles),
        f"{t.speedup:.2f}x", f"{t.limit_seconds / t.seconds:.0%}", t.limited_by,
    )  # fmt: skip


def _range(seconds: tuple[float, float]) -> str:
    return "..".join(f"{value * 1e3:.3f}" for value in seconds)


def explain(
    model: nn.Module, scheme: str | QuantScheme | None = None, rows: Sequence[int] = ROWS, *, seconds: float = SECONDS
) -> Explanation:
    """Time every linear layer of a model as it would run quantized, and as it runs in float.

    Layers of one shape are timed once. The model is not changed.

    Args:
        model: on the CPU; its linear layers may be in float, or quantized already (then the scheme is theirs).
        scheme: of the float layers that `quantize_` would convert; None: only quantized layers are looked at.
        rows: values of M, the rows of x.
        seconds: of timing for each of the two layers and each M.

    Raises:
        ValueError: for an unknown scheme, a bad number of rows, a layer on another device, or if there is no layer.
    """
    from ..convert.model import QuantizationReport, plan

    if not rows or min(rows) < 1:
        raise ValueError(f"rows must be at least 1, got {', '.join(map(str, rows)) or 'nothing'}")
    parsed = QuantScheme.parse(scheme) if scheme is not None else QuantScheme.parse("w8a8")
    layers = plan(model, parsed, (), None, QuantizationReport(parsed.name, "frozen", "float"))
    chosen = [
        (layer.names, layer.module)
        for layer in layers
        if isinstance(layer.module, QuantLinear) or (scheme is not None and layer.reason is None)
    ]
    if not chosen:
        raise ValueError("model has no quantized linear layer" + ("" if scheme is None else f" and none for {parsed}"))
    dtype = str(_dtype(chosen[0][1])).removeprefix("torch.")
    return Explanation(isa.current(), dtype, time_layers(chosen, parsed, rows, seconds))


def time_layers(
    layers: Iterable[tuple[Sequence[str], nn.Module]], scheme: QuantScheme, rows: Sequence[int], seconds: float
) -> list[Timing]:
    """One timing for each distinct shape of `layers` (names, module) and each number of rows."""
    shapes: dict[tuple, tuple[list[str], nn.Module]] = {}
    for names, module in layers:
        quantized = isinstance(module, QuantLinear)
        weight = next(module.parameters())
        if weight.device.type != "cpu":
            raise ValueError(
                f"layer {names[0]!r} is on {weight.device}; only layers on the CPU can be timed. There it runs on "
                f"{_backend(weight.device)}"
            )
        own = module.scheme if quantized else scheme
        n, k = (module.out_features, module.in_features) if quantized else float_weight(module).shape
        shapes.setdefault((n, k, own, _dtype(module), module.bias is not None), ([], module))[0].append(names[0])
    roofline = measure(torch.get_num_threads(), ROOFLINE_SECONDS)
    return [
        _time(tuple(names), module, shape[2], m, seconds, roofline)
        for shape, (names, module) in shapes.items()
        for m in rows
    ]


def _backend(device: torch.device) -> str:
    choice = dispatch.select(dispatch.facts_of(device))
    return f"{choice.backend}: {choice.reason}"


def _dtype(module: nn.Module) -> torch.dtype:
    return module.compute_dtype if isinstance(module, QuantLinear) else module.weight.dtype


@torch.no_grad()
def _time(
    names: tuple[str, ...], module: nn.Module, scheme: QuantScheme, m: int, seconds: float, roofline: Roofline
) -> Timing:
    dtype = _dtype(module)
    if isinstance(module, QuantLinear):
        stored, weight = module.quantized_weight(), module.dequantize().to(dtype)
    else:
        weight = float_weight(module)
        stored = quantize_weight(weight, scheme)
    n, k = weight.shape
    x = torch.randn(m, k).to(dtype)
    bias = module.bias

    def quantized(x: Tensor) -> Tensor:
        return ops.linear(x, *stored, bias, scheme.name)

    turns = [Turns([quantized], x), Turns([lambda x: nn.functional.linear(x, weight, bias)], x)]
    interleave(turns, seconds)
    ordered = [sorted(turn.samples) for turn in turns]
    times = [samples[len(samples) // 2] for samples in ordered]
    quartiles = [(samples[len(samples) // 4], samples[3 * len(samples) // 4]) for samples in ordered]
    choice = _native.choose_linear(scheme.name, m, n, k, torch.get_num_threads())
    limit = roofline.limit(Product.of(m, n, k, scheme.name, str(dtype).removeprefix("torch.")))
    return Timing(
        names, (n, k), m, scheme.name, choice["kernel"], _reason(m, choice["dot_rows"]), choice["threads"], *times,
        *quartiles, limit.seconds, limit.by,
    )  # fmt: skip


def _reason(m: int, dot_rows: int) -> str:
    if m <= dot_rows:
        return f"up to {dot_rows} rows the stored weight is read in place, row by row"
    return f"beyond {dot_rows} rows it pays to pack the weight into panels"
