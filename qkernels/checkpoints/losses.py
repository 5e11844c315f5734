"""What a conversion cannot keep exactly: refused, or reported with its count and its largest error."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

OnLoss = Literal["refuse", "report", "requantize"]
_AT_ONCE = 1 << 20  # values that are compared in float64 at a time
POLICIES = ("refuse", "report", "requantize")


class LossError(ValueError):
    """A format cannot hold a tensor exactly, and nobody said that it may lose something."""


class Loss(NamedTuple):
    """What one tensor lost."""

    tensor: str  # its name in the model
    what: str  # such as "scales that float16 cannot hold"
    changed: int  # values that differ
    total: int  # values there are
    largest: float  # largest change, relative to the largest magnitude of the tensor


class Losses:
    """The policy of a conversion, and what was lost under it.

    Args:
        on_loss: "refuse": raise at the first value that would change; "report": keep a `Loss` for each tensor;
            "requantize": as "report", and what the other format has no integers for is dequantized and quantized again.

    Raises:
        ValueError: for another word.

    Example:
        >>> import torch
        >>> from qkernels.checkpoints.losses import Losses
        >>> losses = Losses("report")
        >>> losses.changed("layer.scales", "scales that float16 cannot hold", torch.tensor([1.0]), torch.tensor([1.0]))
        >>> losses.entries
        []
    """

    def __init__(self, on_loss: OnLoss = "refuse") -> None:
        if on_loss not in POLICIES:
            raise ValueError(f"on_loss must be one of {', '.join(map(repr, POLICIES))}, got {on_loss!r}")
        self.on_loss = on_loss
        self.entries: list[Loss] = []

    @property
    def requantizes(self) -> bool:
        return self.on_loss == "requantize"

    def changed(self, tensor: str, what: str, exact: Tensor, kept: Tensor) -> None:
        """Account for values that are kept in the place of the exact ones; equal ones are no loss.

        Args:
            tensor: its name in the model.
            what: the values and what cannot hold them.
            exact, kept: of the same shape, compared in float64.

        Raises:
            LossError: if some differ and the policy is "refuse".
        """
        count, largest, magnitude = 0, 0.0, 0.0
        for a, b in zip(exact.flatten().split(_AT_ONCE), kept.flatten().split(_AT_ONCE), strict=True):
            wide, change = a.to(torch.float64), a.to(torch.float64) - b.to(torch.float64)
            count += int((change != 0).sum())
            largest, magnitude = max(largest, float(change.abs().max())), max(magnitude, float(wide.abs().max()))
        if count:
            self.add(Loss(tensor, what, count, exact.numel(), largest / magnitude if magnitude else math.inf))

    def add(self, loss: Loss) -> None:
        """Account for a loss that is known.

        Raises:
            LossError: if the policy is "refuse".
        """
        if self.on_loss == "refuse":
            raise LossError(
                f"{loss.tensor}: {loss.changed} of {loss.total} {loss.what} (largest change {loss.largest:.2g} of the "
                "largest magnitude); pass on_loss='report' to accept that"
            )
        self.entries.append(loss)

    def tell(self, loss: Loss) -> None:
        """Account for a loss that the caller asked for, such as by a type for layers in float: no policy refuses it."""
        self.entries.append(loss)

    def need_report(self, tensor: str, why: str) -> None:
        """Ask whether a weight whose values will change may be read, because `why`: before any value is.

        Raises:
            LossError: if the policy is "refuse".
        """
        if self.on_loss == "refuse":
            raise LossError(f"{tensor}: {why}; pass on_loss='report' to accept that")

    def need_requantization(self, tensor: str, why: str) -> None:
        """Ask whether a weight may be dequantized and quantized again, because `why`.

        Raises:
            LossError: unless the policy is "requantize".
        """
        if not self.requantizes:
            raise LossError(f"{tensor}: {why}; pass on_loss='requantize' to quantize its float values again")
