"""Perplexity and peak memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..system.host import device
from .models import check_length

_LARGEST = 709.0  # whose exp a float holds


@torch.no_grad()
def perplexity(
    model: nn.Module,
    blocks: Sequence[Tensor],
    *,
    label: str = "held-out",
    visit: Callable[[Tensor], None] | None = None,
) -> float:
    """exp of the mean cross entropy over all predicted tokens of `blocks`, one block at a time.

    Args:
        model: a causal language model whose loss is the mean over the block.
        blocks: int64 [T], each at least two tokens.
        label: shown beside the progress bar.
        visit: called with the logits [T, V] of each block.

    Raises:
        InputError: if a block is longer than the model has positions.
    """
    from tqdm import tqdm

    check_length(model, max(map(len, blocks)))
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for block in tqdm(blocks, desc=label, unit="block", leave=False):
        ids = block.unsqueeze(0).to(device())
        predicted = len(block) - 1
        output = model(input_ids=ids, labels=ids, use_cache=False)
        total += output.loss.item() * predicted
        if visit:
            visit(output.logits[0])
        tokens += predicted
    model.train(was_training)
    mean = total / tokens
    return math.exp(mean) if mean < _LARGEST or math.isnan(mean) else math.inf


class PeakMemory:
    """Context manager: the most resident memory of this process inside the block, sampled every 10 ms.

    `bytes` is valid after the block. On a GPU it is torch's peak of allocated device memory.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        self._on_gpu = device().type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._on_gpu:
            self.bytes = torch.cuda.max_memory_allocated()

    def _sample(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(0.01):
                return
