"""`report.json`, `report.md` and the plot of a fine-tuning run."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..system import json_file

MARKER = "report.json"
PLOT = "loss.png"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of `finetune` in its three forms; without a plot, and saying so, where matplotlib is missing."""
    plotted = plot_losses(folder / PLOT, {report["settings"]["scheme"]: report})
    json_file.write(folder / MARKER, report, indent=2)
    (folder / "report.md").write_text(markdown(report, plot=plotted), encoding="utf-8")


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.2g} MB"


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each result, for a table."""
    stages = {"float": "held-out perplexity, float", "quantized": "... quantized", "finetuned": "... fine-tuned"}
    rows = [
        (label, f"{report['perplexity'][stage]:.3f}")
        for stage, label in stages.items()
        if stage in report["perplexity"]
    ]
    return [
        *rows,
        ("seconds per step", f"{report['seconds_per_step']:.3f}"),
        ("head and loss", "fused" if report["fused_loss"] else "apart, as in transformers"),
        ("peak memory while training", megabytes(report["peak_memory_bytes"])),
        ("model, float", megabytes(report["model"]["float_bytes"])),
        ("model, as trained", megabytes(report["model"]["bytes"])),
        ("trainable parameters", f"{report['model']['trainable_parameters']:,}"),
    ]


def markdown(report: dict[str, Any], *, plot: bool = True) -> str:
    """The report for a person; `plot`: whether there is one to show."""
    settings, where = report["settings"], report["environment"]
    lines = [
        f"# Fine-tuning of {settings['model']} ({settings['method']}, {settings['scheme']}, {report['dtype']})",
        "",
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['seq_len']} tokens, learning rate "
        f"{settings['lr']:g} ({settings['schedule']}, {settings['warmup_steps']} warm-up steps), seed "
        f"{settings['seed']}; {where['cpu']}, {where['threads']} threads, instruction set {where['isa']}.",
        "",
        "| result | value |",
        "| --- | --- |",
        *(f"| {label} | {value} |" for label, value in summary_rows(report)),
        "",
        *([f"![loss]({PLOT})"] if plot else []),
    ]
    return "\n".join(lines) + "\n"


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those around it, `window` in all; at the ends of those that there are."""
    before, after = (window - 1) // 2, window // 2
    parts = [values[max(0, index - before) : index + after + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def plot_losses(path: Path, reports: dict[str, dict[str, Any]]) -> bool:
    """Training loss by step, and held-out loss where it was measured, a colour for each report.

    The line is a mean over a tenth of the steps, the single losses are pale behind it.

    Returns:
        False, with a message, if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        print("no plot of the losses: it needs the package matplotlib (pip install matplotlib)", file=sys.stderr)
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (name, report) in enumerate(reports.items()):
        losses, color = report["losses"], f"C{index}"
        steps, window = range(1, len(losses) + 1), max(1, len(losses) // 10)
        if window > 1:
            axes.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
        label = f"{name}, training" + (f" (mean of {window} steps)" if window > 1 else "")
        axes.plot(steps, smoothed(losses, window), color=color, marker="." if len(losses) < 3 else None, label=label)
        held_out = [(step, math.log(value)) for step, value in report["held_out_curve"] if value is not None]
        if held_out:
            line: dict[str, Any] = {"marker": "o", "linestyle": ":", "markeredgecolor": "black"}
            axes.plot(*zip(*held_out, strict=True), color=color, label=f"{name}, held-out", **line)
    axes.set(xlabel="step", ylabel="cross entropy per token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
