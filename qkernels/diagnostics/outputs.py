"""Running the models of a comparison: what they are given, what they give, and which of it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """What a model gives: logits, or its first output."""

    values: Tensor
    predicts: bool  # logits of a distribution

    def rows(self, keep: Tensor | slice) -> Tensor:
        """[n, V] of the rows that count."""
        flat = self.values.reshape(-1, self.values.shape[-1])
        return flat[keep if isinstance(keep, slice) else keep.to(flat.device)]


def output_of(model: nn.Module, kwargs: Mapping[str, Any], name: str) -> Output:
    """Run a model.

    Raises:
        TypeError: if it gives no output that can be compared; `name` is the model's.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    if getattr(getattr(model, "config", None), "use_cache", False):
        moved["use_cache"] = False
    plain = moved.keys() <= {"input", "input_ids"} and not hasattr(model, "config")
    output = model(*moved.values()) if plain else model(**moved)
    predicts = not isinstance(output, Mapping) or "logits" in output
    if isinstance(output, Mapping):
        output = output["logits"] if predicts else next(iter(output.values()), None)
    found = first_tensor(output)
    if found is None or found.dim() == 0:
        raise TypeError(f"model {name} must give logits or another float tensor, got {type(output).__name__}")
    return Output(found, predicts and found.shape[-1] > 1)  # one number is a regression


def first_tensor(output: Any) -> Tensor | None:
    """The first float tensor of what a layer or model gives; None: there is none."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def keyword_arguments(inputs: Any) -> Iterator[dict[str, Any]]:
    """The keyword arguments of each input; a tensor of another dtype than int64 is under "input"."""
    if isinstance(inputs, Tensor | Mapping | str | bytes) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs must be a list of tensors or mappings, got {type(inputs).__name__}; pass [input]")
    number = -1
    for number, given in enumerate(inputs):
        if isinstance(given, Mapping):
            yield dict(given)
        elif not isinstance(given, Tensor):
            how = "; tokenize texts first" if isinstance(given, str) else ""
            raise TypeError(f"inputs[{number}] must be a tensor or a mapping, got {type(given).__name__}{how}")
        elif given.is_floating_point():
            yield {"input": given}
        elif given.dim() > 2 or given.numel() == 0:
            raise ValueError(f"inputs[{number}] must be token ids [T] or [1, T], got shape {list(given.shape)}")
        else:
            yield {"input_ids": given.reshape(-1, given.shape[-1])}
    if number < 0:
        raise ValueError("inputs must hold at least one input, got none")


def counted(
    output: Output, kwargs: Mapping[str, Any], causal: bool, where: str
) -> tuple[Tensor | slice, Tensor | None]:
    """Which rows of an output count, and the tokens that these predict, of a causal model."""
    z = output.values
    tokens = next((kwargs[key] for key in ("input_ids", "input") if key in kwargs), None)
    mask = kwargs.get("attention_mask")
    if not causal:
        shown = mask is not None and z.shape[:-1] == mask.shape
        return (mask.reshape(-1).to(z.device, torch.bool) if shown else slice(None)), None  # type: ignore[union-attr]
    if not output.predicts or z.dim() != 3 or tokens is None or z.shape[:2] != tokens.shape:
        raise ValueError(f"a causal model must give logits [1, T, V] for token ids, got {list(z.shape)}")
    if z.shape[1] < 2:
        raise ValueError(f"{where} must have at least 2 tokens: the first one is not predicted")
    keep = torch.ones(z.shape[:2], dtype=torch.bool)
    keep[:, -1] = False
    if mask is not None:
        keep[:, :-1] &= mask[:, 1:].cpu().to(torch.bool)
    targets = tokens.roll(-1, 1).cpu()[keep].to(z.device)
    return keep.reshape(-1).to(z.device), targets


def is_causal(model: nn.Module) -> bool:
    """Whether it is a model of transformers that generates text, and has no encoder."""
    if (base := getattr(model, "get_base_model", None)) is not None:
        model = base()
    can_generate, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    return can_generate is not None and can_generate() and not getattr(config, "is_encoder_decoder", False)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards each module is in its mode again."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
