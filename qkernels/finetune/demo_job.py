"""One configuration of the demo, in a process of its own, so that its peak memory is its own.

`python -m qkernels.finetune.demo_job` reads a job as JSON from standard input and writes its report to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..system.host import device
from .measure import perplexity
from .settings import FinetuneSettings
from .train import finetune

KEPT_POSITIONS = 256  # of the held-out text, at which a run is compared with the float model
STAGES = ("quantized", "finetuned")  # what is measured before and after the training; the float model at both


@dataclass(frozen=True)
class Job:
    """One configuration.

    Attributes:
        settings: of `finetune`, paths as strings.
        references: a folder in which the float model leaves what the others are compared with.
        prompt: tokens to continue.
        new_tokens: how many.
    """

    settings: dict[str, Any]
    references: str
    prompt: list[int]
    new_tokens: int


def run(job: Job) -> dict[str, Any]:
    """Fine-tune as `qkernels finetune` does, and measure more.

    Returns:
        The report of `finetune`, with "kl_divergence" by stage (nats a token; empty for the float model),
        "generated_tokens_per_second" and the generated tokens: "before", and of a quantized model "after".
    """
    paths = {name: Path(job.settings[name]) for name in ("output", "cache")}
    texts = {name: [Path(path) for path in job.settings[name]] for name in ("text", "eval_text")}
    evaluation = Evaluation(job)
    report = finetune(FinetuneSettings(**job.settings | paths | texts), evaluate=evaluation)
    return report | evaluation.found


class Evaluation:
    """Takes the place of `perplexity` in a run; the first call is before the training, the second after it."""

    def __init__(self, job: Job) -> None:
        self._job, self._stages = job, iter(STAGES)
        self._is_float = job.settings["scheme"] == "none"
        self.found: dict[str, Any] = {"kl_divergence": {}}

    def __call__(self, model: nn.Module, blocks: list[Tensor], *, label: str) -> float:
        stage = next(self._stages)
        reference = Path(self._job.references) / f"{stage}.pt"
        stride = max(1, sum(map(len, blocks)) // KEPT_POSITIONS)
        expected = None if self._is_float else iter(torch.load(reference, mmap=True))
        kept: list[Tensor] = []
        divergence: list[Tensor] = []

        def compare(logits: Tensor) -> None:
            rows = logits[::stride].float().log_softmax(-1)
            if expected is None:
                kept.append(rows.cpu())
            else:
                target = next(expected).to(rows.device)
                divergence.append((target.exp() * (target - rows)).sum(-1))

        value = perplexity(model, blocks, label=label, visit=compare)
        if expected is None:
            torch.save(kept, reference)
        else:
            self.found["kl_divergence"][stage] = torch.cat(divergence).mean().item()
        if stage == "quantized":
            self.found["before"], self.found["generated_tokens_per_second"] = self._generate(model)
        elif not self._is_float:
            self.found["after"], _ = self._generate(model)
        return value

    def _generate(self, model: Any) -> tuple[list[int], float]:
        """Tokens continued greedily, and how many a second."""
        prompt = torch.tensor([self._job.prompt], device=device())

        def generate(count: int) -> list[int]:
            return model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )[0].tolist()

        generate(2)  # allocates, and starts threads
        start = time.perf_counter()
        tokens = generate(self._job.new_tokens)
        return tokens, self._job.new_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    from .quiet import hide_bars, keep_quiet

    keep_quiet()
    hide_bars()
    print(json.dumps(run(Job(**json.load(sys.stdin)))))
