"""Text from a model."""

from __future__ import annotations

from typing import Any

import torch

from ..system.host import device
from .errors import InputError
from .models import check_length


@torch.no_grad()
def generate_text(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 64, beams: int = 1) -> str:
    """Continue `prompt`, greedily or by beam search; the prompt is part of the result.

    Raises:
        InputError: if prompt and new tokens do not fit the model, or an empty prompt meets a tokenizer without a
            beginning-of-sequence token.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(device())
    if inputs["input_ids"].shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise InputError(f"the prompt {prompt!r} gives no token to start from; give some text")
        start = torch.tensor([[tokenizer.bos_token_id]], device=device())
        inputs = {"input_ids": start, "attention_mask": torch.ones_like(start)}
    check_length(model, inputs["input_ids"].shape[1] + max_new_tokens)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=beams, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)
