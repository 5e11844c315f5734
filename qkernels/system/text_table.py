"""Tables of plain text, for what `str` makes of a report: they need no terminal and are never cut."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for each row, whose columns begin in the same place.

    Args:
        rows: the cells, as many in each row; the first row may be a header.

    >>> aligned([("layer", "ms"), ("q_proj", "1.2")])
    ['layer   ms', 'q_proj  1.2']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
