"""What the commands about checkpoints share: opening, progress, losses, the next command."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.checkpoint_format import Progress
    from ..checkpoints.losses import Loss, Losses

OnLoss = Annotated[
    Literal["refuse", "report", "requantize"],
    typer.Option(
        metavar="POLICY",
        help="What the other format cannot hold exactly: refuse; report, and keep the nearest; or requantize, which "
        "also quantizes weights again that it has no integers for.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A bar on standard error while a checkpoint is written; none where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


def say(text: object) -> None:
    """Print, with lines that are longer than the terminal continued below, indented; but for commands to copy."""
    width = max(40, shutil.get_terminal_size().columns)
    for line in str(text).splitlines():
        print(
            line
            if len(line) <= width or line.startswith(_NEXT)
            else textwrap.fill(line, width, subsequent_indent="  ", **_WRAPPING)
        )


def print_rows(rows: list[tuple[str, str, str]]) -> None:
    """What was measured, its value and its meaning, in columns that fit the terminal; and an empty line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value, meaning in rows:
        table.add_row(Text(name), Text(value), Text(meaning, style="dim"))
    console = Console()
    console.print(table)
    console.print()


_NEXT = "next: "
_WRAPPING: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show what is warned of as one line each, and not where in the program."""
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            yield
        finally:
            warnings.showwarning = shown


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def opened(path: str, losses: Losses) -> Checkpoint:
    """The checkpoint at a path.

    Raises:
        InputError: if there is none, or one that is broken or adapter weights.
    """
    from ..checkpoints.registry import open_checkpoint
    from ..finetune import InputError

    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{path} is an adapter: qkernels merge BASE --adapter {shlex.quote(path)} puts it into a model"
        )
    try:
        with plain_warnings():
            return open_checkpoint(folder, losses)
    except ValueError as error:
        raise InputError(str(error)) from error


def loss_rows(losses: list[Loss]) -> list[dict[str, Any]]:
    """One row for each kind of loss: tensors, values that changed of all, the largest change and where it is."""
    kinds: dict[str, list[Loss]] = {}
    for loss in losses:
        kinds.setdefault(loss.what, []).append(loss)
    return [
        {
            "what": what,
            "tensors": len(own),
            "changed": sum(loss.changed for loss in own),
            "total": sum(loss.total for loss in own),
            "largest": max(loss.largest for loss in own),
            "largest_in": max(own, key=lambda loss: loss.largest).tensor,
        }
        for what, own in kinds.items()
    ]


def loss_lines(losses: list[Loss]) -> list[str]:
    """The rows as sentences; one that says so if nothing was lost."""
    return [
        f"lost: {row['changed']} of {row['total']} {row['what']}, in {row['tensors']} tensors; the largest change is "
        f"{row['largest']:.2g} of the largest magnitude, in {row['largest_in']}"
        for row in loss_rows(losses)
    ] or ["lost: nothing, every value is the same"]


def path_bytes(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def schemes_of(checkpoint: Checkpoint) -> dict[str, int]:
    """How many layers each scheme has."""
    return dict(Counter(layer.scheme.name for layer in checkpoint.layers.values()).most_common())


def next_command(path: str | Path) -> str:
    """What a user does next with a model."""
    return f"qkernels generate {shlex.quote(str(path))} --prompt 'Once upon a time'"


def expect_new(path: Path) -> None:
    """Refuse to write where something is.

    Raises:
        InputError: if `path` is there and no empty folder.
    """
    from ..finetune import InputError

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already: remove it, or name another")
