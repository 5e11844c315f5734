"""Next-token cross entropy that needs no float32 copy of the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
# Logits handled at a time, as float32: small enough for the caches, large enough to keep all threads busy.
CHUNK_ELEMENTS = 1 << 20


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of `logits [T, V]` against `targets [T]`, a chunk of rows at a time in float32.

    The gradient, softmax(logits) - onehot(targets), is written in the same pass in the dtype of the logits. With a
    vocabulary of 262144, `torch.nn.functional.cross_entropy` on a float32 copy needs four times the memory.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = logits.new_zeros((), dtype=torch.float32)
        for start in range(0, logits.shape[0], rows):
            chunk = slice(start, start + rows)
            kept = targets[chunk] != IGNORE
            index = targets[chunk].clamp(min=0).unsqueeze(1)
            log_probs = torch.log_softmax(logits[chunk], dim=1, dtype=torch.float32)
            total -= (log_probs.gather(1, index).squeeze(1) * kept).sum()
            if grad is not None:
                probs = log_probs.exp_()
                probs.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
                grad[chunk] = probs.mul_(kept.unsqueeze(1))
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor):
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_total), None


def causal_lm_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None, **_: object
) -> Tensor:
    """Drop-in for `model.loss_function` of a transformers causal language model.

    Args:
        logits: float [B, T, V].
        labels: int64 [B, T]; position t is predicted from the logits of t - 1; -100 is left out.
        vocab_size: V.
        num_items_in_batch: divisor of the summed loss; None: the number of predicted positions.

    Returns:
        float32 scalar.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten().to(logits.device)
    total = _SummedCrossEntropy.apply(logits.flatten(0, 1), targets)
    return total / ((targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
