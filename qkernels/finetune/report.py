"""`report.json`, `report.md` and the plot of a fine-tuning run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MARKER = "report.json"
PLOT = "loss.png"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of `finetune` in its three forms."""
    write_json(folder / MARKER, report)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    plot_losses(folder / PLOT, {report["settings"]["scheme"]: report})


def write_json(path: Path, value: Any) -> None:
    """Readable JSON that ends with a newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


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


def markdown(report: dict[str, Any]) -> str:
    """The report for a person."""
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
        f"![loss]({PLOT})",
    ]
    return "\n".join(lines) + "\n"


def plot_losses(path: Path, reports: dict[str, dict[str, Any]]) -> None:
    """Training loss by step, and held-out loss before and after, a colour for each report."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (name, report) in enumerate(reports.items()):
        losses, color = report["losses"], f"C{index}"
        axes.plot(range(1, len(losses) + 1), losses, color=color, alpha=0.6, label=f"{name}, training")
        held_out = [(step, math.log(value)) for step, value in report["held_out_curve"] if value is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=color, marker="o", linestyle=":", label=f"{name}, held-out")
    axes.set(xlabel="step", ylabel="cross entropy per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
