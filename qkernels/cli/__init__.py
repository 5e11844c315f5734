"""The console script `qkernels`, also `python -m qkernels`."""

from __future__ import annotations

from typing import Annotated

import typer

from .bench import bench
from .common import one_line_errors
from .compare import compare
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .finetune import finetune
from .generate import generate
from .info import info
from .inspect import inspect
from .merge import merge
from .quantize import quantize
from .tune import tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(explain)
app.command()(finetune)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(inspect)
app.command()(convert)
app.command()(quantize)
app.command()(merge)
app.command()(generate)
app.command()(demo)
app.command()(tune)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        print(f"qkernels {__version__}")
        raise typer.Exit


@app.callback()
@one_line_errors
def prepare(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """int8 and int4 linear layers for PyTorch: inspect, fine-tune, evaluate, generate, measure."""
    # A bad QKERNELS_ISA is refused before any command starts.
    from ..finetune import InputError
    from ..finetune.quiet import keep_quiet
    from ..kernels import isa

    keep_quiet()
    try:
        isa.current()
    except ValueError as error:
        raise InputError(str(error)) from error


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="qkernels")
