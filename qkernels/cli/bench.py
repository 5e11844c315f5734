"""`qkernels bench`: the limits of this CPU, layers and training steps beside those of others, two runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..bench.candidate import FORWARD, WARM
from ..bench.experts import ExpertsPlan
from ..bench.suite import Plan
from ..bench.training.cases import NAMES
from ..bench.training.run import TrainPlan
from .common import one_line_errors

bench = typer.Typer(help="Time linear layers against the limits of this CPU and against others.", no_args_is_help=True)

Layers = Annotated[str, typer.Option(help="Time layers of these models or shapes NxK (separate by commas).")]
Rows = Annotated[str, typer.Option("--rows", "-m", help="Multiply x of this many rows (separate by commas).")]
Schemes = Annotated[str, typer.Option(help="Time these schemes (separate by commas).")]
Directions = Annotated[str, typer.Option(help="Time forward, grad-input or both (separate by commas).")]
Weights = Annotated[str, typer.Option(help="Take warm weights (in cache if they fit), cold ones, or both.")]
Threads = Annotated[
    str | None, typer.Option(help="Use this many threads (separate by commas).", show_default="torch's")
]
Only = Annotated[str | None, typer.Option(help="Time what these fnmatch patterns name.", show_default="all")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Take activations of this dtype.")]


@bench.command()
@one_line_errors
def roofline(
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Measure this long for each number of threads.")] = 2.0,
) -> None:
    """Measure instruction peaks and read bandwidths: what no kernel on this CPU can exceed."""
    import torch

    from ..finetune import InputError
    from ..profiling.roofline import measure

    if not seconds > 0:
        raise InputError(f"seconds must be positive, got {seconds:g}")
    counts = numbers("threads", threads) if threads else (torch.get_num_threads(),)
    _print_rooflines([measure(count, seconds) for count in counts])


@bench.command()
@one_line_errors
def linear(
    layers: Layers = "gemma-3-270m,llama-7b",
    rows: Rows = "1,16,256",
    schemes: Schemes = "w8a8,w4a8-g128",
    directions: Directions = FORWARD,
    weights: Weights = WARM,
    threads: Threads = None,
    dtype: Dtype = Plan.dtype,
    seconds: Annotated[float, typer.Option(help="Time each row this long.")] = Plan.seconds,
    overhead: Annotated[bool, typer.Option(help="Time the bare calls too, at 1 x 64 x 64.")] = Plan.overhead,
    peers: Annotated[bool, typer.Option(help="Time what benchmarks/peers.txt installs, too.")] = Plan.peers,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile too (slow).")] = Plan.compiled,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Time on the CPU, or on a GPU (cuda).")] = "cpu",
    only: Only = None,
    output: Annotated[Path, typer.Option(help="Write results and plots to this folder.")] = Path("bench"),
) -> None:
    """Time one linear layer: our kernels, verified against the reference first, and those of others, in turn."""
    import torch
    from rich.console import Console

    from ..bench.plots import save_plots
    from ..bench.suite import run
    from ..finetune import InputError
    from ..finetune.models import check_scheme

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU, so there is nothing to time")
    try:
        plan = Plan(
            layers=layers,
            rows=numbers("rows", rows),
            schemes=tuple(map(check_scheme, schemes.split(","))),
            directions=tuple(directions.split(",")),
            weights=tuple(weights.split(",")),
            threads=numbers("threads", threads) if threads else (torch.get_num_threads(),),
            dtype=dtype,
            seconds=seconds,
            overhead=overhead,
            peers=peers,
            compiled=compiled,
            device=device,
            only=tuple(only.split(",")) if only else (),
        )
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    console = Console(stderr=True)
    with console.status("measuring the limits") as status:
        results = run(plan, status.update)
    paths = [*results.save(output), *save_plots(results, output)]
    _print_rooflines(results.rooflines)
    _print_rows(results)
    print(f"written to {output}: {', '.join(path.name for path in paths)}")


@bench.command()
@one_line_errors
def experts(
    tokens: Annotated[str, typer.Option(help="Time these numbers of tokens (separate by commas).")] = "512,16,1",
    count: Annotated[int, typer.Option("--experts", help="Take layers of so many experts.")] = ExpertsPlan.experts,
    taken: Annotated[int, typer.Option(help="Give each token so many of them.")] = ExpertsPlan.taken,
    hidden: Annotated[int, typer.Option(help="Take hidden states of this size.")] = ExpertsPlan.hidden,
    intermediate: Annotated[int, typer.Option(help="Take experts of this size.")] = ExpertsPlan.intermediate,
    schemes: Schemes = "w8a8,w4a8-g32",
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Time each row this long.")] = ExpertsPlan.seconds,
    only: Only = None,
    output: Annotated[Path, typer.Option(help="Write experts.json to this folder.")] = Path("bench"),
) -> None:
    """Time the fused experts of a mixture, whole forwards: ours beside transformers' grouped_mm, in turn."""
    import torch
    from rich.console import Console

    from ..bench.experts import run
    from ..finetune import InputError
    from ..finetune.models import check_scheme

    try:
        plan = ExpertsPlan(
            tokens=numbers("tokens", tokens),
            experts=count,
            taken=taken,
            hidden=hidden,
            intermediate=intermediate,
            schemes=tuple(map(check_scheme, schemes.split(","))),
            threads=numbers("threads", threads) if threads else (torch.get_num_threads(),),
            seconds=seconds,
            only=tuple(only.split(",")) if only else (),
        )
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    with Console(stderr=True).status("measuring the limits") as status:
        results = run(plan, status.update)
    paths = results.save(output, "experts")
    _print_rows(results, "transformers grouped_mm bfloat16")
    print(f"written to {output}: {', '.join(path.name for path in paths)}")


