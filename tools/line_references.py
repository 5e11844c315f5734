"""Links to lines of code: `python tools/line_references.py` points each to the line that holds its symbol.

Such a link is [`SYMBOL`](FILE#LNUMBER) in docs/internals/; exactly one line of the file holds the symbol.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "internals").glob("*.md"))
LINK = re.compile(r"\[`(?P<symbol>[^`]+)`\]\((?P<file>[^)#]+)#L(?P<line>\d+)\)")


def line_of(symbol: str, file: Path) -> int:
    """The number of the one line that holds `symbol`.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [number for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if symbol in line]
    if len(found) != 1:
        raise ValueError(
            f"{symbol!r} must stand in one line of {file.relative_to(ROOT)}, and stands in {found or 'none'}"
        )
    return found[0]


def mended(page: Path, text: str) -> str:
    """The text of a page with the right line in each link."""

    def mend(match: re.Match[str]) -> str:
        line = line_of(match["symbol"], (page.parent / match["file"]).resolve())
        return f"[`{match['symbol']}`]({match['file']}#L{line})"

    return LINK.sub(mend, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(mended(page, page.read_text(encoding="utf-8")), encoding="utf-8")
