"""The report of `quantize_`: what became of every matrix weight of a model, and why."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ..system.text_table import aligned


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer, embedding, or other matrix weight.

    Attributes:
        name: its first name in the model.
        kind: the class of the layer before the conversion, or of the module that holds the weight.
        shape: (N, K) = (out_features, in_features); of a weight that is no linear layer or embedding, its own shape.
        scheme: name of the scheme it is quantized with; None: it is in float.
        bytes_before, bytes_after: of the weight, without the bias; 0 if it is shared with an earlier row.
        weight_error: relative error of the dequantized weight (Frobenius norm); None: not quantized by this call, or
            without values.
        reason: why this call left it as it was; None: it was quantized.
        note: what else is to be known of a layer that was quantized.
        x_scale: the scale of static activations.
        clipped_share: how many of the values that calibration saw are clamped by it, in [0, 1].
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str | None
    bytes_before: int
    bytes_after: int
    weight_error: float | None = None
    reason: str | None = None
    note: str | None = None
    x_scale: float | None = None
    clipped_share: float | None = None


@dataclass
class QuantizationReport:
    """One row for each linear layer, embedding and other matrix weight; `str()` is a plain-text table.

    Attributes:
        scheme, mode, grad_dtype, weight_scale: what the call asked for.
        rows: in the order of the model's modules.
        warnings: what the call warned of, such as patterns that matched nothing.
    """

    scheme: str
    mode: str
    grad_dtype: str
    rows: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    weight_scale: str = "absmax"

    @property
    def quantized(self) -> list[LayerReport]:
        """The rows of the layers that this call quantized."""
        return [row for row in self.rows if row.reason is None]

    @property
    def left(self) -> list[LayerReport]:
        """The rows of the layers and other weights that this call left as they were."""
        return [row for row in self.rows if row.reason is not None]

    @property
    def bytes_before(self) -> int:
        """Bytes of all matrix weights of the model before the call."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all matrix weights of the model after the call."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def quantized_share(self) -> float:
        """How many of the numbers in all matrix weights are in the layers that this call quantized, in [0, 1]."""
        return self._shares()["quantized"]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, with the totals; JSON can hold it."""
        totals = {
            "layers": len(self.rows),
            "quantized_layers": len(self.quantized),
            "quantized_share": self.quantized_share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "scheme", "before", "after", "error", "left because / note")
        text = aligned([header, *(_cells(row) for row in self.rows)])
        text.append(self._total())
        return "\n".join(text + [f"warning: {warning}" for warning in self.warnings])

    def _total(self) -> str:
        shares = self._shares()
        ratio = f" ({self.bytes_after / self.bytes_before:.2f}x)" if self.bytes_before else ""
        left = ", ".join(
            f"{_percent(share)} {why}" for why, share in shares.most_common() if share and why != "quantized"
        )
        return (
            f"total: {len(self.quantized)} of {len(self.rows)} layers quantized to {self.scheme}, "
            f"{_percent(shares['quantized'])} of the matrix weights, "
            f"{_megabytes(self.bytes_before)} -> {_megabytes(self.bytes_after)}{ratio}"
            + (f"; left as they were: {left}" if left else "")
        )

    def _shares(self) -> Counter[str]:
        """Share of the numbers in all matrix weights by the reason for leaving them, without what follows a colon."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            why = "quantized" if row.reason is None else row.reason.partition(":")[0]
            counts[why] += math.prod(row.shape) if row.bytes_before else 0  # 0: counted with an earlier row
        total = max(counts.total(), 1)
        return Counter({why: count / total for why, count in counts.items()})


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


def _cells(row: LayerReport) -> tuple[str, ...]:
    error = "" if row.weight_error is None else f"{row.weight_error:.4f}"
    sizes = (_megabytes(row.bytes_before), _megabytes(row.bytes_after))
    shape = "x".join(map(str, row.shape))
    return (row.name, row.kind, shape, row.scheme or "-", *sizes, error, row.reason or row.note or "")
