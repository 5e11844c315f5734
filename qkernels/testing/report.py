"""What `conformance` says, and how two results are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import Tensor

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Check:
    """One property of a layer.

    Attributes:
        name: of the property.
        status: "ok", "failed", or "skipped" (it does not apply; `detail` says why).
        error: what was measured, where the property is a number: the largest deviation relative to its bound.
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
    """What `conformance` found; `str()` is a plain-text table.

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

    def to_dict(self) -> dict:
        """The report as plain data; JSON can hold it."""
        return asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.3g}"

        lines = [("check", "status", "error", "bound", "detail")]
        lines += [(c.name, c.status, number(c.error), number(c.bound), c.detail) for c in self.checks]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        verdict = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} checks without a finding"
        return "\n".join([self.layer, *table, verdict])


class Outcome(NamedTuple):
    status: str
    error: float | None = None
    bound: float | None = None
    detail: str = ""


def verdict(fine: bool, detail: str) -> Outcome:
    return Outcome(OK if fine else FAILED, detail=detail)


def compare(actual: Tensor, exact: Tensor, bound: Tensor) -> Outcome:
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


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def equal(actual: Tensor, expected: Tensor) -> Outcome:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        found = [f"{t.dtype} of shape {list(t.shape)}" for t in (actual, expected)]
        return Outcome(FAILED, detail=f"{found[0]}, expected {found[1]}")
    if same_bits(actual, expected):
        return Outcome(OK, 0.0, 0.0, "bit-identical")
    differs = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    error = (actual.double() - expected.double()).abs().nan_to_num(math.inf).max().item()
    return Outcome(FAILED, error, 0.0, f"{int(differs.sum())} of {differs.numel()} elements differ")


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The first that failed, else the one that came closest to its bound."""
    failed = [outcome for outcome in outcomes if outcome.status == FAILED]
    return failed[0] if failed else max(outcomes, key=lambda o: (o.error or 0) / (o.bound or 1))


def all_equal(results: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> Outcome:
    return worst([equal(a, b) for a, b in zip(results, expected, strict=True) if a is not None or b is not None])
