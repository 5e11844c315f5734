"""How each linear layer of a model is computed on this CPU, how fast, and how fast the float layer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..convert.schemes import SchemeRules
from ..convert.selection import select_layers
from ..formats.scheme import QuantScheme
from ..kernels import isa
from ..nn.adapters import adapter_of
from ..profiling.layers import ROWS, SECONDS, Timing, time_layers
from ..system.text_table import aligned


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
        text = aligned([header, *(_cells(timing) for timing in self.timings)])
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
    if not rows or min(rows) < 1:
        raise ValueError(f"rows must be at least 1, got {', '.join(map(str, rows)) or 'nothing'}")
    parsed = QuantScheme.parse(scheme) if scheme is not None else QuantScheme.parse("w8a8")
    layers, _ = select_layers(model, SchemeRules(parsed))
    chosen = [
        (layer.names, layer.module)
        for layer in layers
        if not layer.is_lookup
        and (layer.is_quantized or (scheme is not None and layer.reason is None))
        and layer.adapter.measured
    ]
    if not chosen:
        raise ValueError("model has no quantized linear layer" + ("" if scheme is None else f" and none for {parsed}"))
    _, first = chosen[0]
    dtype = str(adapter_of(first).dtype(first)).removeprefix("torch.")
    return Explanation(isa.current(), dtype, time_layers(chosen, parsed, rows, seconds))
