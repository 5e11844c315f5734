"""`qkernels tune`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench import Layers, Rows, Schemes, numbers
from .common import one_line_errors


@one_line_errors
def tune(
    layers: Layers = "llama-8b",
    rows: Rows = "1,16,256,2048",
    schemes: Schemes = "w8a8,w4a8-g128,w4a16-g128",
    seconds: Annotated[float, typer.Option(help="For the whole search.")] = 600.0,
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write or add to.", show_default="tuned.json in ~/.cache/qkernels"),
    ] = None,
) -> None:
    """Measure tiles of the GPU kernels and keep the fastest in a file; needs a GPU."""
    import torch

    from ..bench.shapes import parse_layers
    from ..finetune import InputError
    from ..formats.scheme import QuantScheme
    from ..kernels import dispatch

    counts, names = numbers("rows", rows), schemes.split(",")
    if not seconds > 0:
        raise InputError(f"seconds must be positive, got {seconds:g}")
    try:
        shapes = parse_layers(layers)
        for name in names:
            QuantScheme.parse(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not torch.cuda.is_available():
        raise InputError("tuning measures on a GPU, and torch finds none: nothing was measured or written")
    choice = dispatch.select(dispatch.facts_of(torch.device("cuda:0")))
    if choice.backend != "triton":
        raise InputError(f"tuning is for the Triton kernels, which this GPU does not use: {choice.reason}")
    from rich.console import Console

    from ..kernels.triton import tuning
    from ..profiling import tune_tiles

    path = output or tuning.user_file()
    try:
        tuning.prepare(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{error}; nothing was measured") from error
    cases = [(shape.n, shape.k, m, scheme) for shape in shapes for scheme in names for m in counts]
    with Console(stderr=True).status("measuring") as status:
        device, findings = tune_tiles.tune(cases, seconds, status.update)
    try:
        tuning.save(path, device, findings)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    _print(findings)
    better = sum(finding.better for finding in findings)
    print(f"{better} of {len(findings)} products are faster with other tiles on {device}; written to {path}")


def _print(findings: Iterable[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rows", "columns", "depth", "factors", "before us", "best us", "tried", "tiles", box=None)
    for found in findings:
        product, config = found.product, found.config
        table.add_row(
            *map(str, (product.rows, product.columns, product.depth)),
            product.operand + (f", groups of {product.group}" if product.group else ""),
            f"{found.before * 1e6:.1f}",
            f"{found.seconds * 1e6:.1f}",
            str(found.tried),
            f"{config.rows} x {config.columns} x {config.depth}, {config.num_warps} warps, {config.num_stages} stages",
        )
    Console().print(table)
