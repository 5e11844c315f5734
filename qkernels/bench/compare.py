"""Two runs side by side: the ratio of each row, and which rows of ours became slower than chance explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import Results, Row

MIN_CHANGE = 1.05  # smaller ratios are never named, however narrow the quartiles


@dataclass(frozen=True)
class Comparison:
    """A row that both runs have."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """Time after over time before: above 1 is slower."""
        return self.after.median / self.before.median

    @property
    def verdict(self) -> str:
        """Either "slower" or "faster", if the quartiles do not overlap and the ratio is beyond MIN_CHANGE; else ""."""
        if self.ratio > MIN_CHANGE and self.after.quartiles[0] > self.before.quartiles[1]:
            return "slower"
        if self.ratio < 1 / MIN_CHANGE and self.after.quartiles[1] < self.before.quartiles[0]:
            return "faster"
        return ""


def compare(before: Results, after: Results) -> list[Comparison]:
    """The rows that both runs have, in the order of the second."""
    known = {row.key: row for row in before.rows}
    return [Comparison(known[row.key], row) for row in after.rows if row.key in known]


def regressions(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Rows of ours that are slower; rows of others tell about the machine only."""
    return [item for item in comparisons if item.after.ours and item.verdict == "slower"]
