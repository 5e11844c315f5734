"""What fine-tuning makes of quantized models: held-out perplexity and accuracy beside float, over several seeds.

Jobs: Gemma-3-270M on the documentation of Python (`gemma-lora`, `gemma-full`), and the sentiment of film reviews with
MiniLM (`minilm-lora`, `minilm-full`; the data of `examples/bert_sentiment.py`), and GPT-2 small and BERT-base from
random weights (`gpt2-full`, `bert-full`; `pretraining.py`). Each run is a process of its own and leaves one JSON row in
OUTPUT/rows; a run whose row is there is not repeated, so that an interrupted call goes on.

    python benchmarks/quality.py --output quality --seeds 3
    python benchmarks/quality.py --output quality-quick --quick
    python benchmarks/quality.py --output quality-lora --jobs gemma-lora --only 'bfloat16,*int8' --seeds 1
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from pretraining import minilm_folder, off_reference, pretrain, train

import qkernels
from qkernels.bench.results import machine
from qkernels.bench.training.cases import CASES, FULL, LORA
from qkernels.bench.training.contenders import MODES, Float, Ours
from qkernels.finetune import (
    FinetuneSettings,
    finetune,
    load_adapter,
    load_model,
    load_tokenizer,
    perplexity,
    read_texts,
    resolve_model,
    token_blocks,
)
from qkernels.finetune.demo import write_texts
from qkernels.finetune.models import DEMO, default_cache, quantize
from qkernels.finetune.text import evenly_spread
from qkernels.system import json_file
from qkernels.system.host import pick_dtype

ROOT = Path(__file__).resolve().parents[1]
JOBS = ("gemma-lora", "gemma-full", "minilm-lora", "minilm-full", "gpt2-full", "bert-full")
PERPLEXITY, ACCURACY = "perplexity", "accuracy"


@dataclass(frozen=True)
class Budget:
    """How much work each run gets.

    Attributes:
        calibration_blocks: of the Gemma jobs, training blocks that 4-bit integers are calibrated on, in training and
            after it; 0: rounded to nearest.
        smooth: whether models with int8 activations are smoothed on these blocks before.
    """

    steps: int = 100
    seq_len: int = 512
    eval_blocks: int = 32
    sentences: int = 1000  # held out
    minilm_steps: int = 300
    calibration_blocks: int = 0
    smooth: bool = False
    pretraining_steps: int = 200


QUICK = Budget(steps=6, seq_len=128, eval_blocks=3, sentences=200, minilm_steps=30, pretraining_steps=6)
RATES = {
    "gemma-lora": 5e-4,
    "gemma-full": 5e-5,
    "minilm-lora": 2e-3,
    "minilm-full": 2e-4,
    "gpt2-full": 3e-4,
    "bert-full": 1e-4,
}
BATCH = 32  # sentences


@dataclass(frozen=True)
class Run:
    """One fine-tuning; the name of a run in float is its dtype.

    Attributes:
        schemes: a run in float is quantized by each of them afterwards, and measured: quantization after training.
        model: of the Gemma jobs, a transformers folder or "demo".
    """

    job: str
    name: str
    scheme: str
    mode: str
    grad: str
    dtype: str
    seed: int
    budget: Budget
    schemes: tuple[str, ...]
    model: str = DEMO

    @property
    def key(self) -> str:
        return f"{self.job}--{self.name.replace(' ', '-')}--{self.seed}"

    @property
    def method(self) -> str:
        return self.job.partition("-")[2]


def runs(jobs: Sequence[str], schemes: Sequence[str], grads: Sequence[str], seeds: int, budget: Budget) -> list[Run]:
    """All runs, those in float first."""
    common = {"budget": budget, "schemes": tuple(schemes)}
    found = []
    for job in jobs:
        method = LORA if job.endswith(LORA) else FULL
        for seed in range(seeds):
            found += [Run(job, dtype, "none", "frozen", "float", dtype, seed, **common) for dtype in _float_dtypes()]
        for ours in (Ours(s, mode, grad) for s in schemes for mode in MODES[method] for grad in grads):
            reason = ours.unavailable()
            if reason is not None:
                print(f"left out: {job}, {ours.name}: {reason}", file=sys.stderr)
                continue
            what = (job, ours.name, ours.scheme, ours.mode, ours.grad_dtype, _float_dtypes()[-1])
            found += [Run(*what, seed, **common) for seed in range(seeds)]
    return found


def _float_dtypes() -> tuple[str, ...]:
    fastest = str(pick_dtype("auto")).removeprefix("torch.")
    return tuple(dict.fromkeys(("float32", fastest)))


def gemma(run: Run) -> dict[str, Any]:
    """Fine-tune a causal language model; see `qkernels.finetune`."""
    budget = run.budget
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train_text, held_out = write_texts(folder)
        settings = FinetuneSettings(
            run.model, [train_text], folder / "tuned", eval_text=[held_out], scheme=run.scheme, mode=run.mode,
            grad_dtype=run.grad, method=run.method, steps=budget.steps, seq_len=budget.seq_len, lr=RATES[run.job],
            seed=run.seed, dtype=run.dtype, eval_blocks=budget.eval_blocks, baseline=run.scheme == "none",
            calibration_blocks=_calibration_blocks(run.scheme, budget), smooth=_smooth(run.scheme, budget),
        )  # fmt: skip
        report = finetune(settings)
        after = {}
        if run.scheme == "none":
            tokenizer = load_tokenizer(resolve_model(run.model, default_cache()))
            blocks = token_blocks(tokenizer, read_texts([held_out]), budget.seq_len, keep_tail=True)
            train_blocks = token_blocks(tokenizer, read_texts([train_text]), budget.seq_len)
            for scheme in run.schemes:
                model = _tuned(run, settings.output)
                blocks_of_text = evenly_spread(train_blocks, _calibration_blocks(scheme, budget))
                quantize(model, scheme, blocks_of_text, smooth=_smooth(scheme, budget))
                after[scheme] = perplexity(model, blocks[: budget.eval_blocks], label=f"held-out, {scheme} afterwards")
    measured = report["perplexity"]
    return {
        "metric": PERPLEXITY,
        "float": measured.get("float"),
        "quantized": measured.get("quantized"),
        "tuned": measured["finetuned"],
        "quantized_afterwards": after,
        **{name: report[name] for name in ("losses", "seconds_per_step", "peak_memory_bytes")},
    }


def _calibration_blocks(scheme: str, budget: Budget) -> int:
    """Those of the budget, for schemes that calibration or smoothing is for."""
    if scheme == "none":
        return 0
    calibrated = qkernels.QuantScheme.parse(scheme).weight_bits == 4
    return budget.calibration_blocks if calibrated or _smooth(scheme, budget) else 0


def _smooth(scheme: str, budget: Budget) -> bool:
    return budget.smooth and scheme != "none" and qkernels.QuantScheme.parse(scheme).int_activations


def _tuned(run: Run, output: Path) -> torch.nn.Module:
    """The fine-tuned float model, adapters merged."""
    if run.method == FULL:
        return load_model(output, torch.float32)  # as it was trained and measured
    base = load_model(resolve_model(run.model, default_cache()), pick_dtype(run.dtype))
    return load_adapter(base, output).merge_and_unload()


def minilm(run: Run) -> dict[str, Any]:
    """Fine-tune an encoder with a float head on rated sentences."""
    from transformers import AutoTokenizer, BertForSequenceClassification, set_seed

    sys.path.insert(0, str(ROOT / "examples"))
    from bert_sentiment import accuracy, batch, read_sentences

    data = ROOT / "examples" / "data"
    data.mkdir(exist_ok=True)
    rows = read_sentences(data)
    random.Random(0).shuffle(rows)  # the same split for every seed
    held_out, train = rows[: run.budget.sentences], rows[run.budget.sentences :]
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(run.seed)
    model = prepare(BertForSequenceClassification.from_pretrained(folder, num_labels=2), run)
    order = random.Random(run.seed)
    # A full training in bfloat16 is one of float32 weights under autocast.
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=run.method == FULL and run.dtype == "bfloat16")
    trained = train_minilm(model, run, lambda: batch(tokenizer, order.sample(train, BATCH)), autocast)
    with autocast:
        tuned, after = accuracy(model, tokenizer, held_out), {}
        if run.scheme == "none":
            merged = model.merge_and_unload() if run.method == LORA else model
            for scheme in run.schemes:
                quantized = copy.deepcopy(merged)
                qkernels.quantize_(quantized, scheme, skip=["classifier"])
                after[scheme] = accuracy(quantized, tokenizer, held_out)
    # What an untrained head says is chance, so there is no accuracy from before.
    measured = {"float": None, "quantized": None, "tuned": tuned, "quantized_afterwards": after}
    return {"metric": ACCURACY} | measured | trained


def prepare(model: torch.nn.Module, run: Run) -> torch.nn.Module:
    """The classifier quantized but for its head, with adapters for the LoRA job."""
    if run.method == LORA:
        model = model.to(pick_dtype(run.dtype))
    if run.scheme != "none":
        qkernels.quantize_(model, run.scheme, run.mode, skip=["classifier"], grad_dtype=run.grad)
    if run.method == FULL:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))


def train_minilm(
    model: torch.nn.Module, run: Run, next_batch: Callable[[], dict[str, torch.Tensor]], autocast: torch.autocast
) -> dict[str, Any]:
    """AdamW with a linear schedule."""
    steps = run.budget.minilm_steps
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES[run.job])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    return train(model, next_batch, schedule, steps, autocast)


def from_random(run: Run) -> dict[str, Any]:
    """Train a language model from random weights; a quantized one with head and loss fused, as `finetune` does."""
    budget = run.budget
    contender = Float(run.dtype) if run.scheme == "none" else Ours(run.scheme, run.mode, run.grad, fused=True)
    measured = pretrain(
        CASES[run.job], contender, run.seed, steps=budget.pretraining_steps, seq_len=budget.seq_len,
        eval_blocks=budget.eval_blocks, lr=RATES[run.job],
    )  # fmt: skip
    return {"metric": PERPLEXITY, "float": None, "quantized": None, "quantized_afterwards": {}} | measured


WORK = {"gemma": gemma, "minilm": minilm, "gpt2": from_random, "bert": from_random}


def one(run: Run) -> dict[str, Any]:
    """The row of a run."""
    return asdict(run) | WORK[run.job.partition("-")[0]](run) | {"machine": machine()}


def do(run: Run, folder: Path) -> dict[str, Any]:
    """The row of a run, from its file or by running it in a process of its own.

    Raises:
        ValueError: if the file is of a run with another budget.
        RuntimeError: if the process fails.
    """
    path = folder / f"{run.key}.json"
    if path.exists():
        row = json.loads(path.read_text(encoding="utf-8"))
        expected = json.loads(json.dumps(asdict(run)))
        if changed := [name for name, value in expected.items() if row[name] != value]:
            raise ValueError(f"{path} is of a run with another {', '.join(changed)}; give another --output")
        return row
    command = [sys.executable, __file__, "--run", json.dumps(asdict(run)), "--output", str(path)]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"{run.key} failed; what it wrote stands above")
    return json.loads(path.read_text(encoding="utf-8"))


def loss_of(metric: str, value: float) -> float:
    """What training lowers: nats per token, or the share of wrong answers."""
    return math.log(value) if metric == PERPLEXITY else 1 - value


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each contender of a job: means over its seeds.

    `recovered` is the part of what quantization after training costs that training the quantized model avoids:
    (loss quantized afterwards - loss tuned) / (loss quantized afterwards - loss of the tuned float model).
    `deviation`, `seed_deviation`, `offset`: see `off_reference`; the reference is the float training in the same dtype.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["job"], row["name"]].append(row)
    lines = []
    for (job, name), group in groups.items():
        metric, scheme = group[0]["metric"], group[0]["scheme"]
        losses = [loss_of(metric, row["tuned"]) for row in group]
        reference = [r for r in rows if r["job"] == job and r["scheme"] == "none" and r["dtype"] == group[0]["dtype"]]
        after = [r["quantized_afterwards"][scheme] for r in reference if scheme in r["quantized_afterwards"]]
        line = {
            "job": job,
            "name": name,
            "seeds": len(group),
            "metric": metric,
            "float": _mean([row["float"] for row in group]),
            "quantized": _mean([row["quantized"] for row in group]),
            "tuned": statistics.mean(row["tuned"] for row in group),
            "spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "afterwards": _mean(after),
            "recovered": None,
            **off_reference(group, reference),
            "seconds_per_step": statistics.median(row["seconds_per_step"] for row in group),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in group),
        }
        if after:
            worst = statistics.mean(loss_of(metric, value) for value in after)
            best = statistics.mean(loss_of(metric, row["tuned"]) for row in reference)
            if worst > best:
                line["recovered"] = (worst - statistics.mean(losses)) / (worst - best)
        lines.append(line)
    return lines


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


COLUMNS = {
    "name": ("run", str),
    "float": ("float", "{:.3f}".format),
    "quantized": ("quantized", "{:.3f}".format),
    "tuned": ("tuned", "{:.3f}".format),
    "spread": ("spread (loss)", "{:.4f}".format),
    "afterwards": ("quantized after training", "{:.3f}".format),
    "recovered": ("recovered", "{:.0%}".format),
    "deviation": ("curve off by", "{:.3f}".format),
    "seed_deviation": ("another seed's", "{:.3f}".format),
    "offset": ("offset", "{:+.3f}".format),
    "seconds_per_step": ("s/step", "{:.3f}".format),
    "peak_memory_bytes": ("peak MB", lambda size: f"{size / 1e6:.0f}"),
}


def markdown(lines: Sequence[dict[str, Any]], where: dict[str, Any]) -> str:
    """A table for each job."""
    text = ["# Fine-tuning quality", "", f"{where['cpu']}, instruction set {where['isa']}, commit {where['commit']}."]
    for job in dict.fromkeys(line["job"] for line in lines):
        own = [line for line in lines if line["job"] == job]
        text += ["", f"## {job}: held-out {own[0]['metric']}, means of {own[0]['seeds']} seeds", ""]
        text += [
            "| " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
            "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        ]
        for line in own:
            cells = ("-" if line[key] is None else show(line[key]) for key, (_, show) in COLUMNS.items())
            text.append("| " + " | ".join(cells) + " |")
        text += ["", f"![loss]({job}.png)"]
    return "\n".join(text) + "\n"


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Training loss by step, one picture for each job: the mean of the seeds, and their range."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for job in dict.fromkeys(row["job"] for row in rows):
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for index, name in enumerate(dict.fromkeys(row["name"] for row in rows if row["job"] == job)):
            curves = torch.tensor([row["losses"] for row in rows if (row["job"], row["name"]) == (job, name)])
            width = min(10, curves.shape[1])
            smooth = torch.nn.functional.avg_pool1d(curves.unsqueeze(1), width, stride=1).squeeze(1)
            steps, color = range(width, curves.shape[1] + 1), colormaps["tab20"](index % 20)
            axes.plot(steps, smooth.mean(0), label=name, color=color)
            axes.fill_between(steps, smooth.amin(0), smooth.amax(0), color=color, alpha=0.15)
        axes.set(xlabel="step", ylabel="training loss, mean of 10 steps", title=job)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(folder / f"{job}.png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for rows, table and curves")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--schemes", default="w8a8,w8a8-ag128,w4a8-g32-asym,w4a8-g128")
    parser.add_argument("--grad-dtypes", dest="grads", default="float,int8")
    parser.add_argument("--only", default="*", help="fnmatch patterns of runs, comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in asdict(Budget()).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_true", default=None, help="see Budget; default: not")
            continue
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {value}; with --quick less")
    parser.add_argument("--quick", action="store_true", help="one seed, a few short steps: does everything work?")
    parser.add_argument("--model", default=DEMO, help="of the gemma jobs: a transformers folder")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        values = json.loads(options.run)
        values |= {"budget": Budget(**values["budget"]), "schemes": tuple(values["schemes"])}
        json_file.write(options.output, one(Run(**values)))
        return
    jobs = options.jobs.split(",")
    if unknown := set(jobs) - set(JOBS):
        parser.error(f"jobs must be of {', '.join(JOBS)}, got {', '.join(sorted(unknown))}")
    seeds, budget = (1, QUICK) if options.quick else (options.seeds, Budget())
    given = {name: value for name in asdict(budget) if (value := getattr(options, name)) is not None}
    budget = replace(budget, **given)
    if budget.smooth and not budget.calibration_blocks:
        parser.error("--smooth needs --calibration-blocks, whose text says what the activations are like")
    planned = runs(jobs, options.schemes.split(","), options.grads.split(","), seeds, budget)
    patterns = options.only.split(",")
    planned = [run for run in planned if any(fnmatchcase(run.name, pattern) for pattern in patterns)]
    if not planned:
        parser.error(f"--only {options.only!r} leaves no run")
    folder = options.output / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, run in enumerate(planned):
        print(f"== {index + 1} of {len(planned)}: {run.key}", file=sys.stderr)
        rows.append(do(replace(run, model=options.model), folder))
        lines = table(rows)
        json_file.write(options.output / "quality.json", {"machine": rows[0]["machine"], "table": lines})
        (options.output / "quality.md").write_text(markdown(lines, rows[0]["machine"]), encoding="utf-8")
        plot(rows, options.output)
    print(markdown(table(rows), rows[0]["machine"]))


if __name__ == "__main__":
    main()