@bench.command()
@one_line_errors
def train(
    cases: Annotated[str, typer.Option(help="Time these cases (separate by commas).")] = ",".join(NAMES),
    schemes: Schemes = "w8a8,w4a8-g128",
    grad_dtypes: Annotated[
        str, typer.Option("--grad-dtypes", "--grads", help="Compute gradients in float, int8 or both.")
    ] = "float,int8",
    rounds: Annotated[int, typer.Option(help="Time this many steps of each contender.")] = TrainPlan.rounds,
    only: Only = None,
    peers: Annotated[bool, typer.Option(help="Time what benchmarks/peers.txt installs, too.")] = TrainPlan.peers,
    memory: Annotated[bool, typer.Option(help="Measure memory too, each in a process.")] = TrainPlan.memory,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile of bfloat16 too (slow).")] = TrainPlan.compiled,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Time on the CPU, or on a GPU (cuda).")] = "cpu",
    output: Annotated[Path, typer.Option(help="Write train.json to this folder.")] = Path("bench"),
) -> None:
    """Time whole training steps: float, our layers, and other libraries, in turn in one process."""
    import torch
    from rich.console import Console

    from ..bench.training.run import run
    from ..finetune import InputError
    from ..finetune.models import check_scheme

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device must be cpu where torch finds no GPU, got cuda: nothing was timed")
    try:
        plan = TrainPlan(
            cases=tuple(cases.split(",")),
            schemes=tuple(map(check_scheme, schemes.split(","))),
            grad_dtypes=tuple(grad_dtypes.split(",")),
            rounds=rounds,
            only=tuple(only.split(",")) if only else (),
            peers=peers,
            memory=memory,
            device=device,
            compiled=compiled,
        )
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    with Console(stderr=True).status("loading") as status:
        results = run(plan, status.update)
    path = results.save(output)
    _print_training(results)
    print(f"written to {path}")


@bench.command()
@one_line_errors
def compare(
    before: Annotated[Path, typer.Argument(help="linear.json of the first run, or its folder.")],
    after: Annotated[Path, typer.Argument(help="The same of the second run.")],
) -> None:
    """Ratio of each row of two runs; exits with status 1 if kernels of ours became slower beyond the spread."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..bench.compare import compare, regressions
    from ..bench.results import Results
    from ..finetune import InputError

    try:
        comparisons = compare(Results.load(before), Results.load(after))
    except ValueError as error:
        raise InputError(str(error)) from error
    if not comparisons:
        raise InputError(f"{before} and {after} have no row in common")
    console = Console()
    for _, cell in groupby(comparisons, key=lambda item: item.after.cell):
        items = list(cell)
        table = Table("", "before ms", "after ms", "ratio", "", box=None, pad_edge=False)
        for item in items:
            times = (f"{item.before.median * 1e3:.4f}", f"{item.after.median * 1e3:.4f}", f"{item.ratio:.2f}")
            table.add_row(Text(item.after.name, style="bold" if item.after.ours else ""), *times, item.verdict)
        console.print(f"\n[bold]{_title(items[0].after)}[/bold]")
        console.print(table)
    slower = regressions(comparisons)
    for item in slower:
        print(f"slower: {item.after.name}, {_title(item.after)}: {item.ratio:.2f}x")
    if slower:
        raise typer.Exit(1)


def _title(row: Any) -> str:
    return f"{row.direction} {row.m} x {row.n} x {row.k}, {row.weights}, {row.threads} threads"


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Positive numbers, comma-separated, of the option of this name."""
    from ..finetune import InputError

    values = text.split(",")
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise InputError(f"{option} must be positive numbers separated by commas, got {text!r}")
    return tuple(map(int, values))


