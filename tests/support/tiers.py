"""Which parameters run in which tier: `make test-quick`, `make test`, and with `make test-slow` all of them.

A test without a marker runs in every tier. `thorough` leaves it out of the first, `slow` out of the first two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest

from qkernels import QuantScheme
from qkernels.kernels import isa

# One of each way to multiply: plain, grouped, with groups of activations, without quantized activations.
QUICK_SCHEMES = ("w8a8", "w8a8-g64-ag32", "w4a8-g32-asym", "w4a8-g128", "w8a16", "w4a16-g32-asym")


def _pairs(name: str) -> set[tuple]:
    """The pairs of values of two of the scheme's axes: format of the weight, its groups, the activations' groups."""
    scheme = QuantScheme.parse(name)
    weight = (scheme.weight_bits, scheme.zeros)
    activations = (scheme.act_bits, scheme.act_group_size)
    axes = (("weight", weight), ("group", scheme.group_size), ("activations", activations))
    return set(combinations(axes, 2))


def pairwise(names: Sequence[str]) -> list[str]:
    """Few of these schemes, in which every pair of values of two axes occurs that occurs in all of them."""
    chosen = [name for name in names if name in QUICK_SCHEMES]
    left = set().union(*map(_pairs, names)) - set().union(*map(_pairs, chosen))
    while left:
        chosen.append(max(names, key=lambda name: len(_pairs(name) & left)))
        left -= _pairs(chosen[-1])
    return [name for name in names if name in chosen]


def tiered(names: Iterable[str]) -> list:
    """Parameters of a test: few schemes in the quick tier, every pair of axes in the next, all of them in `slow`.

    For code that sees the axes of a scheme one by one. What all of them together make of it, in every kernel,
    `tests/native/core_check.cpp` computes.
    """
    names = list(names)
    usual = set(pairwise(names))
    marks = {name: pytest.mark.thorough if name in usual else pytest.mark.slow for name in names}
    return [pytest.param(name, marks=() if name in QUICK_SCHEMES else marks[name]) for name in names]


def isa_parameters() -> list:
    """The instruction sets of this CPU: in the quick tier the plainest and the best, in the next all of them."""
    names = isa.supported()
    return [pytest.param(name, marks=() if name in (names[0], names[-1]) else pytest.mark.thorough) for name in names]
