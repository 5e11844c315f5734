"""What every implementation of a linear layer that is timed has in common."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..profiling.roofline import MatmulCost

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD, GRAD_INPUT, OVERHEAD = "forward", "grad-input", "overhead"
WARM, COLD = "warm", "cold"


class HasName(Protocol):
    name: str


Named = TypeVar("Named", bound=HasName)


@dataclass(frozen=True)
class Case:
    """One cell of the benchmark: every candidate is timed on it, in turn.

    Attributes:
        layer: where the shape comes from.
        direction: "forward", "grad-input", or "overhead" (a forward so small that the call is what takes time).
        weights: "warm" (the same weight again and again) or "cold" (another copy at each call).
        dtype: of the activations, for candidates that leave the choice.
    """

    layer: str
    m: int
    n: int
    k: int
    direction: str
    weights: str
    dtype: str
    threads: int

    @property
    def columns(self) -> tuple[int, int]:
        """Columns of the input and of the result."""
        return (self.n, self.k) if self.direction == GRAD_INPUT else (self.k, self.n)

    def __str__(self) -> str:
        return f"{self.direction} {self.m} x {self.n} x {self.k} ({self.weights}, {self.threads} threads)"


class Candidate:
    """An implementation. A subclass states the attributes and overrides what differs.

    Attributes:
        name: stable, unique.
        kind: what it multiplies: "int8", "bfloat16" or "float32".
        weight_bits: stored bits per weight, scales included.
        tolerance: largest relative error (Frobenius) against the float64 product of the same inputs.
        directions: what it can compute.
        module: the package it needs, or None.
        max_copies: of the weight, for those that take long to prepare one.
    """

    name: str
    kind: str
    weight_bits: float
    tolerance: float
    directions: tuple[str, ...] = (FORWARD,)
    module: str | None = None
    max_copies: int | None = None

    def __init__(self, case: Case):
        self.case = case

    @property
    def dtype(self) -> torch.dtype:
        """Of its input and result."""
        return DTYPES[self.case.dtype]

    def unavailable(self) -> str | None:
        """Why the case cannot be timed with this candidate on this machine, or None."""
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # a broken installation may raise anything, and is a reason too
                return f"cannot import {self.module}: {type(error).__name__}: {error}".splitlines()[0]
        return None

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Any], Any]:
        """Quantize or pack the float32 weight [N, K] into memory of its own; what is returned is timed."""
        raise NotImplementedError

    def scope(self) -> AbstractContextManager[object]:
        """Settings that hold while its calls are made."""
        return nullcontext()

    def convert_input(self, x: Tensor) -> Any:
        """float32 x -> what the prepared callable takes; not timed."""
        return x.to(self.dtype)

    def convert_output(self, out: Any) -> Tensor:
        """What the callable returns -> a float tensor [M, columns]; not timed."""
        return out

    def product(self) -> MatmulCost:
        """For the limit: its arithmetic and its bytes."""
        case = self.case
        weight_bytes = int(case.n * case.k * self.weight_bits / 8)
        activations = case.m * (case.n + case.k) * self.dtype.itemsize
        return MatmulCost(case.m, case.n, case.k, self.kind, weight_bytes, activations)


def chosen(found: Iterable[Named], only: tuple[str, ...]) -> list[Named]:
    """Those whose name matches one of the fnmatch patterns; without patterns, all."""
    return [item for item in found if not only or any(fnmatchcase(item.name, pattern) for pattern in only)]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`."""
    return ((actual.to(torch.float64) - exact).norm() / exact.norm()).item()
