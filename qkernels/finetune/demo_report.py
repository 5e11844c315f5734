"""What the demo shows: one table on the terminal and in Markdown, and a picture of bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .report import PLOT

PICTURE = "demo.png"
TITLE = "qkernels demo: Gemma-3-270M, LoRA on the documentation of Python"
FLOAT_NOTE = "float models train with the loss of transformers, quantized ones with head and loss fused"
LEGEND = (
    "prep: weights smoothed, or calibrated by GPTQ, on training text; quant: after quantization; tuned: after "
    "fine-tuning; KL: divergence of held-out predictions from the float model's in the same state (nats a token; 0: "
    "equal); ppl: held-out perplexity; tok/s: tokens a second in training and generation; peak: memory while training"
)
# Rise of the held-out perplexity that counts as a defect: over the float model by quantization alone, and over the
# fine-tuned float model after fine-tuning.
LIMITS_QUANTIZED = {"w8a8": 0.035, "w8a8-ag128": 0.01, "w4a8-g32-asym": 0.12}
LIMITS_FINETUNED = {"w8a8": 0.02, "w4a8-g32-asym": 0.06}
LEAST_GAIN = 0.05  # share by which fine-tuning must lower the held-out perplexity


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}"


# Key of a row, the two lines of its column's title, and how it is shown; 80 columns of a terminal hold them all.
COLUMNS = (
    ("configuration", "", "configuration", str),
    ("prepared", "", "prep", str),
    ("kl_quantized", "KL", "quant", "{:.4f}".format),
    ("kl_finetuned", "KL", "tuned", "{:.4f}".format),
    ("perplexity_float", "ppl", "float", "{:.2f}".format),
    ("perplexity_quantized", "ppl", "quant", "{:.2f}".format),
    ("perplexity_finetuned", "ppl", "tuned", "{:.2f}".format),
    ("train_tokens_per_second", "train", "tok/s", "{:.0f}".format),
    ("generated_tokens_per_second", "gen", "tok/s", "{:.1f}".format),
    ("peak_memory_bytes", "peak", "MB", _megabytes),
    ("model_bytes", "model", "MB", _megabytes),
)


def table_row(name: str, run: dict[str, Any], baseline: dict[str, Any], prepared: str, seq_len: int) -> dict[str, Any]:
    """A row of the report.

    Args:
        name: of the configuration.
        run, baseline: reports of its job and of the float model's.
        prepared: what was done to the weights before they were rounded.
        seq_len: tokens of a training step.
    """
    measured, divergence = run["perplexity"], run.get("kl_divergence", {})
    return {
        "configuration": name,
        "prepared": prepared,
        "kl_quantized": divergence.get("quantized"),
        "kl_finetuned": divergence.get("finetuned"),
        "perplexity_float": baseline["perplexity"]["float"] if measured else None,
        "perplexity_quantized": measured.get("quantized"),
        "perplexity_finetuned": measured.get("finetuned"),
        "seconds_per_step": run["seconds_per_step"],
        "train_tokens_per_second": seq_len / run["seconds_per_step"],
        "generated_tokens_per_second": run.get("generated_tokens_per_second"),
        "peak_memory_bytes": run["peak_memory_bytes"],
        "model_bytes": run["model"]["bytes"],
        "speedup": baseline["seconds_per_step"] / run["seconds_per_step"],
    }


def checks(rows: list[dict[str, Any]], float_dtype: str, *, learned: bool) -> list[dict[str, Any]]:
    """Each quality figure with its limit.

    Args:
        rows: of the report; limits of configurations without a row are left out.
        float_dtype: the configuration that the others are compared with.
        learned: whether there were steps enough to judge what they gained.
    """
    by_name = {row["configuration"]: row for row in rows if row["perplexity_finetuned"] is not None}
    reference = by_name[float_dtype]
    result = []

    def check(what: str, value: float, ok: bool, limit: str) -> None:
        result.append({"check": what, "value": value, "limit": limit, "ok": ok})

    for name, limit in LIMITS_QUANTIZED.items():
        if name in by_name:
            rise = by_name[name]["perplexity_quantized"] / reference["perplexity_float"] - 1
            check(f"{name}, quantized, over float", rise, rise <= limit, f"at most {limit:+.1%}")
    for name, limit in LIMITS_FINETUNED.items():
        if name in by_name and learned:
            rise = by_name[name]["perplexity_finetuned"] / reference["perplexity_finetuned"] - 1
            what = f"{name}, fine-tuned, over fine-tuned {float_dtype}"
            check(what, rise, rise <= limit, f"at most {limit:+.1%}")
    for name, row in by_name.items():
        if learned:
            change = row["perplexity_finetuned"] / (row["perplexity_quantized"] or row["perplexity_float"]) - 1
            check(f"{name}, change by fine-tuning", change, change <= -LEAST_GAIN, f"at most {-LEAST_GAIN:+.1%}")
    return result


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the report as text, "-" for what was not measured or done."""
    return ["-" if row.get(key) in (None, "") else show_value(row[key]) for key, _, _, show_value in COLUMNS]


