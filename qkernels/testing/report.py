"""The report of `conformance`, and how two results are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Check:
    """One property of a layer.

    Attributes:
        name: of the property.
        status: "ok", "failed", or "skipped" (it does not apply; `detail` says why).
        error: what was measured, where the property is a number: the deviation of the element closest to its bound, or
            beyond it; of a stochastic gradient the relative error of the mean.
        bound: the most that `error` may be; 0 asks for equal bits.
        detail: what was seen.
    """

    name: str
    status: str
    error: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class ConformanceReport:
    """The findings of `conformance`; `str()` is a plain-text table.

    Attributes:
        layer: what was checked.
        checks: in the order they ran.
    """

    layer: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The properties that the layer lacks."""
        return [check for check in self.checks if check.status == FAILED]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; JSON can hold it."""
        return asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.3g}"

        lines = [("check", "status", "error", "bound", "detail")]
        lines += [(c.name, c.status, number(c.error), number(c.bound), c.detail) for c in self.checks]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        summary = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} checks without a finding"
        return "\n".join([self.layer, *table, summary])


class Outcome(NamedTuple):
    """The result of a check: a `Check` without its name."""

    status: str
    error: float | None = None
    bound: float | None = None
    detail: str = ""


def verdict(fine: bool, detail: str) -> Outcome:
    return Outcome(OK if fine else FAILED, detail=detail)


def compare(actual: Tensor | None, exact: Tensor, bound: Tensor) -> Outcome:
    """The element that is furthest from `exact` in terms of its bound."""
    if actual is None:
        return Outcome(FAILED, detail="there is no gradient")
    if actual.shape != exact.shape:
        return Outcome(FAILED, detail=f"shape {list(actual.shape)}, expected {list(exact.shape)}")
    error = (actual.double() - exact.double()).abs()
    worst = (error / bound.clamp(min=1e-300)).nan_to_num(math.inf).argmax()
    e, b = error.flatten()[worst].item(), bound.flatten()[worst].item()
    relative = ((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300)).item()
    return Outcome(OK if e <= b else FAILED, e, b, f"relative error {relative:.2g}")


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise, by bits; NaN equals NaN."""
    view = _INTEGERS[a.element_size()]
    return (a.contiguous().view(view) != b.contiguous().view(view)) & ~(a.isnan() & b.isnan())


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """True if both hold the same; None is equal to None only."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and not _differs(a, b).any()


def equal(actual: Tensor | None, expected: Tensor | None) -> Outcome:
    """Equal bits, or how many elements differ and by how much."""
    if actual is None or expected is None:
        return Outcome(FAILED, detail="there is no gradient")
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        found = [f"{t.dtype} of shape {list(t.shape)}" for t in (actual, expected)]
        return Outcome(FAILED, detail=f"{found[0]}, expected {found[1]}")
    differs = _differs(actual, expected)
    if not differs.any():
        return Outcome(OK, 0.0, 0.0, "bit-identical")
    error = (actual.double() - expected.double()).abs().nan_to_num(math.inf).max().item()
    return Outcome(FAILED, error, 0.0, f"{int(differs.sum())} of {differs.numel()} elements differ")


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The first that failed, else the one that came closest to its bound."""
    failed = [outcome for outcome in outcomes if outcome.status == FAILED]
    return failed[0] if failed else max(outcomes, key=lambda o: (o.error or 0) / (o.bound or 1))


def all_equal(results: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> Outcome:
    """`equal` for each pair."""
    return worst([equal(a, b) for a, b in zip(results, expected, strict=True) if a is not None or b is not None])