def _print_rooflines(rooflines: Sequence[Any]) -> None:
    """The best of each limit over all measurements with a thread count."""
    from rich.console import Console
    from rich.table import Table

    counts = sorted({roofline.threads for roofline in rooflines})
    table = Table("limit", *(f"{count} threads" for count in counts), title="roofline")

    def add(label: str, unit: str, limits: Callable[[Any], dict[str, float]], name: str) -> None:
        best = [max(limits(roofline)[name] for roofline in rooflines if roofline.threads == count) for count in counts]
        table.add_row(label, *(f"{value / 1e9:.1f} {unit}" for value in best))

    for probe in rooflines[0].peaks:
        add(probe, "Gop/s", attrgetter("peaks"), probe)
    for level in rooflines[0].bandwidth:
        add(f"read from {level}", "GB/s", attrgetter("bandwidth"), level)
    Console().print(table)


def _print_rows(results: Any, base_name: str = "torch float32") -> None:
    """A table for each case, the limit in its title; `base_name` names the row that the others are compared with."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"{results.machine['cpu']}, {results.machine['isa']}", markup=False)
    for _, cell in groupby(results.rows, key=lambda row: row.cell):
        rows = list(cell)
        first = rows[0]
        ratio = f"x {base_name.split()[-1]}"
        table = Table("", "ms", "quartiles", "Gop/s", "of limit", ratio, "error", box=None, pad_edge=False)
        base = next((row.median for row in rows if row.name == base_name), None)
        for row in rows:
            table.add_row(
                Text(row.name, style="bold" if row.ours else ""),
                f"{row.median * 1e3:.4f}",
                f"{row.quartiles[0] * 1e3:.3f}..{row.quartiles[1] * 1e3:.3f}",
                f"{row.rate / 1e9:.0f}",
                f"{row.fraction:.2f}",
                f"{base / row.median:.2f}" if base else "",
                f"{row.error:.0e}",
            )
        console.print(f"\n[bold]{_title(first)}[/bold], limited by {first.limited_by}")
        console.print(table)
    for item in results.skipped:
        console.print(f"not timed in {item.cells} cells: {item.name}: {item.reason}", markup=False)


def _print_training(results: Any) -> None:
    """A table for each case; ratios are of speed, against bfloat16 or, where it was not timed, float32."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"{results.machine['cpu']}, {results.machine['isa']}", markup=False)
    for _, cell in groupby(results.rows, key=lambda row: row.case):
        rows = {row.name: row for row in cell}
        first = next(iter(rows.values()))
        base = rows.get("torch bfloat16") or rows.get("torch float32")
        table = Table(box=None, pad_edge=False)
        for column in ("", "ms", "quartiles", f"x {base.dtype}" if base else "", first.metric, "MB", "peak MB"):
            table.add_column(column, no_wrap=True)
        for row in rows.values():
            used = (0, 0) if row.memory is None else (row.memory.loaded, row.memory.peak)
            table.add_row(
                Text(row.name, style="bold" if row.ours else ""),
                f"{row.median * 1e3:.1f}",
                f"{row.quartiles[0] * 1e3:.0f}..{row.quartiles[1] * 1e3:.0f}",
                f"{base.median / row.median:.2f}" if base else "",
                f"{row.value:.4g}",
                *(f"{size / 1e6:.0f}" if size else "" for size in used),
            )
        console.print(f"\n[bold]{first.title}[/bold], {first.threads} threads")
        console.print(table)
    for item in results.skipped:
        console.print(f"left out: {item.name}: {item.reason}", markup=False)