def _check_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"{'ok' if item['ok'] else 'MISSED'}: {item['check']}: {item['value']:+.2%} ({item['limit']})"
        for item in report["checks"]
    ]


def _headline(report: dict[str, Any]) -> str:
    budget, where = report["budget"], report["environment"]
    return (
        f"{budget['steps']} steps of {budget['seq_len']} tokens, rank {budget['lora_rank']}, learning rate "
        f"{budget['lr']:g}, {budget['eval_blocks']} held-out blocks of {budget['eval_seq_len']} tokens; "
        f"{where['cpu']}, {where['threads']} threads, instruction set {where['isa']}; {report['note']}"
    )


def markdown(report: dict[str, Any]) -> str:
    """The report for a person."""
    titles = [" ".join(filter(None, (group, title))) for _, group, title, _ in COLUMNS]
    lines = [
        f"# {TITLE}",
        "",
        f"{_headline(report)}. {LEGEND}.",
        "",
        "| " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *("| " + " | ".join(cells(row)) + " |" for row in report["rows"]),
        "",
        f"![bars]({PICTURE})",
        f"![loss]({PLOT})",
        "",
        *(f"- {line}" for line in _check_lines(report)),
        "",
        *(f"**{name}**: {json.dumps(text, ensure_ascii=False)}\n" for name, text in report["samples"].items()),
        *(f"    {command}" for command in report["next"]),
        "",
    ]
    return "\n".join(lines)


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the table, the checks and the generated text."""
    console = console or Console(markup=False, highlight=False)
    table = Table(title=TITLE, box=None, padding=(0, 1, 0, 0), pad_edge=False, collapse_padding=True)
    for index, (_, group, title, _) in enumerate(COLUMNS):
        table.add_column(f"{group}\n{title}", justify="right" if index else "left", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*cells(row))
    console.print(table)
    console.print(f"\n{LEGEND}.\n\n{_headline(report)}.\n")
    for line in _check_lines(report):
        console.print(line)
    for name, text in report["samples"].items():
        console.print(f"\n-- {name}\n{text}")


# Panels of the picture: title, key of a row, factor to the unit.
_PANELS = (
    ("training, tokens/s\n(more is better)", "train_tokens_per_second", 1.0),
    ("generation, tokens/s\n(more is better)", "generated_tokens_per_second", 1.0),
    ("memory while training, GB\n(less is better)", "peak_memory_bytes", 1e-9),
    ("held-out perplexity, tuned\n(less is better)", "perplexity_finetuned", 1.0),
)


def draw_bars(path: Path, report: dict[str, Any]) -> bool:
    """One bar a configuration in each of four panels.

    Returns:
        False if matplotlib is not installed; no picture is written then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Gemma-3-270M, fine-tuned by LoRA: float against quantized")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (title, key, factor) in zip(panels, _PANELS, strict=True):
        rows = [row for row in report["rows"] if row.get(key) is not None]
        names = [row["configuration"] for row in rows]
        colors = ["0.6" if name in ("float32", "bfloat16") else "tab:green" for name in names]
        bars = axes.barh(names, [row[key] * factor for row in rows], color=colors)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.3)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].invert_yaxis()  # shared: the first row on top
    figure.savefig(path, dpi=120)
    return True
