"""`qkernels demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Cache, Dtype, one_line_errors


@one_line_errors
def demo(
    output: Annotated[Path, typer.Option(help="Write to this folder and replace a former run.")] = Path("demo"),
    full: Annotated[bool, typer.Option("--full", help="Take all steps and all text, however long it takes.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Choose the work so that it ends in about this time.")] = 180,
    dtype: Dtype = "auto",
    cache: Cache = None,
) -> None:
    """Fine-tune Gemma-3-270M in float, w8a8 and w4a8-g32-asym on technical English and compare them in one table."""
    from ..finetune.demo import ChildFailed, run_demo
    from ..finetune.models import default_cache, require
    from ..finetune.quiet import hide_bars

    require("transformers")
    hide_bars()
    try:
        run_demo(output, full=full, dtype=dtype, seconds=seconds, cache=cache or default_cache())
    except ChildFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
