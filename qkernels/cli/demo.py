"""`qkernels demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Cache, one_line_errors


@one_line_errors
def demo(
    output: Annotated[Path, typer.Option(help="Write to this folder and replace a former run.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Take fewer steps and less held-out text.")] = False,
    cache: Cache = None,
) -> None:
    """Fine-tune Gemma-3-270M in float, w8a8 and w4a8-g32-asym on technical English and compare them in one table."""
    from ..finetune.demo import ChildFailed, run_demo
    from ..finetune.models import default_cache

    try:
        run_demo(output, quick=quick, cache=cache or default_cache())
    except ChildFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
