"""The console script `qkernels`, also `python -m qkernels`."""

from __future__ import annotations

import warnings

import typer

from .bench import bench
from .common import one_line_errors
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .finetune import finetune
from .generate import generate
from .info import info
from .tune import tune

app = typer.Typer(
    help="int8 and int4 linear layers for PyTorch: inspect, fine-tune, evaluate, generate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(explain)
app.command()(finetune)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(demo)
app.command()(tune)
app.add_typer(bench, name="bench")


@app.callback()
@one_line_errors
def check_instruction_set() -> None:
    """Refuse a bad QKERNELS_ISA before any command starts."""
    from .. import isa
    from ..finetune import InputError

    try:
        isa.current()
    except ValueError as error:
        raise InputError(str(error)) from error


def main() -> None:
    """Entry point of the console script."""
    # A deprecation between transformers and PEFT, on which a user of this program cannot act.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    app(prog_name="qkernels")
